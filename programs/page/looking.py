"""Asks the model and the memories of an evaluation about the tokens of a page once more, now for
all that they say."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from neighborlm.callbacks.interpolation import Interpolation
from neighborlm.common.contracts import Distribution, Memory, Mixer, Opinion, Scored, Want
from neighborlm.common.errors import InputError
from neighborlm.programs.page.tokens import (
    MODEL_TOP,
    OCCURRENCES,
    PageNeighbors,
    PageTokens,
    chosen,
    mixture_ranks,
    most_probable,
    most_probable_of_model,
)
from neighborlm.programs.subject import Evaluated, Subject, score
from neighborlm.retrieval.memories import KNNMemory, NGramMemory
from neighborlm.retrieval.memories.cache_builder import nearest_first
from neighborlm.retrieval.memories.mixers import lm_opinion, weighed
from neighborlm.retrieval.search.retriever import counts_of

AT_ONCE = 256
"""Tokens that a memory says all of at once: an n-gram may be followed by much of the vocabulary."""


class Looking(Interpolation):
    """Keeps all that is said of some tokens.

    Args:
        memories: by name.
        mixer: weighs them.
        text: integers `[N]`, the tokens of the split.
        wanted: bool `[N]`, the tokens to keep it of.
        neighbors: how many of each token to keep.

    Attributes:
        parts: what was kept, in the order of the text.
    """

    doing = "reading the tokens of the page from"
    """What the pass is called while it runs."""

    def __init__(
        self,
        memories: Mapping[str, Memory],
        mixer: Mixer,
        text: np.ndarray,
        wanted: np.ndarray,
        neighbors: int,
    ) -> None:
        super().__init__(memories, mixer, text, tokens_at_once=AT_ONCE)
        self.wanted = wanted
        self.most = neighbors
        self.parts: list[PageTokens] = []

    @property
    def want(self) -> Want:
        """The candidates of the model too."""
        return super().want.and_also(Want(entropy=True, top=MODEL_TOP))

    @torch.inference_mode()
    def _ask(self, asked: Scored) -> None:
        self.begun += 1
        inside = torch.from_numpy(self.wanted[asked.positions.numpy()])
        own, said = asked.some(inside), {}
        for name, memory in self.memories.items():
            if memory.in_order:
                if inside.any():
                    said[name] = memory.distribution(asked).some(inside)
                else:
                    memory.say(asked)
                memory.observe(asked.targets)
            elif inside.any():
                said[name] = memory.distribution(own)
        if inside.any():
            self.parts.append(part_of(self.memories, self.mixer, own, said, self.most))
        self.ended += 1


def part_of(
    memories: Mapping[str, Memory],
    mixer: Mixer,
    asked: Scored,
    said: Mapping[str, Distribution],
    most: int,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> PageTokens:
    """All that is said of some tokens.

    Args:
        memories: by name.
        mixer: weighs them.
        asked: what the model says, its most probable tokens included.
        said: by memory.
        most: neighbours of a token to keep.
        weights: by source, fp64 `[n]`; None for those that the mixer gives.
    """
    targets = asked.targets.numpy()
    opinions = {name: opinion_of(of, asked.targets) for name, of in said.items()}
    sources = {"lm": lm_opinion(asked), **opinions}
    if weights is None:
        _, weights = weighed(sources, mixer)
    model = asked.top_ids.numpy(), asked.top_log_probs.numpy(), targets
    candidates = {"lm": most_probable_of_model(*model)}
    for name, of in said.items():
        candidates[name] = most_probable(of.ids.numpy(), of.probs.numpy(), targets)
    part = PageTokens(
        asked.positions.numpy(),
        targets,
        {name: opinion.log_probs.double().numpy() for name, opinion in sources.items()},
        {name: weight.numpy() for name, weight in weights.items()},
        False,
        candidates,
        lm_alone=None if asked.lm_log_probs is None else asked.lm_log_probs.double().numpy(),
        entropy=asked.entropy.double().numpy(),
        ranks=ranks_of(asked, said, sources, weights),
        model_top=asked.top_ids.shape[1],
    )
    for name, memory in memories.items():
        if isinstance(memory, KNNMemory):
            part = replace(part, neighbors=neighbors_of(memory, said[name], most))
        if isinstance(memory, NGramMemory):
            lengths = opinions[name].features["suffix_length"].numpy().astype(np.int64)
            places = memory.occurrences(asked, OCCURRENCES).numpy()
            part = replace(part, suffix_lengths=lengths, occurrences=places)
    return part


def ranks_of(
    asked: Scored,
    said: Mapping[str, Distribution],
    sources: Mapping[str, Opinion],
    weights: Mapping[str, torch.Tensor],
) -> np.ndarray:
    """See `mixture_ranks`."""
    probs = sum(weights[name] * of.log_probs.double().exp() for name, of in sources.items())
    model = asked.top_ids, weights["lm"][:, None] * asked.top_log_probs.double().exp()
    memories = [(of.ids, weights[name][:, None] * of.probs.double()) for name, of in said.items()]
    return mixture_ranks(asked.targets, probs, model, memories)


def opinion_of(said: Distribution, targets: torch.Tensor) -> Opinion:
    """What a distribution says of the targets alone."""
    hits = said.ids == targets[:, None]
    return Opinion((said.probs.double() * hits).sum(dim=1).log(), said.features)


def neighbors_of(memory: KNNMemory, said: Distribution, most: int) -> PageNeighbors:
    """The nearest neighbours of some tokens, with the scores that weigh their votes."""
    columns = [said.scores.numpy(), said.rows.numpy(), said.ids.numpy()]
    if memory.weights is not None:
        columns.append(counts_of(columns[1], memory.weights))
    scores, rows, values, *counts = (x[:, :most] for x in nearest_first(*columns))
    own = counts[0].astype(np.float32) if counts else None
    return PageNeighbors(scores, rows, values, own, memory.temperature, memory.k)


def page_of(
    subject: Subject, evaluated: Evaluated, split: str, which: str, neighbors: int
) -> PageTokens:
    """What a page shows of an evaluation that has kept its scores.

    Args:
        subject: what was evaluated.
        evaluated: its memories, their mixer and the scores.
        split: of the corpus.
        which: tokens, see `tokens.chosen`.
        neighbors: of a token, at most.

    Raises:
        InputError: there are several ranks, or `which` cannot be understood.
    """
    check_one_rank(subject)
    stream, scores = subject.data.stream(split), evaluated.scores
    base = scores.get("gnn_log_prob", scores["lm_log_prob"]).astype(np.float64)
    gains = scores.get("log_prob", base) - base
    kept = chosen(which, gains, scores["position"], stream.line_starts)
    wanted = np.zeros(len(stream.tokens), dtype=bool)
    wanted[scores["position"][kept]] = True
    looking = Looking(evaluated.memories, evaluated.mixer, stream.tokens, wanted, neighbors)
    in_order = any(memory.in_order for memory in evaluated.memories.values())
    rows = np.arange(len(wanted)) <= np.flatnonzero(wanted)[-1] if in_order else wanted
    score(subject, split, looking.want, [looking], rows)
    page = joined(looking.parts)
    return page.in_classes(subject.data, split)


def check_one_rank(subject: Subject) -> None:
    """Raises InputError where several ranks would each have a part of the page."""
    ranks = subject.run.trainer().world_size
    if ranks > 1:
        raise InputError(f"--page is made by one process, but there are {ranks} ranks")


def joined(parts: list[PageTokens]) -> PageTokens:
    """One or more parts of a page, in the order of the text."""
    order = np.argsort(np.concatenate([part.positions for part in parts]), kind="stable")

    def stacked(columns: Sequence[Any]) -> Any:
        """Arrays, alone or in mappings and named tuples, one behind the other; else the first."""
        one = columns[0]
        if isinstance(one, np.ndarray):
            return np.concatenate(columns)[order]
        if isinstance(one, Mapping):
            return {name: stacked([column[name] for column in columns]) for name in one}
        if isinstance(one, tuple):
            return type(one)(*map(stacked, zip(*columns, strict=True))) if one else one
        return one

    names = [each.name for each in fields(PageTokens)]
    page = PageTokens(*(stacked([getattr(part, name) for part in parts]) for name in names))
    return replace(page, constant=all(np.ptp(of) == 0 for of in page.weights.values()))
