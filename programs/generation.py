"""Generates text with a trained model, alone or mixed with memories.

Tokens are chosen from the mixture's distribution, so temperature, top_k, top_p and beams act on
that. Each memory follows each text. A seed gives a prompt the same text, whatever prompts are
beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.contracts import LanguageModel, StepwiseModel, Vocabulary, Want
from neighborlm.common.errors import InputError
from neighborlm.datamodules.dictionary import Dictionary
from neighborlm.models.decoding import Chosen, Decoding, beam_search, sample
from neighborlm.models.reader import Reader, padded
from neighborlm.programs.inspection import text_before
from neighborlm.programs.kept_mixture import Mixture
from neighborlm.programs.subject import Subject
from neighborlm.retrieval.memories import ConstantMixer
from neighborlm.retrieval.memories.next_token import NextToken

ALONE = Mixture({}, ConstantMixer((1.0,)))
"""The model without memories."""
CONTEXT = 8
"""Tokens that are shown of a stored context."""


@dataclass(frozen=True)
class Source:
    """A stored context that was near to the one after which a token was chosen.

    Attributes:
        context: the text before it.
        token: that followed it there.
        weight: its share of the mixture's distribution.
        row: of the datastore, which is the token's number in the training text.
    """

    context: str
    token: str
    weight: float
    row: int


@dataclass(frozen=True)
class Generated:
    """What was generated for a prompt.

    Attributes:
        prompt: the text before it.
        text: what was generated.
        tokens: its ids.
        log_probs: natural-log probability of each token, before temperature, top_k and top_p.
        sources: of each token, the nearest stored contexts, the heaviest first; empty where none
            were asked for.
    """

    prompt: str
    text: str
    tokens: list[int]
    log_probs: list[float]
    sources: list[list[Source]]


@torch.inference_mode()
def generate(
    subject: Subject,
    prompts: Sequence[str],
    decoding: Decoding | None = None,
    mixture: Mixture = ALONE,
    batch_size: int = 8,
    sources: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> list[Generated]:
    """Continues prompts.

    Args:
        subject: the model, the corpus that its vocabulary comes from, and the run, whose seed
            decides what is drawn.
        prompts: each begins a text, which need not have a word.
        decoding: how tokens are chosen.
        mixture: the memories, and what weighs them.
        batch_size: prompts at a time.
        sources: stored contexts to name of each token.
        on_text: called with each new piece of the text of one prompt, as it is drawn.

    Raises:
        InputError: the model cannot generate, or something does not fit together.
    """
    decoding = decoding or Decoding()
    decoding.check()
    check_generates(subject.model)
    vocabulary = subject.data.dictionary
    generated: list[Generated] = []
    with ready(subject, mixture):
        for first in range(0, len(prompts), batch_size):
            batch = range(first, min(first + batch_size, len(prompts)))
            ids = [opening(vocabulary) + vocabulary.encode(prompts[number]) for number in batch]
            texts = Texts(subject, mixture, ids, decoding, sources)
            show = Streaming(vocabulary, on_text) if on_text and len(prompts) == 1 else None
            chosen = choose(texts, ids, decoding, subject, batch, show)
            for place, number in enumerate(batch):
                one = Chosen(*(column[place].cpu() for column in chosen))
                generated.append(finished(subject, prompts[number], one, texts))
    return generated


def check_generates(model: LanguageModel) -> None:
    """Raises InputError for a model that cannot generate."""
    if not isinstance(model, StepwiseModel):
        raise InputError(
            f"a {type(model).__name__} scores texts and cannot generate any, as it does not read "
            "token by token; expected a language model without a graph network (--arch lm)"
        )


@contextmanager
def ready(subject: Subject, mixture: Mixture) -> Iterator[None]:
    """The model on its device and in evaluation mode, and the memories loaded.

    Raises:
        InputError: there are several ranks.
    """
    trainer = subject.run.trainer()
    if trainer.world_size > 1:
        raise InputError(
            f"--trainer.devices: one process generates, but there are {trainer.world_size} ranks; "
            "expected --trainer.devices 1"
        )
    if isinstance(subject.model, torch.nn.Module):
        subject.model.eval().to(subject.run.device)
        trainer.precision_plugin.convert_module(subject.model)
    for memory in mixture.memories.values():
        memory.prepare()
    with trainer.precision_plugin.forward_context():
        yield
    for memory in mixture.memories.values():
        memory.end_pass()


def opening(vocabulary: Vocabulary) -> list[int]:
    """What stands in front of a text: the token that its tokenizer begins texts with, or else the
    end of the text before."""
    start = getattr(vocabulary, "window_start", None)
    return [vocabulary.eos if start is None else start]


def ending(vocabulary: Vocabulary) -> int | None:
    """The token after which nothing is generated: that which ends a document. In our dictionaries
    it ends a line, behind which a text goes on."""
    return None if isinstance(vocabulary, Dictionary) else vocabulary.eos


def reader_of(subject: Subject, want: Want) -> Reader:
    """What reads texts as long as they may be, in rows such as those of an evaluation."""
    window = min(subject.data.tokens_per_sample, subject.model.max_target_positions)
    context = min(subject.data.context_window or window // 2, window - 1)
    return Reader(subject.model, want, window, context, subject.data.window_start)


class Texts:
    """Texts that grow, and what the model and the memories say of them; see `decoding.Texts`.

    Args:
        subject: the model and its corpus.
        mixture: the memories, and what weighs them.
        prompts: ids of each.
        decoding: says how long the texts can become, and how many beams each has.
        sources: stored contexts to keep of each step.

    Attributes:
        rows, weights: of each step, stored contexts `[S, sources]` and their shares.
    """

    def __init__(
        self,
        subject: Subject,
        mixture: Mixture,
        prompts: list[list[int]],
        decoding: Decoding,
        sources: int,
    ) -> None:
        self.device = subject.run.device
        self.mixed = NextToken(*mixture)
        self.reader = reader_of(subject, self.mixed.want)
        longest = max(map(len, prompts)) + decoding.max_new_tokens
        self.mixed.begin(len(prompts) * decoding.beams, longest)
        self.sources = sources
        self.rows: list[Tensor] = []
        self.weights: list[Tensor] = []

    def extend(self, tokens: Tensor) -> Tensor:
        """See `decoding.Texts.extend`."""
        read = self.reader.read(tokens.to(self.device))
        mixed = self.mixed.extend(tokens, read.keys, read.log_probs)
        if self.sources:
            rows, weights = mixed.nearest(self.sources)
            self.rows.append(rows)
            self.weights.append(weights)
        return mixed.log_probs.cpu()

    def select(self, texts: Tensor) -> None:
        """See `decoding.Texts.select`."""
        self.reader.select(texts.to(self.device))
        self.mixed.follow(texts)


def choose(
    texts: Texts,
    prompts: list[list[int]],
    decoding: Decoding,
    subject: Subject,
    numbers: Sequence[int],
    on_step: Callable[[Tensor], None] | None,
) -> Chosen:
    """The tokens of a batch of prompts; `numbers` are their places among all, by which each draws
    random numbers of its own."""
    end = ending(subject.data.dictionary)
    if decoding.beams > 1:
        return beam_search(texts, padded(prompts), decoding, end)
    generators = (np.random.default_rng((subject.run.seed, number)) for number in numbers)
    uniforms = np.stack([generator.random(decoding.max_new_tokens) for generator in generators])
    return sample(texts, padded(prompts), decoding, torch.from_numpy(uniforms), end, on_step)


def finished(subject: Subject, prompt: str, chosen: Chosen, texts: Texts) -> Generated:
    """A text as it is returned, from its tokens `[T]`."""
    length = int((chosen.tokens >= 0).sum())
    tokens = chosen.tokens[:length].tolist()
    sources = []
    for step, origin in enumerate(chosen.origins[:length].tolist() if texts.sources else []):
        shares = zip(texts.rows[step][origin], texts.weights[step][origin], strict=True)
        sources.append([source_of(subject, int(row), float(w)) for row, w in shares if row >= 0])
    end = ending(subject.data.dictionary)
    text = subject.data.dictionary.decode(tokens[:-1] if tokens[-1] == end else tokens)
    return Generated(prompt, text, tokens, chosen.log_probs[:length].tolist(), sources)


def source_of(subject: Subject, row: int, weight: float) -> Source:
    """A row of the datastore as text."""
    data = subject.data
    token = data.dictionary.decode([int(data.stream("train").tokens[row])])
    return Source(text_before(data, "train", row, CONTEXT), token, weight, row)


class Streaming:
    """Passes on the text of one prompt piece by piece, as its tokens are chosen.

    Args:
        vocabulary: decodes them.
        on_text: called with each piece.
    """

    def __init__(self, vocabulary: Vocabulary, on_text: Callable[[str], None]) -> None:
        self.vocabulary = vocabulary
        self.on_text = on_text
        self.tokens: list[int] = []
        self.shown = ""

    def __call__(self, tokens: Tensor) -> None:
        """Takes the next token, int64 `[1]`."""
        if int(tokens[0]) == ending(self.vocabulary):
            return
        self.tokens.append(int(tokens[0]))
        text = self.vocabulary.decode(self.tokens)
        # A character of several bytes shows once all of them are there.
        if text.startswith(self.shown) and not text.endswith("\ufffd"):
            self.on_text(text[len(self.shown) :])
            self.shown = text
