"""What everything that searches looks like, and the exact search."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

import faiss
import numpy as np

from neighborlm.retrieval.engine.parallel import in_parallel
from neighborlm.retrieval.store.datastore import Datastore

if TYPE_CHECKING:
    from neighborlm.retrieval.memories.knn import Votes

Metric = Literal["l2", "ip", "cosine"]
FAISS_METRICS = {
    "l2": faiss.METRIC_L2,
    "ip": faiss.METRIC_INNER_PRODUCT,
    "cosine": faiss.METRIC_INNER_PRODUCT,
}


Take = Callable[..., None]
"""Takes numbers of queries, a slice or int64 `[n]`, with arrays of what was found of them."""
TAKEN_AT_ONCE = 128
"""Queries whose neighbours are handed over at a time: they stay in the cache."""


class Retriever(Protocol):
    """Finds the nearest keys of a datastore.

    Attributes:
        metric: `l2` gives squared Euclidean distances (small is near), `ip` inner products and
            `cosine` cosines (large is near).
        exact: whether its distances are those to the stored keys, not to codes of them.
    """

    metric: Metric
    exact: bool

    def search(
        self, queries: np.ndarray, k: int, ordered: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest keys.

        Args:
            queries: fp32 `[Q, d]`.
            k: how many.
            ordered: nearest first, the missing last; otherwise in any order, which may be faster.

        Returns:
            distances fp32 `[Q, k]` and datastore rows int64 `[Q, k]`, -1 where missing.
        """
        ...

    def prepare(self) -> None:
        """Loads what a first search would wait for."""

    def vote(self, queries: np.ndarray, k: int, votes: "Votes") -> None:
        """Counts the votes of the k nearest keys for the targets of some queries; as `search` and
        `Votes.take`, but the neighbours need not be put together.

        Args:
            queries: fp32 `[Q, d]`.
            k: how many.
            votes: whose targets are those of the queries.
        """
        hand_over(votes.take, *self.search(queries, k, ordered=False))


def hand_over(take: Take, *found: np.ndarray) -> None:
    """Gives arrays `[Q, k]` to `take`, some rows at a time, by as many threads as faiss would take
    here."""
    firsts = range(0, len(found[0]), TAKEN_AT_ONCE)
    parts = [slice(first, first + TAKEN_AT_ONCE) for first in firsts]

    def give(part: slice) -> None:
        take(part, *(array[part] for array in found))

    in_parallel(give, parts, faiss.omp_get_max_threads())


def normalized(vectors: np.ndarray, metric: Metric) -> np.ndarray:
    """Unit vectors for `cosine`, the vectors themselves otherwise; fp32 `[n, d]`, contiguous."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if metric != "cosine":
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


def faiss_reason(error: RuntimeError) -> str:
    """What a faiss error says, without where in faiss it arose."""
    return re.sub(r".*\.(cpp|h):\d+: ", "", str(error).strip().splitlines()[-1])


class FlatRetriever(Retriever):
    """Exact search by reading all keys, block by block: no index file, no copy of the keys.

    Args:
        datastore: where to search.
        metric: see `Retriever`.
    """

    def __init__(self, datastore: Datastore, metric: Metric) -> None:
        self.datastore = datastore
        self.metric = metric
        # By |q|^2 - 2 q.k + |k|^2, whose large terms cancel: a near key loses its last digits.
        self.exact = metric != "l2"

    def search(
        self, queries: np.ndarray, k: int, ordered: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Retriever.search`."""
        queries = normalized(queries, self.metric)
        best = faiss.ResultHeap(len(queries), k, keep_max=self.metric != "l2")
        first = 0
        for block in self.datastore.blocks():
            distances, ids = faiss.knn(
                queries,
                normalized(block, self.metric),
                min(k, len(block)),
                metric=FAISS_METRICS[self.metric],
            )
            best.add_result(distances, ids + first)
            first += len(block)
        best.finalize()
        return best.D, self.datastore.rows_of(best.I)
