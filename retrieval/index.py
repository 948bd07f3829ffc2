"""faiss indexes over a datastore: choosing, building (resumably) and opening them.

`<name>.faiss` lies beside the keys, with `<name>.faiss.json` as its manifest. While it is built,
`<name>.faiss.partial` holds the trained index with the keys added so far. One that is larger than
`PART_BYTES` is built in parts, and its lists are merged on disk into `<name>.faiss.lists`; so are
not the fast-scan types, whose lists faiss can only hold in memory.

Where a datastore lies in shards, each has an index of its own beside its keys. All begin with
`<name>.faiss.trained` beside the manifest of the whole, so that what they find compares.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from faiss.contrib.ondisk import merge_ondisk

from errors import InputError, interrupts_held
from retrieval.datastore import Datastore, fingerprint_of
from retrieval.inverted_lists import stores_halves
from retrieval.knn import Votes
from retrieval.list_search import ListSearch
from retrieval.manifest import read_manifest, refuse_mismatch, write_manifest
from retrieval.probing import NProbe, Probing
from retrieval.retriever import (
    FAISS_METRICS,
    FlatRetriever,
    Metric,
    Retriever,
    faiss_reason,
    normalized,
)
from retrieval.sharded_retriever import ShardedRetriever
from retrieval.torch_retriever import TorchRetriever

KIND, VERSION = "index", 2
NUMBERED_RIGHTLY = 2
"""The first version whose parts are merged right: `merge_ondisk` shifts the ids of each part by its
own size in place of the sizes of those before it, which only comes to the same where all are equal.
"""
TRAINED_KIND = "trained index"
NOT_BUILT = ("flat", "torch")
"""What reads the keys themselves."""
POINTS_PER_CENTROID = 64
SAMPLE_AT_LEAST = 65536
"""Training vectors beyond what the centroids need, for the quantiser's sake."""
GPUS = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
PART_BYTES = 512 << 20
"""What inverted lists may take in memory while they are built."""
PARTIAL_EVERY = 60.0
"""Seconds of adding after which a partial index is kept (more if keeping it takes long)."""


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


def sample_size(lists: int, n_keys: int) -> int:
    """Keys that an index with so many inverted lists is trained on, at most all there are."""
    return min(max(lists * POINTS_PER_CENTROID, SAMPLE_AT_LEAST), n_keys)


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
    manifest_path = path.with_name(f"{path.name}.json")
    if manifest_path.is_file():
        manifest = read_manifest(manifest_path, KIND, VERSION)
        check_numbers(path, manifest)
        expected = {
            "metric": metric,
            "dim": datastore.dim,
            "keys": datastore.n_keys,
            "datastore": datastore.fingerprint,
        }
        refuse_mismatch(path, manifest, expected)
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
        paths = [index_path(shard, factory, metric) for shard in shards]
        manifests = [
            read_manifest(path.with_name(f"{path.name}.json"), KIND, VERSION) for path in paths
        ]
        trained = manifests[0].get("trained")
        for path, manifest in zip(paths, manifests, strict=True):
            refuse_mismatch(path, manifest, {"trained": trained})
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


