"""Everything that `--knn.*` and `--neighbors.*` set, and the checks that need no file."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from neighborlm.common.contracts import NProbe
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.automaton import AutomatonSettings
from neighborlm.retrieval.memories.recent import RecentSettings
from neighborlm.retrieval.search import Search


@dataclass
class KNNSettings:
    """How the datastore is made, searched and mixed.

    Args:
        datastore: its directory; by default datastores/<corpus>/<split>.
        index: `auto` (by size), `flat` (exact), `torch` (exact, on the model's device), a faiss
            factory string or the path of an index.
        k: neighbours per token.
        lmbda: weight of p_kNN, or `auto`: tuned with the temperature on the validation split.
        temperature: divides the scores of the neighbours; `auto` is 1 where a number is given as
            lmbda, and tuned where none is.
        nprobe: inverted lists to visit, for indexes that have them; `auto` visits 8 to 32, those
            that are not much farther than the nearest one.
        metric: squared Euclidean distance, inner product or cosine.
        distances: `exact` computes them again from the stored keys, `index` takes the index's own.
        key_type: last_ffn_input, last_hidden, layer:<i>:ffn_input or layer:<i>:output.
        rescore_key_type: score what the keys have found by the distances between these instead,
            such as `gnn`.
        dtype: of the stored keys.
        similarity: what exact distances are computed with, where it is not the metric.
        missing: neighbours that an index does not find are left out; `last_row` gives their votes
            to the last row of the datastore, as the original program does.
        size: rows of a datastore of the original program (raw maps); needs `dim` too.
        dim: width of its keys.
        min_context: leave out keys of tokens with less left context than this.
        shards: directories that a new datastore is dealt into; one that is there is used as it is.
        placement: of its rows: `contiguous` pieces, or blocks dealt `round_robin`.
        shard: make and use this one of the shards alone, from 0: where hosts share no file system,
            each makes its own.
        cache: directory that keeps what is retrieved for each split: other values of lmbda and
            temperature, and of k up to this one, then need neither the model nor a search.
    """

    datastore: str | None = None
    index: str = "auto"
    k: int = 1024
    lmbda: float | Literal["auto"] = "auto"
    temperature: float | Literal["auto"] = "auto"
    nprobe: NProbe = "auto"
    metric: Literal["l2", "ip", "cosine"] = "l2"
    distances: Literal["exact", "index"] = "exact"
    key_type: str = "last_ffn_input"
    rescore_key_type: str | None = None
    dtype: Literal["fp16", "fp32"] = "fp16"
    similarity: Literal["l2", "ip", "cosine"] | None = None
    missing: Literal["left_out", "last_row"] = "left_out"
    size: int | None = None
    dim: int | None = None
    min_context: int = 0
    shards: int = 1
    placement: Literal["contiguous", "round_robin"] = "contiguous"
    shard: int | None = None
    cache: str | None = None

    def search(self, device: str | torch.device = "cpu") -> Search:
        """How the datastore is searched.

        Args:
            device: the model's.
        """
        return Search(self.index, self.metric, self.nprobe, device)

    def check(self) -> None:
        """Raises InputError where a value alone cannot be right."""
        if self.lmbda != "auto" and not 0 <= self.lmbda <= 1:
            raise InputError(f"--knn.lmbda is {self.lmbda}; expected auto or a number from 0 to 1")
        if self.temperature != "auto" and not 0 < self.temperature < math.inf:
            raise InputError(
                f"--knn.temperature is {self.temperature}; expected auto or a finite number, more "
                "than 0"
            )
        check_counts("knn", self)
        if self.similarity is not None and self.distances == "index":
            raise InputError(
                f"--knn.similarity {self.similarity} needs --knn.distances exact, not index"
            )
        if self.rescore_key_type is not None and self.distances == "index":
            raise InputError(
                f"--knn.rescore_key_type {self.rescore_key_type} needs --knn.distances exact, not "
                "index"
            )
        check_shard("knn", self.shard, self.shards)
        if self.min_context < 0:
            raise InputError(f"--knn.min_context is {self.min_context}; expected at least 0")


@dataclass
class NeighborSettings:
    """What the graph network of GNN-LM sees of each token's neighbours.

    Args:
        k: neighbours per token.
        left_context: tokens before each neighbour.
        right_context: tokens after it.
        key_type: of the keys that are compared, and of the neighbours' features.
        metric: cosine, inner product or squared Euclidean distance.
        index: `auto` (by size), `flat` or `torch` (exact) or a faiss factory string; `imported` for
            tables of the original program (see retrieval/neighbors.py).
        nprobe: inverted lists to visit, for indexes that have them, or `auto`.
        features: of neighbours: `codes`, the keys quantised; `keys` as they are; `embeddings`, word
            vectors of the tokens.
        codec: faiss string of the codes, by default OPQ and PQ with a byte for eight dimensions;
            `imported` for those of the original program (see retrieval/codec.py).
        token_features: of the tokens themselves: `stored`, from the split's datastore, whose keys
            must be last_hidden, or `online`, computed by the LM; by default stored in training,
            where the keys are, and online in evaluation.
        exclude_window: in training, neighbours nearer than this to the token or to one that it can
            be seen by are left out; by default all that could show it.
        dtype: of the stored keys.
        shards: directories that new datastores are dealt into, with their tables and codes;
            one that is there is used as it is.
        placement: of their rows, see `KNNSettings`.
        shard: the one of the training split's shards that this host has, from 0, where hosts share
            no file system: what lies in the others is exchanged batch by batch.
        datastores: their folder; by default datastores/<corpus>.
    """

    k: int = 32
    left_context: int = 2
    right_context: int = 2
    key_type: str = "last_hidden"
    metric: Literal["l2", "ip", "cosine"] = "cosine"
    index: str = "auto"
    nprobe: NProbe = 32
    features: Literal["codes", "keys", "embeddings"] = "codes"
    codec: str | None = None
    token_features: Literal["stored", "online"] | None = None
    exclude_window: int | None = None
    dtype: Literal["fp16", "fp32"] = "fp16"
    shards: int = 1
    placement: Literal["contiguous", "round_robin"] = "contiguous"
    shard: int | None = None
    datastores: str | None = None

    def check(self) -> None:
        """Raises InputError where a value alone cannot be right."""
        check_counts("neighbors", self)
        for name in ("left_context", "right_context", "exclude_window"):
            if (getattr(self, name) or 0) < 0:
                value = getattr(self, name)
                raise InputError(f"--neighbors.{name} is {value}; expected at least 0")
        check_shard("neighbors", self.shard, self.shards)

    @property
    def knn(self) -> KNNSettings:
        """How the datastores that neighbours come from are made and searched."""
        return KNNSettings(
            index=self.index,
            k=self.k,
            nprobe=self.nprobe,
            metric=self.metric,
            key_type=self.key_type,
            dtype=self.dtype,
            shards=self.shards,
            placement=self.placement,
            shard=self.shard,
        )

    def codec_for(self, dim: int) -> str:
        """The codec's factory string for keys of a width."""
        bytes_a_row = max(dim // 8, 1)
        return self.codec or f"OPQ{bytes_a_row}_{dim},PQ{bytes_a_row}"


@dataclass
class MemorySettings:
    """What the memories of an evaluation go by, a section of the command line each.

    Args:
        knn: of the memory `knn`, and of every other that searches the datastore.
        recent: of the memory `recent`.
        automaton: of the memory `automaton`.
    """

    knn: KNNSettings = field(default_factory=KNNSettings)
    recent: RecentSettings = field(default_factory=RecentSettings)
    automaton: AutomatonSettings = field(default_factory=AutomatonSettings)

    def check(self) -> None:
        """Raises InputError where a value alone cannot be right."""
        for section in (self.knn, self.recent, self.automaton):
            section.check()


def check_counts(section: str, settings: KNNSettings | NeighborSettings) -> None:
    """Raises InputError where there are none of something."""
    for name in ("k", "nprobe", "shards"):
        value = getattr(settings, name)
        if value != "auto" and value < 1:
            auto = "auto or " if name == "nprobe" else ""
            raise InputError(f"--{section}.{name} is {value}; expected {auto}at least 1")


def check_shard(section: str, shard: int | None, shards: int) -> None:
    """Raises InputError where there is no shard of this number."""
    if shard is not None and not 0 <= shard < shards:
        raise InputError(
            f"--{section}.shard is {shard} and --{section}.shards {shards}; expected a number from "
            "0 to one less than that of the shards"
        )
