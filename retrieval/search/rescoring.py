"""Computes distances to the stored keys of neighbours that an index has found by their codes."""

from functools import partial

import faiss
import numpy as np

from neighborlm.common.contracts import Metric
from neighborlm.retrieval.engine import distances_of_pairs, in_parallel
from neighborlm.retrieval.search.retriever import normalized
from neighborlm.retrieval.store.datastore import Datastore


def exact_distances(
    queries: np.ndarray,
    rows: np.ndarray,
    datastore: Datastore,
    metric: Metric,
    place_bits: int = 20,
    key_bytes: int = 1 << 20,
) -> np.ndarray:
    """Distances to the stored keys of neighbours.

    Each distinct row is read once, in blocks of ascending rows; no `[Q, k, d]` array is made. It
    uses as many threads as faiss would.

    Args:
        queries: fp32 `[Q, d]`.
        rows: int64 `[Q, k]`, -1 where missing.
        place_bits: 2^place_bits neighbours are sorted by their rows at a time.
        key_bytes: bytes of the keys that are compared at a time.

    Returns:
        fp32 `[Q, k]`; any number for missing neighbours.

    Raises:
        ValueError: queries and rows differ in number, or queries and keys in width.
    """
    if queries.shape != (len(rows), datastore.dim):
        raise ValueError(f"{queries.shape} queries, {rows.shape} rows, {datastore.dim} wide keys")
    queries = normalized(queries, metric)
    threads = faiss.omp_get_max_threads()
    flat = rows.reshape(-1)
    size = 1 << place_bits
    parts = [flat[first : first + size] for first in range(0, max(flat.size, 1), size)]
    sorted_pairs = in_parallel(partial(_sorted_pairs, bits=place_bits), parts, threads)
    distinct = np.sort(
        np.concatenate(in_parallel(partial(_rows_of, bits=place_bits), sorted_pairs, threads))
    )
    distinct = distinct[_firsts(distinct)]
    result = np.zeros(flat.shape, dtype=np.float32)

    def measure(block: np.ndarray) -> None:
        keys = normalized(datastore.read(block), metric)
        bounds = np.array([block[0], block[-1] + 1]) << place_bits
        for number, pairs in enumerate(sorted_pairs):
            begin, end = np.searchsorted(pairs, bounds)
            which = (pairs[begin:end], place_bits, number * size, rows.shape[1], block)
            part = result[number * size : (number + 1) * size]
            distances_of_pairs(*which, keys, queries, metric == "l2", part)

    step = max(key_bytes // (4 * datastore.dim), 1)
    in_parallel(measure, [distinct[i : i + step] for i in range(0, len(distinct), step)], threads)
    return result.reshape(rows.shape)


def _sorted_pairs(rows: np.ndarray, bits: int) -> np.ndarray:
    """Row and place of each neighbour in one integer, `[n]` in ascending order, missing neighbours
    left out: numpy sorts integers much faster than it argsorts them."""
    places = np.flatnonzero(rows >= 0)
    pairs = rows[places] << bits
    pairs |= places
    pairs.sort()
    return pairs


def _firsts(ascending: np.ndarray) -> np.ndarray:
    """Where each distinct number occurs first."""
    new = np.ones(len(ascending), dtype=bool)
    np.not_equal(ascending[1:], ascending[:-1], out=new[1:])
    return np.flatnonzero(new)


def _rows_of(pairs: np.ndarray, bits: int) -> np.ndarray:
    """The distinct rows of some pairs."""
    rows = pairs >> bits
    return rows[_firsts(rows)]
