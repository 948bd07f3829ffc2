"""Opens the index that `--knn.index` names: one of the registry `INDEX_KINDS`, or an index file of
faiss.

`<name>.faiss` lies beside the keys, with `<name>.faiss.json` as its manifest; `search.building`
makes both. Where a datastore lies in shards, each has an index of its own beside its keys.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from neighborlm.common.contracts import Metric, NProbe, Retriever
from neighborlm.common.errors import InputError, raise_no_memory
from neighborlm.retrieval.engine import stores_halves
from neighborlm.retrieval.search.factory import check_factory, check_lists, hush_training, lists_of
from neighborlm.retrieval.search.faiss_retriever import FaissRetriever
from neighborlm.retrieval.search.index_check import check_belongs, check_centroids, check_file
from neighborlm.retrieval.search.index_file import list_file_of, open_file
from neighborlm.retrieval.search.retriever import FAISS_METRICS, FlatRetriever, faiss_reason
from neighborlm.retrieval.search.sharded_retriever import ShardedRetriever
from neighborlm.retrieval.search.torch_retriever import TorchRetriever
from neighborlm.retrieval.store.artifact import Artifact, Format, refuse_mismatch
from neighborlm.retrieval.store.datastore import Datastore

FORMAT = Format("index", 2, libraries=("faiss", "numpy"))
NUMBERED_RIGHTLY = 2
"""The first version that merges parts correctly: faiss's `merge_ondisk` shifts the ids of a part by
a number that is right only where all parts are equally large."""


LARGEST_HALF = float(np.finfo(np.float16).max)
SAMPLE_OF_RANGE = 1024
"""Keys that `auto` looks at."""


@dataclass(frozen=True)
class Search:
    """How a datastore is searched.

    Attributes:
        index: `auto` (by size), one of `INDEX_KINDS`, a faiss factory string or the path of an
            index.
        metric: how keys are compared.
        nprobe: inverted lists to visit, where the index has any.
        device: where `torch` computes.
    """

    index: str = "auto"
    metric: Metric = "l2"
    nprobe: NProbe = "auto"
    device: str | torch.device = "cpu"


INDEX_KINDS: dict[str, Callable[[Datastore, Search], Retriever]] = {
    "flat": lambda datastore, search: FlatRetriever(datastore, search.metric),
    "torch": lambda datastore, search: TorchRetriever(datastore, search.metric, search.device),
}
"""By the names of `--knn.index`: opens an index that needs no building. All other names are faiss
factory strings or paths. A new kind is one more entry."""
EXHAUSTIVE = ("flat", "torch")
"""Kinds that compare a query with every key: nprobe means nothing to them."""


# -- names ---------------------------------------------------------------------------------------


def auto_factory(
    n_keys: int, dim: int, memory_bytes: int | None = None, fit_halves: bool = True
) -> str:
    """The index that `auto` stands for.

    Exact search while reading every key is cheap; then inverted lists, about 2 sqrt(n) of them, of
    half-precision keys, or of 8-bit keys or one-bit codes where memory does not suffice.

    Args:
        memory_bytes: largest size of the index; by default a quarter of the machine's memory.
        fit_halves: whether the keys are small enough for half precision; otherwise lists keep them
            as they are.
    """
    if memory_bytes is None:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    if n_keys * dim <= 1 << 22:
        return "flat"
    lists = 2 ** round(math.log2(2 * math.sqrt(n_keys)))
    size, quantizer = (2, "SQfp16") if fit_halves else (4, "Flat")
    if n_keys * dim * size <= memory_bytes:
        return f"IVF{lists},{quantizer}"
    if n_keys * dim <= memory_bytes:
        return f"IVF{lists},SQ8"
    return f"RR{dim},IVF{lists},RaBitQfs"


def artifact_of(path: Path) -> Artifact:
    """The index of a file as a product."""
    return Artifact.file(FORMAT, path)


def resolve(datastore: Datastore, index: str) -> str:
    """Replaces `auto` by the index that it stands for, that of the whole where the datastore is a
    shard; returns any other name as it is."""
    if index != "auto":
        return index
    fit_halves = True
    if datastore.manifest["dtype"] == "fp32" and datastore.part is None:
        # Of a shard all is not at hand: keys that do not fit are refused when they are added.
        _, sample = datastore.sample(SAMPLE_OF_RANGE, seed=1)
        fit_halves = bool(np.abs(sample).max() < LARGEST_HALF)
    return auto_factory(datastore.n_keys_of_whole, datastore.dim, fit_halves=fit_halves)


def is_path(index: str) -> bool:
    """Whether `--knn.index` is the path of a file. A file called `auto`, or like a kind of index,
    needs a folder before its name."""
    if index == "auto" or index in INDEX_KINDS:
        return False
    return index.endswith((".faiss", ".index")) or os.sep in index or Path(index).is_file()


def is_factory(index: str) -> bool:
    """Whether `--knn.index` is a faiss factory string: an index that must be built."""
    return index != "auto" and index not in INDEX_KINDS and not is_path(index)


def check_index(index: str, dim: int, metric: Metric, n_keys: int | None = None) -> None:
    """Refuses a factory string that faiss does not know, or that does not suit the datastore.

    Args:
        n_keys: keys of the datastore, where they are known.

    Raises:
        InputError: faiss does not know it for keys of this width, or there are fewer keys than
            lists.
    """
    if is_factory(index):
        make_index(dim, index, metric)
        if n_keys is not None:
            check_lists(index, lists_of(index), n_keys)


def index_path(datastore: Datastore, factory: str, metric: Metric) -> Path:
    """Where the index of a factory string lies."""
    return datastore.path / f"{re.sub(r'[^A-Za-z0-9.]+', '_', factory)}-{metric}.faiss"


# -- opening -------------------------------------------------------------------------------------


def open_retriever(datastore: Datastore, search: Search) -> Retriever:
    """Opens the retriever by which this process alone searches a datastore. Where the datastore
    lies in shards, that is the index of the whole if there is one, otherwise those of the shards.
    See `cluster.distributed` for a search by all ranks together.

    Raises:
        InputError: no such index, or one of another datastore, metric or dimension.
    """
    search = replace(search, index=resolve(datastore, search.index))
    if search.index in INDEX_KINDS:
        return INDEX_KINDS[search.index](datastore, search)
    if lies_in_shards(datastore, search):
        return open_shards(datastore, range(datastore.n_shards), search)
    return open_faiss(datastore, search)


def open_faiss(datastore: Datastore, search: Search) -> FaissRetriever:
    """Opens an index file, by its path or by the factory string that it was built by.

    Raises:
        InputError: see `open_retriever`.
    """
    index, metric = search.index, search.metric
    path = Path(index) if is_path(index) else index_path(datastore, index, metric)
    if not path.is_file():
        way = "expected one that was built, or what to build, such as flat or IVF1024,SQ8"
        if not is_path(index):
            way = "--build_index or --knnlm makes it"
        raise InputError(f"{path}: no such index; {way}")
    artifact, described = artifact_of(path), {}
    if artifact.exists():
        expected = {
            "metric": metric,
            "dim": datastore.dim,
            "keys": datastore.n_keys,
            "datastore": datastore.fingerprint,
        }
        described = artifact.open(expected)
        check_numbers(path, described)
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
    if "files" not in described:
        check_centroids(opened, str(path))
    retriever = FaissRetriever(opened, datastore, metric, search.nprobe, str(path))
    if "files" not in described:
        check_belongs(retriever)
    return retriever


def lies_in_shards(datastore: Datastore, search: Search) -> bool:
    """Whether the shards are searched, since there is no index of the whole."""
    if datastore.n_shards == 1 or is_path(search.index):
        return False
    index = resolve(datastore, search.index)
    return index in INDEX_KINDS or not index_path(datastore, index, search.metric).is_file()


def open_shards(datastore: Datastore, numbers: Iterable[int], search: Search) -> ShardedRetriever:
    """Opens the retriever of some shards.

    Args:
        datastore: the whole, or a shard where that alone is searched.
        numbers: the shards' numbers.

    Raises:
        InputError: a shard has no such index, or one that did not begin with the trained index of
            the others.
    """
    search = replace(search, index=resolve(datastore, search.index))
    shards = [datastore.shard(number) for number in numbers]
    opened = [open_retriever(shard, search) for shard in shards]
    trained = None
    if search.index not in INDEX_KINDS:
        paths = [index_path(shard, search.index, search.metric) for shard in shards]
        artifacts = [artifact_of(path) for path in paths]
        trained = artifacts[0].open().get("trained")
        for artifact in artifacts:
            artifact.open({"trained": trained})
    return ShardedRetriever(datastore, opened, search.metric, trained)


# -- index files ---------------------------------------------------------------------------------


def check_numbers(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses an index that an earlier version merged wrongly, see `NUMBERED_RIGHTLY`."""
    merged = list_file_of(path).is_file()
    if merged and manifest["version"] < NUMBERED_RIGHTLY:
        raise InputError(
            f"{path}: was merged by an earlier version of this program, which gave many keys wrong "
            "numbers; remove it and its .lists, and it is built anew"
        )


