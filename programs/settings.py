"""The settings `--knn.*` and `--neighbors.*`, and those of all memories together, with the checks
that need no file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from neighborlm.common.contracts import NProbe
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.adaptive import AdaptiveSettings
from neighborlm.retrieval.memories.automaton import AutomatonSettings
from neighborlm.retrieval.memories.recent import RecentSettings
from neighborlm.retrieval.search import Search


@dataclass
class KNNSettings:
    """How the datastore is made, searched and mixed.

    Args:
        datastore: directory of the datastore, by default datastores/<run>/<split>; another one to
            use what was made elsewhere, the original program's raw maps too.
        index: what searches: `auto`, the default, chooses by size; `flat` is exact, `torch` too, on
            the model's device; or a faiss factory string, or the path of an index.
        k: neighbours of each token that vote; fewer are faster, and better where only the nearest
            are like the context.
        lmbda: weight of p_kNN; `auto`, the default, tunes it with the temperature on the validation
            split; a number compares with published figures, or saves the tuning.
        temperature: divides the scores of the neighbours; a higher one lets farther neighbours
            weigh more. `auto`, the default, is 1 where lmbda is a number, and tuned where it is
            not.
        nprobe: inverted lists that a query visits, where the index has them; `auto`, the default,
            visits the near ones, 8 to 32. A larger number finds more and takes longer.
        metric: how keys are compared: squared Euclidean distance, inner product or cosine; l2 is
            the papers'.
        distances: `exact`, the default, computes distances from the stored keys; `index` takes the
            index's own, which saves reading keys from disk.
        key_type: which vector is the key: last_ffn_input (the default and the paper's best),
            last_hidden, layer:<i>:ffn_input, layer:<i>:output, or gnn, a graph network's output;
            `neighborlm recall` compares them.
        rescore_key_type: weigh what the keys have found by distances between vectors of this type
            instead, such as gnn; none by default.
        dtype: numbers of the stored keys; fp32 takes twice the disk, for where half precision
            hurts.
        similarity: what exact distances are computed with; by default the metric. For the original
            program's --knn-sim-func, such as ip over an l2 index.
        missing: neighbours that an index does not find are left out; last_row lets the last row of
            the datastore vote instead, only to compare with the original program.
        size: rows of a datastore of the original program (raw maps), which needs `dim` too.
        dim: width of the keys of a datastore of the original program, see size.
        min_context: leave out keys of tokens with less left context than this; 0, the default,
            keeps all.
        shards: directories that a new datastore is dealt into; more than 1 for several disks or
            hosts. A datastore that exists is used as it is.
        placement: how the rows of a datastore in shards are dealt: contiguous pieces, or blocks
            round_robin, with which hosts send each other less.
        shard: make and use this one of the shards alone, numbered from 0; for hosts that share no
            file system, each of which makes its own.
        cache: directory that keeps what is retrieved of each split, and what other memories say of
            it; another lmbda, temperature, mixer or smaller k then needs neither the model nor a
            search. None by default.
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
        k: neighbours of each token; more cost time and memory in proportion.
        left_context: tokens before each neighbour that the network sees.
        right_context: tokens after each neighbour that the network sees.
        key_type: which vector is compared, and stands for a neighbour: last_hidden (the default),
            last_ffn_input, layer:<i>:ffn_input or layer:<i>:output.
        metric: how keys are compared: cosine (the default), inner product or squared Euclidean
            distance. With last_ffn_input and l2 the datastores of kNN-LM are used as they are.
        index: what searches: `auto`, the default, chooses by size; flat and torch are exact; or a
            faiss factory string. `imported` takes tables of the original program
            (`neighborlm neighbors`).
        nprobe: inverted lists that a query visits, where the index has them, or `auto`; more find
            more and take longer.
        features: what stands for a neighbour: its key quantised (codes, the default), as it is
            stored (keys), or the word vector of its token (embeddings). keys lose nothing and take
            many times the memory.
        codec: faiss factory string of the codes; by default OPQ and PQ with a byte for eight
            dimensions. `neighborlm codec compare` shows what others lose; `imported` takes the
            codes of the original program (`neighborlm codec import`).
        token_features: features of the tokens themselves: stored, from the split's datastore, whose
            keys must be last_hidden, or online, computed by the LM. By default stored in training,
            where the keys allow it, and online in evaluation.
        exclude_window: in training, neighbours nearer than this many tokens to a token that could
            see them are left out; by default all that could show what is to be predicted.
        dtype: numbers of the stored keys; fp32 takes twice the disk, for where half precision
            hurts.
        shards: directories that new datastores are dealt into, with their tables and codes; more
            than 1 for several disks or hosts. Datastores that exist are used as they are.
        placement: how the rows of datastores in shards are dealt: contiguous or round_robin; see
            `--knn.placement`.
        shard: the one of the training split's shards that this host has, numbered from 0, where
            hosts share no file system: what lies in the others is exchanged batch by batch.
        datastores: folder of the datastores; by default datastores/<run of the LM>.
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
class PretrainedSettings:
    """Which model of transformers is read, and how.

    Args:
        pretrained: a directory that transformers has saved a causal language model to
            (config.json, *.safetensors), or a name on the Hugging Face hub, which transformers
            looks for in its own cache first.
        revision: branch, tag or commit of a name on the hub.
        dtype: numbers of the weights in memory: `auto`, the default, as the files have; float32
            computes without rounding and takes more memory.
        device_map: `auto` spreads a model that is too large for one device over all there are; by
            default it is where Lightning puts it.
        trust_remote_code: run the Python code that comes with the model; only for authors whose
            code you have read.
        allow_pickle: read weights that are not safetensors too; by default those are refused, as a
            pickle can run code.
    """

    pretrained: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass
class MemorySettings:
    """The settings of an evaluation's memories, each a section of the command line.

    Args:
        knn: of the memory `knn`, and of every other that searches the datastore.
        recent: of the memory `recent`.
        automaton: of the memory `automaton`.
        adaptive: of the memory `adaptive`.
    """

    knn: KNNSettings = field(default_factory=KNNSettings)
    recent: RecentSettings = field(default_factory=RecentSettings)
    automaton: AutomatonSettings = field(default_factory=AutomatonSettings)
    adaptive: AdaptiveSettings = field(default_factory=AdaptiveSettings)

    @classmethod
    def kinds(cls) -> dict[str, type]:
        """The class of each section, by its name."""
        return {section.name: section.default_factory for section in fields(cls)}

    @classmethod
    def of(cls, sections: Mapping[str, Mapping[str, Any]]) -> "MemorySettings":
        """From settings by section; those that are missing have their defaults.

        >>> MemorySettings.of({"knn": {"k": 8}}).knn.k
        8
        """
        kinds = cls.kinds()
        return cls(**{name: kinds[name](**of) for name, of in sections.items() if name in kinds})

    def check(self) -> None:
        """Raises InputError where a value alone cannot be right."""
        for name in self.kinds():
            getattr(self, name).check()


def check_counts(section: str, settings: KNNSettings | NeighborSettings) -> None:
    """Raises InputError where a count is less than one."""
    for name in ("k", "nprobe", "shards"):
        value = getattr(settings, name)
        if value != "auto" and value < 1:
            auto = "auto or " if name == "nprobe" else ""
            raise InputError(f"--{section}.{name} is {value}; expected {auto}at least 1")


def check_shard(section: str, shard: int | None, shards: int) -> None:
    """Raises InputError where no shard has this number."""
    if shard is not None and not 0 <= shard < shards:
        raise InputError(
            f"--{section}.shard is {shard} and --{section}.shards {shards}; expected a number from "
            "0 to one less than that of the shards"
        )