def _bytes_of_lists(index: faiss.Index) -> int:
    """What the codes and ids of an index take in memory; 0 if they cannot be merged on disk."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None or GPUS:
        return 0
    if not isinstance(faiss.downcast_InvertedLists(ivf.invlists), faiss.ArrayInvertedLists):
        return 0
    return ivf.ntotal * (ivf.code_size + 8)


def on_gpus(index: faiss.Index) -> faiss.Index:
    """The index on all GPUs, for training and adding, where faiss sees any and knows the type
    there; the index itself otherwise."""
    if not GPUS:
        return index
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError as error:
        print(f"building on the CPU: faiss has no such index on GPUs ({faiss_reason(error)})")
        return index


class IndexBuilding:
    """Builds one index: trains it on a sample, adds every key, and keeps what is done.

    Args:
        datastore: whose keys to index.
        factory: faiss factory string.
        metric: how to compare.
        seed: of the training sample.
        trained: what `train` has left of the whole, where the datastore is a shard of it.
    """

    def __init__(
        self,
        datastore: Datastore,
        factory: str,
        metric: Metric,
        seed: int = 1,
        trained: Path | None = None,
    ) -> None:
        self.datastore = datastore
        self.factory = factory
        self.metric = metric
        self.seed = seed
        self.trained = trained
        self.path = index_path(datastore, factory, metric)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.seconds = {"train": 0.0, "add": 0.0}
        self.parts: list[str] = []
        """Names of the files that hold the first keys, in order."""
        self.n_in_parts = 0
        self.whole = True
        """False while faiss adds: what an exception leaves then is no index to go on from."""

    @property
    def identity(self) -> dict:
        """What determines the index."""
        identity = {
            "factory": self.factory,
            "metric": self.metric,
            "dim": self.datastore.dim,
            "keys": self.datastore.n_keys,
            "datastore": self.datastore.fingerprint,
            "seed": self.seed,
        }
        if self.trained is not None:
            identity["trained"] = self._trained_fingerprint
        return identity

    @cached_property
    def _trained_fingerprint(self) -> str:
        manifest = self.trained.with_name(f"{self.trained.name}.json")
        return read_manifest(manifest, TRAINED_KIND, VERSION, ("fingerprint",))["fingerprint"]

    def is_complete(self) -> bool:
        """Whether this very index is there already.

        Raises:
            InputError: an index of this name is there, but made from something else.
        """
        return self._is_there(self.path, KIND, self.identity)

    def _is_there(self, path: Path, kind: str, identity: dict) -> bool:
        manifest = path.with_name(f"{path.name}.json")
        if not (path.is_file() and manifest.is_file()):
            return False
        found = read_manifest(manifest, kind, VERSION)
        refuse_mismatch(path, found, identity)
        check_numbers(path, found)
        return True

    @property
    def trained_path(self) -> Path:
        """What `train` publishes, with a `.json` beside it."""
        part = self.datastore.part
        path = self.path if part is None else part.path / self.path.name
        return path.with_name(f"{path.name}.trained")

    def train(self, report: Callable[[str, int, int], None] = lambda *_: None) -> Path:
        """Publishes the trained index without any key in the directory of the whole, for those of
        the shards to begin with, unless it is there already. Where the datastore is one shard, the
        sample is of its keys.

        Raises:
            InputError: one of this name is there, but made from something else.
        """
        path, identity, part = self.trained_path, self.identity, self.datastore.part
        if part is not None:
            n_keys = self.datastore.n_keys_of_whole
            identity |= {"keys": n_keys, "datastore": fingerprint_of(part.manifest)}
        if not self._is_there(path, TRAINED_KIND, identity):
            self._write(self._begin(report), path)
            with open(path, "rb") as file:
                fingerprint = file_digest(file, partial(blake2b, digest_size=8)).hexdigest()
            manifest = path.with_name(f"{path.name}.json")
            write_manifest(
                manifest, TRAINED_KIND, VERSION, {**identity, "fingerprint": fingerprint}
            )
        return path

    def run(self, report: Callable[[str, int, int], None] = lambda *_: None) -> Path:
        """Trains, adds and publishes the index; continues from a partial one.

        Args:
            report: called with a stage, how much of it is done, and how much there is.
        """
        index = self._open_partial()
        if index is None:
            for left_over in self.path.parent.glob(f"{self.path.name}.part-*"):
                left_over.unlink()
            index = self._begin(report)
            self._keep(index)
        start = time.perf_counter()
        try:
            self._add(index, report)
        except KeyboardInterrupt:
            if self.whole:
                self._keep(index)
            raise
        if self.parts:
            self._merge(index, report)
        self._write(index, self.path)
        self.seconds["add"] = time.perf_counter() - start
        fields = {**self.identity, "complete": True, "seconds": self.seconds}
        write_manifest(self.path.with_name(f"{self.path.name}.json"), KIND, VERSION, fields)
        self.partial.unlink(missing_ok=True)
        self._partial_manifest.unlink(missing_ok=True)
        for part in self.parts:
            self.path.with_name(part).unlink()
        return self.path

    @property
    def _partial_manifest(self) -> Path:
        return self.partial.with_name(f"{self.partial.name}.json")

    def _open_partial(self) -> faiss.Index | None:
        if not (self.partial.is_file() and self._partial_manifest.is_file()):
            return None
        manifest = read_manifest(self._partial_manifest, KIND, VERSION)
        if manifest["parts"] and manifest["version"] < NUMBERED_RIGHTLY:
            return None
        if any(manifest.get(key) != value for key, value in self.identity.items()):
            return None
        files = [self.path.with_name(part) for part in manifest["parts"]]
        try:
            index = on_gpus(faiss.read_index(str(self.partial)))
            self.n_in_parts = sum(read_index(file).ntotal for file in files)
        except (RuntimeError, InputError) as error:
            print(f"{self.partial}: cannot be read ({faiss_reason(error)}); building anew")
            return None
        self.parts = manifest["parts"]
        return index

    def _begin(self, report: Callable[[str, int, int], None]) -> faiss.Index:
        """A trained index without any key."""
        if self.trained is not None:
            return on_gpus(faiss.read_index(str(self.trained)))
        index = make_index(self.datastore.dim, self.factory, self.metric)
        ivf = faiss.try_extract_index_ivf(index)  # hidden once the index is on GPUs
        lists = ivf.nlist if ivf is not None else 0
        index = on_gpus(index)
        start = time.perf_counter()
        report("training", 0, 1)
        self._train(index, lists)
        report("training", 1, 1)
        self.seconds["train"] = time.perf_counter() - start
        return index

    def _train(self, index: faiss.Index, lists: int) -> None:
        """Trains on a seeded random sample, read in file order."""
        size = sample_size(lists, self.datastore.n_keys)
        if lists > size:
            raise InputError(
                f"--knn.index {self.factory} has {lists} lists but the datastore only {size} keys; "
                "choose fewer lists"
            )
        _, sample = self.datastore.sample(size, self.seed)
        try:
            index.train(normalized(sample, self.metric))
        except RuntimeError as error:
            raise InputError(
                f"--knn.index {self.factory} cannot be trained on {size} keys "
                f"({faiss_reason(error)})"
            ) from None

    def _add(self, index: faiss.Index, report: Callable[[str, int, int], None]) -> None:
        last_kept, pause = time.perf_counter(), PARTIAL_EVERY
        total = self.datastore.n_keys
        done = self.n_in_parts + index.ntotal
        report("adding", done, total)
        for block in self.datastore.blocks(start=done):
            self.whole = False
            with interrupts_held() as held:
                self._add_block(index, normalized(block, self.metric), done)
            self.whole = True
            done += len(block)
            report("adding", done, total)
            if held:
                raise KeyboardInterrupt
            if done == total:
                break
            if _bytes_of_lists(index) > PART_BYTES:
                self._put_aside(index)
            if time.perf_counter() - last_kept > pause:
                start = time.perf_counter()
                self._keep(index)
                last_kept = time.perf_counter()
                pause = max(PARTIAL_EVERY, 10 * (last_kept - start))

    def _add_block(self, index: faiss.Index, keys: np.ndarray, first: int) -> None:
        """Adds keys fp32 `[n, d]`, of which `first` is the number of the first."""
        if self.n_in_parts:  # faiss would count them from the beginning of this part
            index.add_with_ids(keys, np.arange(first, first + len(keys)))
        else:
            index.add(keys)

    def _put_aside(self, index: faiss.Index) -> None:
        """Makes a part of what was added since the last one, and empties the index."""
        part = self.path.with_name(f"{self.path.name}.part-{len(self.parts)}")
        self._write(index, part)
        self.n_in_parts += index.ntotal
        self.parts.append(part.name)
        index.reset()
        self._keep(index)

    def _merge(self, index: faiss.Index, report: Callable[[str, int, int], None]) -> None:
        """Fills the index with all parts, its lists being in a file."""
        report("merging", 0, 1)
        self._put_aside(index)
        files = [str(self.path.with_name(part)) for part in self.parts]
        lists = self.path.with_name(f"{self.path.name}.lists")
        lists.unlink(missing_ok=True)
        merge_ondisk(index, files, str(lists))
        report("merging", 1, 1)

    def _keep(self, index: faiss.Index) -> None:
        self._partial_manifest.unlink(missing_ok=True)
        self._write(index, self.partial)
        fields = {**self.identity, "parts": self.parts}
        write_manifest(self._partial_manifest, KIND, VERSION, fields)

    def _write(self, index: faiss.Index, path: Path) -> None:
        making = path.with_name(f"{path.name}.making")
        if GPUS:
            index = faiss.index_gpu_to_cpu(index)
        faiss.write_index(index, str(making))
        os.replace(making, path)
