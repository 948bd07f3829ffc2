"""The protocols between the rooms of this project: models score, retrievers search, memories say,
mixers weigh.

A new model, vocabulary, retriever, memory or mixer is a class with these methods, which need not be
a subclass of anything here, and one line in a registry.
Shapes: n scored tokens, V vocabulary, Q queries, k neighbours, d width of a key.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

Metric = Literal["l2", "ip", "cosine"]
"""Squared Euclidean distance (smaller is nearer), inner product or cosine (larger is nearer)."""
NProbe = int | Literal["auto"]
"""Inverted lists that a query visits; `auto`: those not much farther away than the nearest one."""


# -- models --------------------------------------------------------------------------------------


class Want(NamedTuple):
    """What a caller wants to know of each scored token.

    Attributes:
        keys: types of the keys that are wanted, such as `last_ffn_input`.
        log_probs: whether the log-probabilities of targets are wanted; a datastore needs none.
        entropy: whether the entropy of the model's distribution is wanted.
        top: how many of the model's most probable tokens are wanted.
    """

    keys: tuple[str, ...] = ()
    log_probs: bool = True
    entropy: bool = False
    top: int = 0

    def and_also(self, other: "Want") -> "Want":
        """The union of both.

        >>> Want(("a",), log_probs=False).and_also(Want(("b", "a"), top=3))
        Want(keys=('a', 'b'), log_probs=True, entropy=False, top=3)
        """
        return Want(
            tuple(dict.fromkeys(self.keys + other.keys)),
            self.log_probs or other.log_probs,
            self.entropy or other.entropy,
            max(self.top, other.top),
        )


class Scored(NamedTuple):
    """What a model says of n tokens, row by row; fields that were not wanted are None or empty.

    Attributes:
        positions: int64 `[n]`, offset of each target in its split.
        targets: int64 `[n]`.
        log_probs: fp32 `[n]`, natural-log probability of each target.
        keys: `[n, d]` by key type, the vector of each target's context.
        entropy: fp32 `[n]`, of the model's distribution, in nats.
        top_ids: int64 `[n, top]`, the most probable tokens, most probable first.
        top_log_probs: fp32 `[n, top]`, their natural-log probabilities.
        lm_log_probs: fp32 `[n]`, natural-log probability of each target by the language model on
            which this one stands; None for a model that stands on none.
    """

    positions: Tensor
    targets: Tensor
    log_probs: Tensor | None = None
    keys: Mapping[str, Tensor] = {}
    entropy: Tensor | None = None
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    lm_log_probs: Tensor | None = None

    def some(self, which: Tensor | slice) -> "Scored":
        """Some of the tokens."""
        keys = {name: key[which] for name, key in self.keys.items()}
        others = (None if x is None else x[which] for x in self._replace(keys=None))
        return Scored(*others)._replace(keys=keys)

    def on_cpu(self) -> "Scored":
        """A copy on the CPU, with keys in fp32."""
        keys = {name: key.float().cpu() for name, key in self.keys.items()}
        others = (None if x is None else x.cpu() for x in self._replace(keys=None))
        return Scored(*others)._replace(keys=keys)

    @staticmethod
    def joined(parts: Sequence["Scored"]) -> "Scored":
        """The concatenation of one or more parts that were asked for by the same `Want`."""
        keys = {name: torch.cat([part.keys[name] for part in parts]) for name in parts[0].keys}
        columns = zip(*(part._replace(keys=None) for part in parts), strict=True)
        joined = (None if column[0] is None else torch.cat(column) for column in columns)
        return Scored(*joined)._replace(keys=keys)


class State(Protocol):
    """What a model keeps of the tokens that it has read, such as keys and values of attention."""

    def select(self, rows: Tensor) -> "State":
        """The state of some rows int64 `[B']`, in this order; a row may be taken several times."""
        ...


class Step(NamedTuple):
    """What a model says after it has read T more tokens of B rows.

    Attributes:
        log_probs: fp32 `[B, V]`, natural-log probability of every token after the last one read.
        keys: `[B, T, d]` by key type, the vector of the context that ends with each token read; any
            where a row is padded.
        state: what it has read so far, for the next step.
    """

    log_probs: Tensor
    keys: Mapping[str, Tensor]
    state: State


class Batch(Protocol):
    """Rows of a split, padded on the right, `[B, T]` each; see `datamodules.lm.LMBatch`.

    Attributes:
        tokens: int64, the model's input.
        targets: int64, the token that follows each.
        positions: int64, offset of each target in its split, -1 where padded.
        scored: bool, False for padding and for tokens that only give context.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    scored: Tensor