def read_index(path: Path) -> faiss.Index:
    """Opens an index file, memory-mapped where its type allows.

    Raises:
        InputError: not a faiss index.
    """
    check_file(path)
    try:
        return open_file(path)
    except RuntimeError as error:
        raise_no_memory(error)
        raise InputError(
            f"{path}: cannot be read as a faiss index ({faiss_reason(error)})"
        ) from None


def write_index(index: faiss.Index, path: Path) -> None:
    """Writes an index file. (By faiss alone, an index whose end does not fit on the disk would pass
    for a whole one: it takes no notice of errors when it closes the file.)

    Raises:
        OSError: it cannot be written; where the disk is full, `needed` is about what it takes.
    """
    try:
        with open(path, "wb") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    except OSError as error:
        if index.ntotal == 0:  # a codec, or one that is only trained
            error.needed = len(faiss.serialize_index(index))
        else:
            error.needed = index.ntotal * (index.sa_code_size() + 8)
        raise


def make_index(dim: int, factory: str, metric: Metric) -> faiss.Index:
    """An empty index.

    Raises:
        InputError: faiss does not know the factory string.
    """
    check_factory(factory, dim)
    try:
        index = faiss.index_factory(dim, factory, FAISS_METRICS[metric])
    except RuntimeError as error:
        raise InputError(
            f"--knn.index is {factory!r}; expected auto, {', '.join(INDEX_KINDS)}, the path of an "
            f"index or a faiss factory string that suits dimension {dim} ({faiss_reason(error)})"
        ) from None
    if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
        raise InputError(f"--knn.index is {factory!r}; expected a type that counts keys itself")
    if stores_halves(index):
        index.by_residual = False  # so that half-precision keys are stored as they are
    ivf = faiss.try_extract_index_ivf(index)
    ivf = None if ivf is None else faiss.downcast_index(ivf)
    if isinstance(ivf, faiss.IndexIVFPQ):
        # It would reorder the centroids for Hamming distances, which takes seconds for each byte.
        ivf.do_polysemous_training = False
    hush_training(index)
    return index
