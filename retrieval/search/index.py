"""faiss indexes over a datastore: choosing and opening them.

`<name>.faiss` lies beside the keys, with `<name>.faiss.json` as its manifest; see
`retrieval.search.building`. Where a datastore lies in shards, each has an index of its own.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from neighborlm.common.errors import InputError
from neighborlm.retrieval.engine.inverted_lists import stores_halves
from neighborlm.retrieval.engine.list_search import ListSearch
from neighborlm.retrieval.engine.probing import NProbe, Probing
from neighborlm.retrieval.memories.knn import Votes
from neighborlm.retrieval.search.retriever import (
    FAISS_METRICS,
    FlatRetriever,
    Metric,
    Retriever,
    faiss_reason,
    normalized,
)
from neighborlm.retrieval.search.sharded_retriever import ShardedRetriever
from neighborlm.retrieval.search.torch_retriever import TorchRetriever
from neighborlm.retrieval.store.artifact import Artifact, Format, refuse_mismatch
from neighborlm.retrieval.store.datastore import Datastore

FORMAT = Format("index", 2, libraries=("faiss", "numpy"))
NUMBERED_RIGHTLY = 2
"""The first version whose parts are merged right: `merge_ondisk` shifts the ids of each part by its
own size in place of the sizes of those before it, which only comes to the same where all are equal.
"""
NOT_BUILT = ("flat", "torch")
"""What reads the keys themselves."""


def auto_factory(n_keys: int, dim: int, memory_bytes: int | None = None) -> str:
    """The index that `auto` stands for.

    Exact search while reading every key is cheap; then inverted lists of half-precision keys,
    of 8-bit keys, and of one-bit codes as memory binds. About 2 sqrt(n) lists.

    Args:
        memory_bytes: what the index may take; by default a quarter of the machine's memory.
    """
    if memory_bytes is None:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    if n_keys * dim <= 1 << 22:
        return "flat"
    lists = 2 ** round(math.log2(2 * math.sqrt(n_keys)))
    if n_keys * dim * 2 <= memory_bytes:
        return f"IVF{lists},SQfp16"
    if n_keys * dim <= memory_bytes:
        return f"IVF{lists},SQ8"
    return f"RR{dim},IVF{lists},RaBitQfs"


def artifact_of(path: Path) -> Artifact:
    """The index of a file as a product."""
    return Artifact.file(FORMAT, path)


def index_path(datastore: Datastore, factory: str, metric: Metric) -> Path:
    """Where the index of a factory string lies."""
    return datastore.path / f"{re.sub(r'[^A-Za-z0-9.]+', '_', factory)}-{metric}.faiss"


class FaissRetriever(Retriever):
    """A built index; see `Retriever`.

    Args:
        index: trained and filled; its ids count the datastore's keys.
        datastore: what it was built from.
        metric: what it was built with.
        nprobe: inverted lists to visit, where the index has any. Where something else than
            transformations of the queries lies before them, `auto` visits the most it would.
    """

    def __init__(
        self, index: faiss.Index, datastore: Datastore, metric: Metric, nprobe: NProbe
    ) -> None:
        self.index = index
        self.datastore = datastore
        self.metric = metric
        ivf = faiss.try_extract_index_ivf(index)
        self.probing: Probing | None = None
        self.lists: ListSearch | None = None
        if ivf is not None:
            ivf = faiss.downcast_index(ivf)
            probing = Probing(ivf, nprobe)
            if isinstance(index, faiss.IndexPreTransform) or index.this == ivf.this:
                self.probing = probing
                if ListSearch.serves(ivf):
                    self.lists = ListSearch(ivf, probing)

        # An index of the original program counts rows, zero ones at the end included.
        self.counts_rows = index.ntotal != datastore.n_keys
        halves = datastore.keys.dtype == np.float16 and metric != "cosine"
        as_they_are = stores_halves(index) and halves and not index.by_residual
        flat = isinstance(index, faiss.IndexFlat) and metric != "l2"  # see FlatRetriever
        self.exact = as_they_are or flat or isinstance(index, faiss.IndexIVFFlat)

    def search(
        self, queries: np.ndarray, k: int, ordered: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Retriever.search`."""
        queries = normalized(queries, self.metric)
        shared = self._shared(queries)
        if shared is None:
            distances, ids = self._by_faiss(queries, k)
        else:
            distances, ids = self.lists.search(shared, k, ordered)
        return distances, self._rows_of(ids)

    def prepare(self) -> None:
        """See `Retriever.prepare`."""
        if self.lists is not None:
            one = np.zeros((1, self.lists.ivf.d), dtype=np.float32)
            self.lists.search(one, 1)
            votes = Votes(np.zeros(1, dtype=np.int64), 1.0, self.metric, np.zeros_like)
            self.lists.vote(one, 1, votes, votes.values_of)

    def vote(self, queries: np.ndarray, k: int, votes: Votes) -> None:
        """See `Retriever.vote`."""
        hidden = self.counts_rows and len(self.datastore.masked)  # they count among the k
        shared = None if hidden else self._shared(normalized(queries, self.metric))
        if shared is None:
            super().vote(queries, k, votes)
            return

        def values_of(ids: np.ndarray) -> np.ndarray:
            return votes.values_of(self._rows_of(ids))

        self.lists.vote(shared, k, votes, values_of)

    def _shared(self, queries: np.ndarray) -> np.ndarray | None:
        """The queries as the lists see them, if there are enough of them to share the lists."""
        if self.lists is None or not self.lists.pays(len(queries)):
            return None
        return self._transformed(queries)

    def _transformed(self, queries: np.ndarray) -> np.ndarray:
        if isinstance(self.index, faiss.IndexPreTransform):
            for number in range(self.index.chain.size()):
                queries = self.index.chain.at(number).apply(queries)
        return queries

    def _by_faiss(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self.probing is None or self.probing.slack == np.inf:
            return self.index.search(queries, k)
        queries = self._transformed(queries)
        distances, lists = self.probing.nearest(queries, faiss.omp_get_max_threads())
        return self.probing.ivf.search_preassigned(queries, k, lists, distances)

    def _rows_of(self, ids: np.ndarray) -> np.ndarray:
        if not self.counts_rows:
            return self.datastore.rows_of(ids)
        if len(self.datastore.masked):
            return np.where(np.isin(ids, self.datastore.masked), -1, ids)
        return ids


def open_retriever(
    datastore: Datastore,
    index: str,
    metric: Metric,
    nprobe: NProbe,
    device: str | torch.device = "cpu",
) -> Retriever:
    """Opens what `--knn.index` names; of a datastore in shards the index of the whole where there
    is one, and else those of the shards.

    Args:
        index: `flat`, `torch`, `auto`, a factory string that was built before, or the path of an
            index.
        device: where `torch` computes.

    Raises:
        InputError: no such index, or one of another datastore, metric or dimension.
    """
    factory = resolve(datastore, index)
    if factory == "flat":
        return FlatRetriever(datastore, metric)
    if factory == "torch":
        return TorchRetriever(datastore, metric, device)
    if lies_in_shards(datastore, index, metric):
        return open_shards(datastore, range(datastore.n_shards), index, metric, nprobe)
    path = Path(index) if is_path(index) else index_path(datastore, factory, metric)
    if not path.is_file():
        raise InputError(f"{path}: no such index; --build_index or --knnlm makes it")
    artifact = artifact_of(path)
    if artifact.exists():
        expected = {
            "metric": metric,
            "dim": datastore.dim,
            "keys": datastore.n_keys,
            "datastore": datastore.fingerprint,
        }
        check_numbers(path, artifact.open(expected))
    opened, n_keys = read_index(path), datastore.n_keys
    found = {
        "dimension": opened.d,
        "number of keys": n_keys if opened.ntotal == len(datastore) else opened.ntotal,
        "faiss metric type": opened.metric_type,
    }
    at_hand = {
        "dimension": datastore.dim,
        "number of keys": n_keys,
        "faiss metric type": FAISS_METRICS[metric],
    }
    refuse_mismatch(path, found, at_hand)
    return FaissRetriever(opened, datastore, metric, nprobe)


def check_numbers(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses an index that an earlier version has merged, see `NUMBERED_RIGHTLY`."""
    merged = path.with_name(f"{path.name}.lists").is_file()
    if merged and manifest["version"] < NUMBERED_RIGHTLY:
        raise InputError(
            f"{path}: was merged by an earlier version of this program, which gave many keys wrong "
            "numbers; remove it and its .lists, and it is built anew"
        )


def lies_in_shards(datastore: Datastore, index: str, metric: Metric) -> bool:
    """Whether shards are what `--knn.index` searches: there is no index of the whole."""
    if datastore.n_shards == 1 or is_path(index):
        return False
    factory = resolve(datastore, index)
    return factory in NOT_BUILT or not index_path(datastore, factory, metric).is_file()


def open_shards(
    datastore: Datastore,
    numbers: Iterable[int],
    index: str,
    metric: Metric,
    nprobe: NProbe,
    device: str | torch.device = "cpu",
) -> ShardedRetriever:
    """Opens what `--knn.index` names of some shards.

    Args:
        datastore: the whole, or the shard itself where only that is asked for.
        numbers: of the shards.
        index, metric, nprobe, device: see `open_retriever`.

    Raises:
        InputError: a shard has no such index, or one that did not begin with the trained index of
            the others.
    """
    factory = resolve(datastore, index)
    shards = [datastore.shard(number) for number in numbers]
    opened = [open_retriever(shard, factory, metric, nprobe, device) for shard in shards]
    trained = None
    if factory not in NOT_BUILT:
        artifacts = [artifact_of(index_path(shard, factory, metric)) for shard in shards]
        trained = artifacts[0].open().get("trained")
        for artifact in artifacts:
            artifact.open({"trained": trained})
    return ShardedRetriever(opened, metric, trained)


def is_path(index: str) -> bool:
    """Whether `--knn.index` names a file and not a factory string; files called `auto`, `flat`
    or `torch` need a folder before their name."""
    if index in ("auto", *NOT_BUILT):
        return False
    return index.endswith((".faiss", ".index")) or os.sep in index or Path(index).is_file()


def resolve(datastore: Datastore, index: str) -> str:
    """`auto` replaced by the factory string it stands for, which is that of the whole where the
    datastore is a part; everything else as it is."""
    n_keys = datastore.whole["rows"] - datastore.whole["masked"]
    return auto_factory(n_keys, datastore.dim) if index == "auto" else index


def read_index(path: Path) -> faiss.Index:
    """Opens an index file, memory-mapped where its type allows.

    Raises:
        InputError: not a faiss index.
    """
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        ivf = faiss.try_extract_index_ivf(index)
        lists = None if ivf is None else faiss.downcast_InvertedLists(ivf.invlists)
        if isinstance(lists, faiss.OnDiskInvertedLists) and lists.ptr is None:
            # Lists in a file of their own are mapped without being asked for.
            moved = 0 if Path(lists.filename).is_file() else faiss.IO_FLAG_ONDISK_SAME_DIR
            index = faiss.read_index(str(path), faiss.IO_FLAG_READ_ONLY | moved)
        return index
    except RuntimeError as error:
        raise InputError(
            f"{path}: cannot be read as a faiss index ({faiss_reason(error)})"
        ) from None


def make_index(dim: int, factory: str, metric: Metric) -> faiss.Index:
    """An empty index.

    Raises:
        InputError: faiss does not know the factory string.
    """
    try:
        index = faiss.index_factory(dim, factory, FAISS_METRICS[metric])
    except RuntimeError as error:
        raise InputError(
            f"--knn.index is {factory!r}; expected flat, auto, torch, the path of an index or a "
            f"faiss factory string that suits dimension {dim} ({faiss_reason(error)})"
        ) from None
    if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
        raise InputError(f"--knn.index is {factory!r}; expected a type that counts keys itself")
    if stores_halves(index):
        index.by_residual = False  # so that half-precision keys are stored as they are
    ivf = faiss.try_extract_index_ivf(index)
    ivf = None if ivf is None else faiss.downcast_index(ivf)
    if isinstance(ivf, faiss.IndexIVFPQ):
        # It would number the centroids anew for Hamming distances, seconds for each byte.
        ivf.do_polysemous_training = False
    return index