@runtime_checkable
class LanguageModel(Protocol):
    """Predicts the next token.

    Attributes:
        vocab_size: V.
        max_target_positions: longest row that it reads, in tokens.
        fingerprint: identifies the model's weights and settings; products made with one model are
            refused with another.
    """

    vocab_size: int
    max_target_positions: int
    fingerprint: str

    def key_width(self, key_type: str) -> int:
        """Width d of the keys of a type.

        Raises:
            InputError: the model has no keys of this type.
        """
        ...

    def score(self, batch: Batch, want: Want) -> Scored:
        """What is wanted of the batch's scored tokens. Does not change the model."""
        ...


@runtime_checkable
class StepwiseModel(LanguageModel, Protocol):
    """A language model that can generate."""

    def step(self, tokens: Tensor, state: State | None, want: Want) -> Step:
        """Reads T more tokens of B rows, of which no more than `max_target_positions` fit into a
        row, and gives the distribution of the next one.

        Args:
            tokens: int64 `[B, T]`, with -1 in front of the first token of a row.
            state: of the last step, which this one uses up; None where nothing was read.
            want: its keys; `Step` has no more.
        """
        ...


@runtime_checkable
class Backbone(LanguageModel, Protocol):
    """The language model on which a graph network stands, and its parts.

    Attributes:
        width: of its hidden vectors and of its word vectors.
    """

    width: int

    def hidden(
        self, tokens: Tensor, key_types: Sequence[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """From tokens int64 `[B, T]` to the input of the softmax `[B, T, width]` and the features
        `[B, T, d]` by key type."""
        ...

    def target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Natural-log probability of targets int64 `[n]`, fp32 `[n]`, from hidden `[n, width]`."""
        ...

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Natural-log probability of every token, fp32 `[n, V]`, from hidden `[n, width]`."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Word vectors `[..., width]` of tokens int64, neither scaled nor with positions."""
        ...


class Vocabulary(Protocol):
    """Maps text to token ids and back.

    Attributes:
        pad: id of padding.
        eos: id that ends a line or a document.
        window_start: id that every row begins with, in place of the token before its first target;
            None for that token itself.
        fingerprint: identifies the vocabulary; with equal fingerprints equal ids are equal tokens.
    """

    pad: int
    eos: int
    window_start: int | None
    fingerprint: str

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        ...


# -- text ----------------------------------------------------------------------------------------


class TokenStream(Protocol):
    """A split of a corpus as token ids.

    Attributes:
        tokens: integers `[N]`, the ids of all lines concatenated, usually memory-mapped.
        line_starts: int64 `[lines + 1]`; line i is `tokens[line_starts[i] : line_starts[i + 1]]`.
    """

    tokens: np.ndarray
    line_starts: np.ndarray


class TextSize(NamedTuple):
    """How much raw text there is.

    Attributes:
        words: separated by white space.
        bytes: in UTF-8.
    """

    words: int
    bytes: int


class Corpus(Protocol):
    """A text in splits, as token ids, whatever files they come from.

    Attributes:
        name: names the folders of what is made from it, such as `runs/<name>`.
        dictionary: its vocabulary.
    """

    name: str
    dictionary: Vocabulary

    def has(self, split: str) -> bool:
        """Whether the corpus has a split."""
        ...

    def stream(self, split: str) -> TokenStream:
        """The tokens of a split.

        Raises:
            InputError: the corpus has no such split.
        """
        ...

    def fingerprint(self, split: str) -> str:
        """Identifies the tokens of a split and the ends of its lines, whatever file holds them."""
        ...

    def text_size(self, split: str, scored: np.ndarray | None = None) -> TextSize | None:
        """The size of the raw text that a split's tokens stand for; None where it is not known.

        Args:
            scored: int64, the offsets of the tokens that count; None for all of them.
        """
        ...


class NeighborReader(Protocol):
    """Gives batches of a split the neighbours that a graph network reads."""

    def neighborhood(self, positions: np.ndarray) -> tuple:
        """Neighbours of tokens int64 `[B, T]`, -1 where padded, as a named tuple of tensors such as
        `datamodules.graphs.Neighborhood`."""
        ...

    def features_of(self, positions: np.ndarray) -> Tensor | None:
        """Stored features fp32 `[B, T, d]` of tokens int64 `[B, T]`; None where the model computes
        them itself."""
        ...


# -- search --------------------------------------------------------------------------------------


class Neighbors(NamedTuple):
    """The neighbours that a search found, `[Q, k]` each.

    Attributes:
        distances: fp32, by the retriever's metric.
        rows: int64, rows of the datastore, -1 where a neighbour is missing.
        values: unsigned, the token that followed each key, arbitrary where a neighbour is missing;
            None where the search does not know them.
    """

    distances: np.ndarray
    rows: np.ndarray
    values: np.ndarray | None = None


class Votes(NamedTuple):
    """What the neighbours of each query say of its target (Khandelwal et al., ICLR 2020, eq. 2).

    A neighbour's score is minus its squared distance, its inner product or its cosine.

    Attributes:
        log_probs: fp32 `[Q]`, log p_kNN of the target, -inf where no neighbour carries it.
        nearest: fp32 `[Q]`, score of the nearest neighbour, -inf where there is none.
        farthest: fp32 `[Q]`, score of the farthest neighbour found, inf where there is none.
    """

    log_probs: np.ndarray
    nearest: np.ndarray
    farthest: np.ndarray


class Retriever(Protocol):
    """Finds the nearest keys of a datastore, alone, in shards or together with other ranks.

    Attributes:
        metric: by which keys are compared.
        exact: whether distances are to the stored keys, and not to codes of them.
        communication: figures of this rank's traffic with the others since `begin_pass`; empty
            where it searches alone.
    """

    metric: Metric
    exact: bool
    communication: Mapping[str, float]

    def prepare(self) -> None:
        """Loads what the first search would otherwise wait for."""
        ...

    def begin_pass(self) -> None:
        """All ranks call this before they search."""
        ...

    def search(self, queries: np.ndarray, k: int, ordered: bool = True) -> Neighbors:
        """The k nearest keys of queries fp32 `[Q, d]`.

        Args:
            ordered: whether neighbours come nearest first and missing ones last; any order may be
                faster.
        """
        ...

    def vote(self, queries: np.ndarray, k: int, targets: np.ndarray, temperature: float) -> Votes:
        """What the k nearest keys of queries fp32 `[Q, d]` say of targets int64 `[Q]`, without a
        list of the neighbours. An entry into which others were merged has the votes of them all.

        Args:
            temperature: divides the scores.
        """
        ...

    def end_pass(self) -> None:
        """All ranks call this after their last query: answers the others' queries until no rank
        has any left."""
        ...


# -- memories and mixers -------------------------------------------------------------------------


class Opinion(NamedTuple):
    """What a memory says of n tokens.

    Attributes:
        log_probs: fp32 or fp64 `[n]`, natural-log probability of each target, -inf where it is 0;
            `[n, s]` from a memory with s distributions, each with a weight of its own.
        features: for mixers, `[n]` or `[n, f]` by name: what is known of each token before its
            target is known; infinite or NaN where nothing is.
    """

    log_probs: Tensor
    features: Mapping[str, Tensor] = {}

    def some(self, which: Tensor | slice) -> "Opinion":
        """The opinion on some of the tokens."""
        features = {name: column[which] for name, column in self.features.items()}
        return Opinion(self.log_probs[which], features)

    @staticmethod
    def joined(parts: Sequence["Opinion"]) -> "Opinion":
        """One or more opinions of the same memory as one."""
        features = {
            name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features
        }
        return Opinion(torch.cat([part.log_probs for part in parts]), features)


class Distribution(NamedTuple):
    """What a memory says of the next token in n places of a text.

    Attributes:
        ids: int64 `[n, m]`, tokens.
        probs: fp32 `[n, m]`, their probabilities, which add up where an id stands several times in
            a row; all other ids have probability 0.
        features: as in `Opinion`.
        rows: int64 `[n, m]`, the rows of the datastore, and so the tokens of the training text,
            that say so; -1 where none does. None from a memory that has none.
        scores: fp32 `[n, m]`, of the neighbours in these rows, larger is nearer and -inf where one
            is missing. None from a memory without neighbours.
    """

    ids: Tensor
    probs: Tensor
    features: Mapping[str, Tensor] = {}
    rows: Tensor | None = None
    scores: Tensor | None = None

    def some(self, which: Tensor | slice) -> "Distribution":
        """That of some of the places."""
        features = {name: column[which] for name, column in self.features.items()}
        own = (None if x is None else x[which] for x in (self.rows, self.scores))
        return Distribution(self.ids[which], self.probs[which], features, *own)


class Memory(Protocol):
    """Has an opinion on the next token. A subclass inherits defaults for what most do not need.

    Attributes:
        want: what it needs to know of each token.
        in_order: whether tokens must come in the order of the text.
        warm_up: where tokens must come in order, how many before a part of the text it must be
            asked about first, so that its opinion on the part is the same as after the whole text
            before it; None where nothing less will do, so that ranks cannot share the text.
        needs_tuning: whether it lacks a setting that `tune` finds; until then it gives every target
            probability 0.
        searches: queries that it has searched for since `begin_pass`.
        made_by: fingerprint of the model whose keys it searches; None where it searches none, or
            nobody knows.
    """

    want: Want
    in_order: bool
    warm_up: int | None = None
    needs_tuning: bool = False
    searches: int = 0
    made_by: str | None = None

    def prepare(self) -> None:
        """Loads what the first question would otherwise wait for."""

    def begin_pass(self, text: np.ndarray) -> None:
        """All ranks call this before a pass over a split: the memory forgets what it observed.

        Args:
            text: integers `[N]`, the tokens into which positions are offsets. An opinion depends
                on the tokens before its position alone. In generation they are `[S, L]`: S texts
                that know nothing of one another, each of them followed by -1; positions are then
                offsets into all of them, one after another, and tokens are written there as they
                become known.
        """

    def say(self, asked: Scored) -> Opinion:
        """Its opinion on the targets of some tokens, whose tensors are on the CPU."""
        ...

    def distribution(self, asked: Scored) -> Distribution:
        """What it thinks of the next token in some places; a target that follows on another one
        matters, the last of a text is arbitrary."""
        ...

    def observe(self, tokens: Tensor) -> None:
        """Learns the tokens int64 `[n]` that were asked about last, once they are known."""

    def follow(self, texts: Tensor) -> None:
        """From now on text i goes on as text `texts[i]` would have, for texts int64 `[S]`. Called
        in generation after all texts were asked about; of the tokens that were, only the last one
        of each text is observed afterwards."""

    def end_pass(self) -> None:
        """All ranks call this after their last token."""

    def tune(self) -> Opinion:
        """Finds the settings that it lacks by the tokens of the pass that has ended, those of the
        validation split, and returns its opinion on them, in the order of the text."""

    def state(self) -> dict[str, np.ndarray]:
        """What `tune` found, as arrays of numbers and strings, for `restore`."""
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over the `state` of a tuned memory."""


class Mixer(Protocol):
    """Weighs the language model and the memories for every token. A subclass inherits defaults for
    what most do not need.

    Its sources are the distributions of the language model and of the memories, in this order.
    Features are called `<memory>.<feature>`; the model's own are `lm.entropy`, in nats, and
    `lm.top_prob`, the largest probability.

    Attributes:
        needs_fitting: whether `fit` must be called before `weights`.
        want: what it needs to know of the model, for its features.
    """

    needs_fitting: bool
    want: Want = Want()

    def ask(self, memories: Mapping[str, Memory]) -> None:
        """Tells memories, before any pass, what it needs of their opinions beyond the usual."""

    def fit(self, opinions: Mapping[str, Opinion]) -> None:
        """Fits the weights to n tokens of the validation split, in the order of the text.

        Args:
            opinions: by the name of the source; the language model's comes first, as `lm`.
        """
        ...

    def weights(self, features: Mapping[str, Tensor], n: int) -> Tensor:
        """Weights fp64 `[n, sources]`, non-negative; each row sums to one.

        Args:
            features: `[n]` or `[n, f]` by `<memory>.<feature>`.
        """
        ...

    def state(self) -> dict[str, np.ndarray]:
        """What was fitted and how, as arrays of numbers and strings, for `restore`."""
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over the `state` of a fitted mixer."""
        ...


class Resources(Protocol):
    """What memories are made from; a missing product is made when it is asked for.

    Attributes:
        vocab_size: V.
        settings: by section, see `programs.settings.MemorySettings`.
        device: of the model.
    """

    vocab_size: int
    settings: Any
    device: torch.device

    def tokens(self, split: str) -> np.ndarray:
        """Token ids of a split `[N]`, unsigned, memory-mapped."""
        ...

    def made_from(self, split: str) -> Mapping[str, str]:
        """Fingerprints of a split's text (`corpus`) and of its vocabulary (`dictionary`): the
        identity of products that are made from its tokens alone."""
        ...

    def folder(self, name: str) -> Path:
        """The folder, beside the datastores, of a product that is made from tokens alone; it need
        not exist."""
        ...

    def datastore(self) -> Any:
        """The `Datastore` of the training split."""
        ...

    def retriever(self) -> Retriever:
        """The retriever of that datastore."""
        ...
