"""A model of transformers that is given a memory and stays a model of transformers: its `forward`
returns the log-probabilities of the mixture as logits, so that `generate`, and whoever else reads
logits, chooses from the mixture.

The memories and their weights are those of a run's latest evaluation with memories.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from neighborlm.common.errors import InputError
from neighborlm.models.huggingface import HuggingFaceLM
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.programs.generation import Source, source_of
from neighborlm.programs.kept_mixture import Mixture, make_mixture
from neighborlm.programs.run import Run
from neighborlm.programs.settings import MemorySettings
from neighborlm.programs.subject import Subject
from neighborlm.retrieval.memories import ConstantMixer, KNNMemory
from neighborlm.retrieval.memories.next_token import Mixed, NextToken


def with_memory(
    model: PreTrainedModel, run: Path | str, lmbda: float | None = None
) -> PreTrainedModel:
    """Gives a model the memories of a run; it is the same object, of a class derived from its own.

    Args:
        model: a causal language model, the one that was evaluated.
        run: directory of a run, in which evaluate.py has evaluated the model with memories.
        lmbda: weight of the memory knn, where it is the only one; by default the one that the
            evaluation found.

    Raises:
        InputError: there was no such evaluation, or of another model.
    """
    return give_memory(model, *mixture_of_run(HuggingFaceLM(model), Path(run), lmbda))


def give_memory(model: PreTrainedModel, subject: Subject, mixture: Mixture) -> PreTrainedModel:
    """Gives a model memories; see `with_memory`.

    Args:
        subject: this very model as a `HuggingFaceLM`, and the corpus that the memories remember.
        mixture: the memories, and what weighs them.
    """
    kind = type(model)
    signature = inspect.signature(kind.forward)

    @wraps(kind.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        del given["self"]
        return self.remembering.forward(kind.forward, self, given)

    def reorder_cache(self: PreTrainedModel, cache: Any, beams: Tensor) -> Any:
        """Called by beam search."""
        cache.reorder_cache(beams)
        self.remembering.follow(beams)
        return cache

    def sources(self: PreTrainedModel, count: int = 5) -> list[list[list[Source]]]:
        """Of each text that was generated last, and each of its tokens, the stored contexts with
        the largest shares of the mixture."""
        return self.remembering.sources(count)

    methods = {"forward": forward, "_reorder_cache": reorder_cache, "sources": sources}
    model.remembering = Remembering(subject, mixture)
    model.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})
    return model


class Remembering:
    """What a model of transformers knows of its memories and of the texts that it reads.

    Args:
        subject: the model, and the corpus that the memories remember.
        mixture: the memories, and what weighs them.
    """

    def __init__(self, subject: Subject, mixture: Mixture) -> None:
        self.subject = subject
        self.mixed = NextToken(*mixture)
        self.reads_text = any(type(m) is not KNNMemory for m in mixture.memories.values())
        """Whether a memory needs more of a text than the key of its last token."""
        self.columns = 0
        """Of the texts that are being read."""
        self.listens = False
        """Whether the model's own logits are returned, see `listening`."""
        self.heard: tuple[Tensor, dict[str, Tensor]] | None = None
        """Tokens and keys of the batch that was listened to."""
        self.steps: list[Mixed] = []
        """What was mixed for the tokens of the texts so far."""
        self.lost: str | None = None
        """Why there are no sources, if there are none."""
        for memory in mixture.memories.values():
            memory.prepare()

    @torch.no_grad()
    def forward(self, original: Any, model: PreTrainedModel, given: dict[str, Any]) -> Any:
        """The model's own `forward`, with the mixture in place of its logits."""
        tokens, as_tuple = given.get("input_ids"), given.get("return_dict") is False
        if self.mixed.is_lm_alone:
            return original(model, **given)
        if tokens is None:
            raise InputError("with_memory: reads tokens; expected input_ids, not inputs_embeds")
        labels = given.pop("labels", None)
        before = 0 if self.listens else self._begin(given, tokens)
        with self.subject.model.layers.kept(self.mixed.want.keys) as kept, last_hidden(model, kept):
            out = original(model, **{**given, "return_dict": True})
        keys = {name: kept[name].view(*tokens.shape, -1) for name in self.mixed.want.keys}
        if self.listens:
            self.heard = tokens, keys
            return out
        out.logits = self._mixed(out.logits, read_tokens(tokens, given, before), keys, given)
        if labels is not None:
            out.loss = model.loss_function(out.logits, labels, vocab_size=out.logits.shape[-1])
        return out.to_tuple() if as_tuple else out

    def _begin(self, given: dict[str, Any], tokens: Tensor) -> int:
        """How many columns were read before; begins new texts where none were."""
        cache = given.get("cache", given.get("past_key_values"))
        before = 0 if cache is None else int(cache.get_seq_length())
        if before == 0 or not self.reads_text:
            limit = self.subject.model.max_target_positions
            room = limit if self.reads_text and cache is not None else tokens.shape[1]
            self.mixed.begin(len(tokens), room)
        elif before != self.columns:
            raise InputError(
                f"with_memory: the texts have {self.columns} tokens, but {before} were read before "
                "these, as where some were taken back; only the memory knn, alone, can follow that"
            )
        if before == 0:
            self.steps, self.lost = [], None
        self.columns = before + tokens.shape[1]
        return before

    def _mixed(
        self, logits: Tensor, tokens: Tensor, keys: dict[str, Tensor], given: dict[str, Any]
    ) -> Tensor:
        """Log-probabilities fp32 `[B, n, V]` of the mixture."""
        kept = given.get("logits_to_keep", 0)
        columns = slice(-kept, None) if isinstance(kept, int) and kept else slice(None)
        asked = kept.tolist() if isinstance(kept, Tensor) else columns
        log_probs = logits.float().log_softmax(dim=-1)
        mixed = self.mixed.extend(tokens, keys, log_probs.flatten(0, 1), asked)
        if logits.shape[1] == 1:
            self.steps.append(mixed._replace(log_probs=mixed.log_probs[:, :0].clone()))
        elif self.steps or tokens.shape[1] > 1:
            self.lost = "several tokens were scored at once"
        return mixed.log_probs.view_as(logits)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In the body the model gives its own logits, and what it reads is kept for
        `mixed_in_row`."""
        self.listens = True
        try:
            yield
        finally:
            self.listens = False

    def mixed_in_row(self, row: int, length: int, log_probs: Tensor) -> Tensor:
        """Log-probabilities fp32 `[n, V]` of the mixture at the last n places of a row.

        Args:
            row: of the batch that was listened to.
            length: of the row, without padding behind it.
            log_probs: the model's own, `[n, V]`.
        """
        if self.mixed.is_lm_alone:
            return log_probs
        tokens, keys = self.heard
        keys = {name: key[row : row + 1, :length] for name, key in keys.items()}
        self.mixed.begin(1, length)
        asked = slice(length - len(log_probs), length)
        tokens = tokens[row : row + 1, :length]
        return self.mixed.extend(tokens, keys, log_probs.float(), asked).log_probs

    def follow(self, beams: Tensor) -> None:
        """Text i goes on as text `beams[i]`."""
        self.lost = "beam search has given up some of the texts that were read"
        if self.reads_text:
            self.mixed.follow(beams)

    def sources(self, count: int) -> list[list[list[Source]]]:
        """See `with_memory`.

        Raises:
            InputError: nothing was generated, or not token by token.
        """
        if self.lost is not None or not self.steps:
            raise InputError(
                f"sources: {self.lost or 'nothing was generated yet'}; expected a text that was "
                "generated token by token, without beams"
            )
        found: list[list[list[Source]]] = [[] for _ in range(len(self.steps[0].weights))]
        for step in self.steps:
            for text, (rows, shares) in enumerate(zip(*step.nearest(count), strict=True)):
                pairs = zip(rows.tolist(), shares.tolist(), strict=True)
                found[text].append(
                    [source_of(self.subject, *pair) for pair in pairs if pair[0] >= 0]
                )
        return found


@contextmanager
def last_hidden(model: PreTrainedModel, keys: dict[str, Tensor]) -> Iterator[None]:
    """Keeps the last hidden vectors of a forward pass as keys `last_hidden`."""

    def keep(_module: Any, _given: Any, out: Any) -> None:
        keys["last_hidden"] = out[0]

    hook = model.base_model.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def read_tokens(tokens: Tensor, given: dict[str, Any], before: int) -> Tensor:
    """Tokens int64 `[B, T]` with -1 where the attention mask says padding."""
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return tokens
    return tokens.masked_fill(mask[:, before : before + tokens.shape[1]] == 0, -1)


# -- what a run says -----------------------------------------------------------------------------


def mixture_of_run(model: HuggingFaceLM, run: Path, lmbda: float | None) -> tuple[Subject, Mixture]:
    """The model with the corpus of a run's latest evaluation with memories, and its mixture."""
    settings = settings_of_latest(run)
    names = (settings["memories"] or "knn").split(",")
    memories = MemorySettings.of(settings)
    made = Run(run, {"logger": False}, settings["seed_everything"])
    made.device = model.device
    subject = Subject.of(model, CorpusDataModule(**settings["data"]), made)
    mixture = make_mixture(subject, [name.strip() for name in names], settings["mixer"], memories)
    if lmbda is None:
        return subject, mixture
    if list(mixture.memories) != ["knn"] or not 0 <= lmbda <= 1:
        raise InputError(
            f"lmbda {lmbda}: is the weight of the memory knn alone, from 0 to 1, but the "
            f"memories of {run} are {','.join(mixture.memories)}; expected no lmbda"
        )
    return subject, mixture._replace(mixer=ConstantMixer((1 - lmbda, lmbda)))


def settings_of_latest(run: Path) -> dict[str, Any]:
    """The settings of the latest evaluation with memories, by section.

    Raises:
        InputError: there is none.
    """
    expected = "expected the directory of a run that evaluate.py has evaluated with --knnlm"
    if not run.is_dir():
        raise InputError(f"{run}: no such directory; {expected}")
    found = []
    for path in (run / "evaluations").glob("*.json"):
        record = json.loads(path.read_text())
        settings = record["settings"]
        if settings.get("knnlm") or settings.get("memories"):
            found.append((record["time"], path.name, settings))
    if not found:
        raise InputError(f"{run}: has no evaluation with memories; {expected}")
    return max(found, key=lambda one: one[:2])[2]
