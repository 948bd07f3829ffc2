"""What the rooms of this project ask of one another: models score, retrievers search, memories say,
mixers weigh.

Whoever brings a model, a vocabulary, a retriever, a memory or a mixer of their own writes a class
with these methods, which need not be a subclass of anything here, and names it in one registry.
Shapes: n scored tokens, V vocabulary, Q queries, k neighbours, d width of a key.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

Metric = Literal["l2", "ip", "cosine"]
"""Squared Euclidean distance (small is near), inner product or cosine (large is near)."""
NProbe = int | Literal["auto"]
"""How many inverted lists a query visits, or `auto`: those not much farther than the nearest."""


# -- models --------------------------------------------------------------------------------------


class Want(NamedTuple):
    """What somebody needs to be told of each scored token.

    Attributes:
        keys: key types whose features are wanted, such as `last_ffn_input`.
        log_probs: whether log-probabilities are wanted; a datastore needs none.
        entropy: whether the entropy of the model's distribution is wanted.
        top: how many of the model's most probable tokens are wanted.
    """

    keys: tuple[str, ...] = ()
    log_probs: bool = True
    entropy: bool = False
    top: int = 0

    def and_also(self, other: "Want") -> "Want":
        """What satisfies both.

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
    """What a model says of n tokens, in row order; fields that were not wanted are None or empty.

    Attributes:
        positions: int64 `[n]`, offset of each target in its split.
        targets: int64 `[n]`.
        log_probs: fp32 `[n]`, natural-log probability of each target.
        keys: by key type `[n, d]`, the feature of each target's context.
        entropy: fp32 `[n]`, of the model's distribution, in nats.
        top_ids: int64 `[n, top]`, the most probable tokens, the most probable first.
        top_log_probs: fp32 `[n, top]`, their natural-log probabilities.
        lm_log_probs: fp32 `[n]`, what the language model that this one stands on says itself; None
            for one that stands on none.
    """

    positions: Tensor
    targets: Tensor
    log_probs: Tensor | None = None
    keys: Mapping[str, Tensor] = {}
    entropy: Tensor | None = None
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    lm_log_probs: Tensor | None = None

    def on_cpu(self) -> "Scored":
        """The same in the memory of the CPU, keys in fp32."""
        keys = {name: key.float().cpu() for name, key in self.keys.items()}
        others = (None if x is None else x.cpu() for x in self._replace(keys=None))
        return Scored(*others)._replace(keys=keys)

    @staticmethod
    def joined(parts: Sequence["Scored"]) -> "Scored":
        """Tokens of one or more, that were wanted alike, as one."""
        keys = {name: torch.cat([part.keys[name] for part in parts]) for name in parts[0].keys}
        columns = zip(*(part._replace(keys=None) for part in parts), strict=True)
        joined = (None if column[0] is None else torch.cat(column) for column in columns)
        return Scored(*joined)._replace(keys=keys)


class Batch(Protocol):
    """Rows of a split, padded on the right, `[B, T]` each; see `datamodules.lm.LMBatch`.

    Attributes:
        tokens: int64, what the model reads.
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
        max_target_positions: longest row of tokens that it reads.
        fingerprint: identifies the model's content: whatever was made by it is refused by others.
    """

    vocab_size: int
    max_target_positions: int
    fingerprint: str

    def key_width(self, key_type: str) -> int:
        """Width d of the keys of a type.

        Raises:
            InputError: the model has no such feature.
        """
        ...

    def score(self, batch: Batch, want: Want) -> Scored:
        """What is wanted of the batch's scored tokens. Changes nothing of the model."""
        ...


