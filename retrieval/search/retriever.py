"""What retrievers share, and the exact search by faiss.

A retriever of one's own derives from `BaseRetriever` and gives `search`; `search.index` has the
registry that it is entered into.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType

import faiss
import numpy as np

from neighborlm.common.contracts import Metric, Neighbors, Retriever, Votes
from neighborlm.retrieval.engine import count_votes, first_out_of_order, in_parallel
from neighborlm.retrieval.store.datastore import Datastore

FAISS_METRICS = {
    "l2": faiss.METRIC_L2,
    "ip": faiss.METRIC_INNER_PRODUCT,
    "cosine": faiss.METRIC_INNER_PRODUCT,
}
AT_ONCE = 128
"""Queries whose neighbours are worked on at a time: they stay in the cache."""


class BaseRetriever(Retriever):
    """All of a retriever but its search: votes are those of what it finds, and there are no others
    that it searches together with.

    Attributes:
        datastore: what is searched.
        metric: what keys are compared by.
        exact: whether its distances are those to the stored keys, not to codes of them.
        name: of the index, for messages.
        communication: see `contracts.Retriever`.
    """

    datastore: Datastore
    metric: Metric
    exact: bool = False
    name: str = "index"
    communication: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def search(self, queries: np.ndarray, k: int, ordered: bool = True) -> Neighbors:
        """The k nearest keys of queries fp32 `[Q, d]`; see `contracts.Retriever`."""

    def vote(self, queries: np.ndarray, k: int, targets: np.ndarray, temperature: float) -> Votes:
        """What the k nearest keys of queries fp32 `[Q, d]` say of targets int64 `[Q]`."""
        found = with_values(self.search(queries, k, ordered=False), self.datastore)
        return votes_of(found, targets, temperature, self.metric)

    def prepare(self) -> None:
        """Loads what a first search would wait for."""
        one = np.zeros((1, 1), dtype=np.float32), *2 * (np.zeros((1, 1), dtype=np.int64),)
        votes_of(Neighbors(*one), np.zeros(1, dtype=np.int64), 1.0, self.metric)
        self.checked(Neighbors(*one))

    def begin_pass(self) -> None:
        """There are no others to wait for."""

    def end_pass(self) -> None:
        """There are no others to search for."""

    def checked(self, found: Neighbors) -> Neighbors:
        """What was found, which is to be in order; looking at it takes next to no time.

        Raises:
            RuntimeError: it is not in order.
        """
        query = first_out_of_order(found.distances, found.rows, self.metric != "l2")
        if query >= 0:
            raise RuntimeError(
                f"{self.name}: the neighbours of query {query} are out of order; expected the "
                "nearest first and the missing last"
            )
        return found


def votes_of(
    neighbors: Neighbors, targets: np.ndarray, temperature: float, metric: Metric
) -> Votes:
    """What neighbours whose values are known say of targets; by as many threads as faiss would take
    here.

    Args:
        neighbors: in any order.
        targets: int64 `[Q]`.
        temperature: divides the scores.
        metric: of the distances.
    """
    threads = faiss.omp_get_max_threads()
    return count_votes(neighbors, targets, temperature, metric != "l2", threads)


def with_values(found: Neighbors, datastore: Datastore) -> Neighbors:
    """Neighbours with their values, looked up where they are not known yet; by as many threads as
    faiss would take here."""
    if found.values is not None:
        return found
    values = np.empty(found.rows.shape, dtype=datastore.values.dtype)

    def look_up(part: slice) -> None:
        values[part] = datastore.values_of(found.rows[part])

    in_parts(look_up, len(values))
    return found._replace(values=values)


def in_parts(work: Callable[[slice], None], n: int) -> None:
    """Has something done for n queries, some at a time, by as many threads as faiss would take
    here."""
    parts = [slice(first, first + AT_ONCE) for first in range(0, n, AT_ONCE)]
    in_parallel(work, parts, faiss.omp_get_max_threads())


def normalized(vectors: np.ndarray, metric: Metric) -> np.ndarray:
    """Unit vectors for `cosine`, the vectors themselves otherwise; fp32 `[n, d]`, contiguous."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if metric != "cosine":
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


def missing_distance(metric: Metric) -> np.float32:
    """The distance of missing neighbours: no other one is farther."""
    return np.finfo(np.float32).max if metric == "l2" else np.finfo(np.float32).min


def faiss_reason(error: RuntimeError) -> str:
    """What a faiss error says, without where in faiss it arose."""
    return re.sub(r".*\.(cpp|h):\d+: ", "", str(error).strip().splitlines()[-1])


class FlatRetriever(BaseRetriever):
    """Exact search by reading all keys, block by block: no index file, no copy of the keys.

    Args:
        datastore: where to search.
        metric: what keys are compared by.
    """

    name = "flat"

    def __init__(self, datastore: Datastore, metric: Metric) -> None:
        self.datastore = datastore
        self.metric = metric
        # By |q|^2 - 2 q.k + |k|^2, whose large terms cancel: a near key loses its last digits.
        self.exact = metric != "l2"

    def search(self, queries: np.ndarray, k: int, ordered: bool = True) -> Neighbors:
        """See `contracts.Retriever.search`; in any case ordered."""
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
        return self.checked(Neighbors(best.D, self.datastore.rows_of(best.I)))
