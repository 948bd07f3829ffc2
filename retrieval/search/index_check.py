"""Whether an index file can be searched, and whether it is an index of the datastore's keys.

A file that this computer has not yet seen as it is (see `common.digests`) is tried out by another
process. An index that says nothing of what it was built from, such as one of another program, is
asked for the nearest keys of some keys: the distances that it gives must be those to the keys of
the numbers that it gives, and its keys must lie in the lists of the centroids nearest to them.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import faiss
import numpy as np

from neighborlm.common.digests import compare_once, keep_stamps, stamps_of
from neighborlm.common.errors import NO_MEMORY_WORDS, InputError
from neighborlm.retrieval.search import index_file
from neighborlm.retrieval.search.faiss_retriever import FaissRetriever
from neighborlm.retrieval.search.index_file import files_of
from neighborlm.retrieval.search.rescoring import exact_distances
from neighborlm.retrieval.search.retriever import faiss_reason, normalized

SAMPLE, K, SEED = 64, 8, 1
FEWEST_KEYS = 4 * K
"""Among fewer keys the nearest are not much nearer than others."""
ENOUGH = 0.3
"""Share of the difference between near and arbitrary keys that must be real: indexes of these keys
give 0.5 and more, even with two bits a dimension, and others 0.05 and less."""

LISTS, KEYS_OF_A_LIST = 256, 4
"""With the most unusual centroids, and as many others, whose first keys are looked at."""
SLACK, LARGE_SLACK, ROUNDING = 0.05, 1.0, 1e-3
"""By what share of its distance a centroid may be farther than the nearest one: where keys are
compared with all of them, and where a graph finds one that is near; what of a key's squared length
is nothing."""
LARGE_ERROR, ALIKE = 30, 0.9
"""How many times the median the squared errors of all decoded keys of a list may be, and the share
of them that is one vector where it is the centroid that is wrong."""


def check_file(path: Path, kind: str = "faiss index") -> None:
    """Refuses a file that faiss cannot work with, before this process opens it. Which files are
    tried out, `compare_once` says; those that this program has written are not.

    Raises:
        InputError: it is damaged, or no index or codec.
    """
    files = dict.fromkeys(files_of(path), "")
    compare_once(_stamps(path), files, lambda _: _try_out(path, kind), small_bytes=0)


def is_sound(path: Path) -> None:
    """Remembers that a file was written by this program, see `check_file`."""
    files = files_of(path)
    keep_stamps(_stamps(path), stamps_of(files), dict.fromkeys(files, ""), small_bytes=0)


def _stamps(path: Path) -> Path:
    return path.with_name(f".{path.name}.tried")


def _try_out(path: Path, kind: str) -> None:
    command = (sys.executable, index_file.__file__, str(path))
    modules = os.pathsep.join(filter(None, sys.path))  # as of this process, however it got them
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": modules}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        print(
            f"{path}: is opened without having been tried out by a process of its own, as no "
            f"{sys.executable or 'other Python'} can be started ({error.strerror})"
        )
        return
    if done.returncode == 0:
        return
    if NO_MEMORY_WORDS.search(done.stderr):
        raise MemoryError(done.stderr.strip())
    *_, reason = ("it says nothing", *done.stderr.strip().splitlines())
    if done.returncode < 0:
        reason = f"faiss ends with {signal.Signals(-done.returncode).name}"
    raise InputError(f"{path}: cannot be read as a {kind} ({faiss_reason(reason)})")


def check_belongs(retriever: FaissRetriever) -> None:
    """Refuses an index that was built from other keys than those of its datastore, or for another
    metric; few keys are not enough to tell.

    Raises:
        InputError: it was.
    """
    datastore, metric = retriever.datastore, retriever.metric
    if datastore.n_keys < FEWEST_KEYS:
        return
    rows, keys = datastore.sample(SAMPLE, SEED)
    found = retriever.search(keys, K)
    there = found.rows >= 0
    if not there.any():
        raise InputError(f"{retriever.name}: finds no key of {datastore.path}; expected its index")
    given = found.distances[there]
    real = exact_distances(keys, found.rows, datastore, metric)[there]
    everyone = np.broadcast_to(rows, (len(rows), len(rows)))
    arbitrary = exact_distances(keys, everyone, datastore, metric).mean()
    rounding = 1e-3 * (abs(given.mean()) + abs(arbitrary))
    if metric != "l2":
        distinct, which = np.unique(found.rows[there], return_inverse=True)
        lengths = np.linalg.norm(datastore.read(distinct), axis=1)[which]
        as_other = real * lengths if metric == "cosine" else real / np.maximum(lengths, 1e-30)
        error, other_error = (float(np.abs(given - x).mean()) for x in (real, as_other))
        if other_error < error / 4 and error > rounding:
            other = "ip" if metric == "cosine" else "cosine"
            raise InputError(
                f"{retriever.name}: was built for --knn.metric {other}, but {metric} is expected "
                "here; use a matching one"
            )
    gap = abs(given.mean() - arbitrary)
    nearer = (arbitrary - real.mean()) if metric == "l2" else (real.mean() - arbitrary)
    if nearer < ENOUGH * gap - rounding:
        raise InputError(
            f"{retriever.name}: is not an index of {datastore.path}: the neighbours that it finds "
            f"of {len(rows)} stored keys are on average {real.mean():.4g} away by {metric}, and "
            f"not {given.mean():.4g} as it says; expected one that was built from these keys"
        )
    _check_lists(retriever)


def check_centroids(index: faiss.Index, name: str) -> None:
    """Refuses an index with centroids that are no vectors.

    Raises:
        InputError: it has some.
    """
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        is_vector = np.isfinite(np.linalg.norm(_centroids(ivf), axis=1))
    if not is_vector.all():
        raise InputError(
            f"{name}: is damaged: the centroid of list {np.argmin(is_vector)} is not finite; "
            "expected a whole copy"
        )


def _centroids(ivf: faiss.IndexIVF) -> np.ndarray:
    return faiss.downcast_index(ivf.quantizer).reconstruct_n(0, ivf.nlist)


def _check_lists(retriever: FaissRetriever) -> None:
    """Refuses inverted lists of which a key lies nearer to the centroid of another one, or whose
    codes give other keys than those of the other lists do: where a centroid is damaged, its list is
    visited for the wrong queries, and what it holds relative to it is wrong.

    Raises:
        InputError: there is one.
    """
    if retriever.probing is None:
        return
    ivf = retriever.probing.ivf
    centroids, numbers, offsets, rows = _some_of_the_lists(retriever, ivf)
    keys = retriever.transformed(normalized(retriever.datastore.read(rows), retriever.metric))
    squares = np.square(keys).sum(axis=1)
    nearest = ivf.quantizer.search(keys, 1)[0][:, 0]
    if ivf.quantizer.metric_type == faiss.METRIC_INNER_PRODUCT:
        farther = nearest - np.vecdot(keys, centroids)
    else:
        farther = np.square(keys - centroids).sum(axis=1) - nearest
    is_exact = isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexFlat)
    slack = (SLACK if is_exact else LARGE_SLACK) * np.abs(nearest)
    wrong = farther > slack + ROUNDING * squares
    with suppress(RuntimeError):  # of types that decode nothing
        decoded = np.zeros_like(keys)
        for place in range(len(keys)):
            at = int(numbers[place]), int(offsets[place])
            ivf.reconstruct_from_offset(*at, faiss.swig_ptr(decoded[place]))
        wrong |= _are_shifted(decoded - keys, squares, numbers)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise InputError(
            f"{retriever.name}: is damaged, or not all of it is of {retriever.datastore.path}: key "
            f"{rows[place]} does not fit the centroid of its list, {numbers[place]}; expected a "
            "whole copy, or an index that was built from these keys"
        )


def _are_shifted(errors: np.ndarray, squares: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Which keys are decoded wrongly by about the same vector as all others of their lists: as
    where a centroid is damaged, but not where a key is beyond the range of a code.

    Args:
        errors: decoded keys less keys `[n, d]`.
        squares: squared lengths of the keys `[n]`.
        lists: of the keys `[n]`.
    """
    _, places, counts = np.unique(lists, return_inverse=True, return_counts=True)
    sizes = np.square(errors).sum(axis=1)
    is_large = sizes > LARGE_ERROR * np.median(sizes) + ROUNDING * squares
    all_large = np.bincount(places, is_large) == counts
    shifts = np.zeros((len(counts), errors.shape[1]))
    np.add.at(shifts, places, errors)
    of_shift = np.square(shifts / counts[:, None]).sum(axis=1)
    alike = of_shift > ALIKE * np.bincount(places, sizes) / counts
    return (all_large & alike & (counts > 1))[places]


def _some_of_the_lists(
    retriever: FaissRetriever, ivf: faiss.IndexIVF
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The first keys of lists with unusual centroids, and of others: their centroids fp32 `[n, d]`,
    the numbers of the lists, places in the lists and rows of the datastore, int64 `[n]`."""
    centroids, lists = _centroids(ivf), ivf.invlists
    lengths = np.linalg.norm(centroids, axis=1)
    unusual = np.argsort(-np.abs(lengths - np.median(lengths)), kind="stable")
    others = np.random.default_rng(SEED).permutation(unusual[LISTS:])
    found = []
    for number in [*unusual[:LISTS].tolist(), *others[:LISTS].tolist()]:
        for offset in range(min(KEYS_OF_A_LIST, lists.list_size(number))):
            found.append((number, offset, lists.get_single_id(number, offset)))
    numbers, offsets, ids = np.array(found, dtype=np.int64).reshape(-1, 3).T
    rows = retriever.rows_of(ids)
    there = rows >= 0
    numbers = numbers[there]
    return centroids[numbers], numbers, offsets[there], rows[there]