@runtime_checkable
class Backbone(LanguageModel, Protocol):
    """What a graph network stands on: a language model, and its parts.

    Attributes:
        width: of its hidden vectors, and of its word vectors.
    """

    width: int

    def hidden(
        self, tokens: Tensor, key_types: Sequence[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of tokens int64 `[B, T]`: what the softmax reads, `[B, T, width]`, and features by key
        type, `[B, T, d]`."""
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
    """Between text and token ids.

    Attributes:
        pad: id of padding.
        eos: id that ends a line or a document.
        fingerprint: identifies the vocabulary: equal ids mean equal tokens.
    """

    pad: int
    eos: int
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
        tokens: integers `[N]`, ids of all lines one after another, usually memory-mapped.
        line_starts: int64 `[lines + 1]`; line i is `tokens[line_starts[i] : line_starts[i + 1]]`.
    """

    tokens: np.ndarray
    line_starts: np.ndarray


class Corpus(Protocol):
    """A text that has been split and turned into token ids, whatever files these come from.

    Attributes:
        name: for folders of what is made from it, such as `runs/<name>`.
        dictionary: its vocabulary.
    """

    name: str
    dictionary: Vocabulary

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        ...

    def stream(self, split: str) -> TokenStream:
        """The tokens of a split.

        Raises:
            InputError: no such split.
        """
        ...

    def fingerprint(self, split: str) -> str:
        """Identifies the tokens of a split and where its lines end, whatever file they are in."""
        ...


class NeighborReader(Protocol):
    """Gives batches of a split what a graph network reads besides the text."""

    def neighborhood(self, positions: np.ndarray) -> tuple:
        """Neighbours of tokens int64 `[B, T]`, -1 where padded, as a named tuple of tensors such as
        `datamodules.graphs.Neighborhood`."""
        ...

    def features_of(self, positions: np.ndarray) -> Tensor | None:
        """Stored features of tokens int64 `[B, T]`, fp32 `[B, T, d]`; None where the model computes
        them itself."""
        ...


# -- search --------------------------------------------------------------------------------------


class Neighbors(NamedTuple):
    """What a search found, each `[Q, k]`.

    Attributes:
        distances: fp32, by the retriever's metric.
        rows: int64, rows of the datastore, -1 where missing.
        values: unsigned, the token that followed each, where the search knows it; any where
            missing.
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
        farthest: fp32 `[Q]`, score of the farthest neighbour that is not missing, inf where there
            is none.
    """

    log_probs: np.ndarray
    nearest: np.ndarray
    farthest: np.ndarray


class Retriever(Protocol):
    """Finds the nearest keys of a datastore, alone, in shards or together with other ranks.

    Attributes:
        metric: what keys are compared by.
        exact: whether its distances are those to the stored keys, not to codes of them.
        communication: of this rank since `begin_pass`, figures of what went to and from the others;
            empty where it searches alone.
    """

    metric: Metric
    exact: bool
    communication: Mapping[str, float]

    def prepare(self) -> None:
        """Loads what a first search would wait for."""
        ...

    def begin_pass(self) -> None:
        """All ranks call this before they search."""
        ...

    def search(self, queries: np.ndarray, k: int, ordered: bool = True) -> Neighbors:
        """The k nearest keys of queries fp32 `[Q, d]`.

        Args:
            ordered: nearest first, the missing last; otherwise in any order, which may be faster.
        """
        ...

    def vote(self, queries: np.ndarray, k: int, targets: np.ndarray, temperature: float) -> Votes:
        """What the k nearest keys of queries fp32 `[Q, d]` say of targets int64 `[Q]`; the
        neighbours need not be put together.

        Args:
            temperature: divides the scores.
        """
        ...

    def end_pass(self) -> None:
        """All ranks call this when they have searched all of theirs: searches for the others until
        none has any left."""
        ...


# -- memories and mixers -------------------------------------------------------------------------


class Opinion(NamedTuple):
    """What a memory says of n tokens.

    Attributes:
        log_probs: fp32 or fp64 `[n]`, natural-log probability of each target; -inf where the memory
            gives it none. `[n, s]` of a memory that has s distributions, each of which is weighed.
        features: by name `[n]` or `[n, f]`, what is known of each token before its target is, for
            mixers; infinite or NaN where there is nothing to know.
    """

    log_probs: Tensor
    features: Mapping[str, Tensor] = {}


class Memory(Protocol):
    """Has an opinion on the next token. Deriving from this class gives what most need not do.

    Attributes:
        want: what it needs to be told of each token.
        in_order: whether tokens must come in the order of the text.
        warm_up: how many tokens before a part of the text it must have been asked about for its
            opinion on that part to be as if it had been asked about all that came before.
    """

    want: Want
    in_order: bool
    warm_up: int = 0

    def prepare(self) -> None:
        """Loads what a first question would wait for."""

    def begin_pass(self, text: np.ndarray) -> None:
        """All ranks call this before a pass over a split: what was observed is forgotten.

        Args:
            text: integers `[N]`, the tokens that positions are offsets into; what a memory says of
                a position depends on those before it alone, so that in generation those from there
                on may be anything.
        """

    def say(self, asked: Scored) -> Opinion:
        """Its opinion on the targets of some tokens, which lie on the CPU."""
        ...

    def distribution(self, asked: Scored) -> tuple[Tensor, Tensor]:
        """Token ids int64 `[n, m]` and their probabilities fp32 `[n, m]`; of an id that stands
        there several times they add up. All others have probability 0."""
        ...

    def observe(self, tokens: Tensor) -> None:
        """Learns tokens int64 `[n]` that have become known, in the order of the text."""

    def end_pass(self) -> None:
        """All ranks call this when they have asked for all of their tokens."""


class Mixer(Protocol):
    """Weighs the language model and the memories for every token. Deriving from this class gives
    what most need not say.

    The sources that it weighs are the distributions of the language model and of the memories, in
    this order. Features are called `<memory>.<feature>`; the model's own are `lm.entropy`, in nats,
    and `lm.top_prob`, the largest probability.

    Attributes:
        needs_fitting: whether `fit` must be called before `weights`.
        want: what it needs to be told by the model for its own features.
    """

    needs_fitting: bool
    want: Want = Want()

    def fit(self, opinions: Mapping[str, Opinion]) -> None:
        """Fits the weights to n tokens of the validation split, in the order of the text.

        Args:
            opinions: by source, that of the language model first, under `lm`.
        """
        ...

    def weights(self, features: Mapping[str, Tensor], n: int) -> Tensor:
        """Weights fp64 `[n, sources]`, not negative, a row's sum being one.

        Args:
            features: by `<memory>.<feature>`, `[n]` or `[n, f]` each.
        """
        ...

    def state(self) -> dict[str, np.ndarray]:
        """What was fitted and how, as arrays of numbers and strings: what `restore` takes."""
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Becomes the mixer whose `state` this was."""
        ...


class Resources(Protocol):
    """What a memory is made of; whatever is missing is made when it is asked for.

    Attributes:
        vocab_size: V.
        settings: by section, see `programs.settings.MemorySettings`.
        device: the model's.
    """

    vocab_size: int
    settings: Any
    device: torch.device

    def tokens(self, split: str) -> np.ndarray:
        """Token ids of a split `[N]`, unsigned, memory-mapped."""
        ...

    def made_from(self, split: str) -> Mapping[str, str]:
        """Fingerprints of a split's text (`corpus`) and of its vocabulary (`dictionary`), which
        identify what is made from its tokens alone."""
        ...

    def folder(self, name: str) -> Path:
        """Where a product of that name lies that is made from tokens alone, beside the datastores;
        it need not be there."""
        ...

    def datastore(self) -> Any:
        """The `Datastore` of the training split."""
        ...

    def retriever(self) -> Retriever:
        """The search of that datastore."""
        ...
