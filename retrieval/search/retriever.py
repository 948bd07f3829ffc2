"""The base class of retrievers, and the exact search by faiss.

A new retriever derives from `BaseRetriever`, implements `search`, and is entered into the registry
`search.index.INDEX_KINDS`.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType

import faiss
import numpy as np

from neighborlm.common.contracts import Metric, Neighbors, Retriever, Votes
from neighborlm.retrieval.engine import count_votes, first_out_of_order, in_parallel
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.thinning import open_weights

FAISS_METRICS = {
    "l2": faiss.METRIC_L2,
    "ip": faiss.METRIC_INNER_PRODUCT,
    "cosine": faiss.METRIC_INNER_PRODUCT,
}
AT_ONCE = 128
"""Queries whose neighbours are worked on at a time, so that they stay in the cache."""


class BaseRetriever(Retriever):
    """A retriever without its search: votes are counted among the neighbours that `search` finds,
    and there are no other ranks to search with.

    Attributes:
        datastore: the datastore that is searched.
        metric: how keys are compared.
        exact: whether distances are those to the stored keys, not to codes of them.
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
        """The votes of the k nearest keys of queries fp32 `[Q, d]` for targets int64 `[Q]`."""
        found = with_values(self.search(queries, k, ordered=False), self.datastore)
        counts = counts_of(found.rows, self.merged_counts)
        return votes_of(found, targets, temperature, self.metric, counts)

    @cached_property
    def merged_counts(self) -> np.ndarray | None:
        """For how many entries each row of the datastore stands; None where for itself."""
        return open_weights(self.datastore)

    def prepare(self) -> None:
        """Loads the compiled loops, which a first search would wait for."""
        one = np.zeros((1, 1), dtype=np.float32), *2 * (np.zeros((1, 1), dtype=np.int64),)
        votes_of(Neighbors(*one), np.zeros(1, dtype=np.int64), 1.0, self.metric)
        self.checked(Neighbors(*one))

    def begin_pass(self) -> None:
        """Does nothing: there are no other ranks to wait for."""

    def end_pass(self) -> None:
        """Does nothing: there are no other ranks to search for."""

    def checked(self, found: Neighbors) -> Neighbors:
        """Returns the neighbours after a check, which takes next to no time, that they are in
        order.

        Raises:
            RuntimeError: they are not.
        """
        query = first_out_of_order(found.distances, found.rows, self.metric != "l2")
        if query >= 0:
            raise RuntimeError(
                f"{self.name}: the neighbours of query {query} are out of order; expected the "
                "nearest first and the missing last"
            )
        return found


def votes_of(
    neighbors: Neighbors,
    targets: np.ndarray,
    temperature: float,
    metric: Metric,
    counts: np.ndarray | None = None,
) -> Votes:
    """Counts the votes of neighbours with values for targets, by as many threads as faiss would
    use.

    Args:
        neighbors: in any order.
        targets: int64 `[Q]`.
        temperature: divides the scores.
        metric: metric of the distances.
        counts: `[Q, k]`, for how many entries each neighbour stands, see `counts_of`.
    """
    threads = faiss.omp_get_max_threads()
    return count_votes(neighbors, targets, temperature, metric != "l2", threads, counts)


def counts_of(rows: np.ndarray, counts: np.ndarray | None) -> np.ndarray | None:
    """For how many entries each row of some neighbours int64 `[Q, k]` stands, any number where it
    is -1; None where each stands for itself.

    Args:
        counts: of all rows of a datastore.
    """
    return None if counts is None else counts[np.maximum(rows, 0)]


def with_values(found: Neighbors, datastore: Datastore) -> Neighbors:
    """Neighbours with their values, which are looked up where they are missing, by as many threads
    as faiss would use."""
    if found.values is not None:
        return found
    values = np.empty(found.rows.shape, dtype=datastore.values.dtype)

    def look_up(part: slice) -> None:
        values[part] = datastore.values_of(found.rows[part])

    in_parts(look_up, len(values))
    return found._replace(values=values)


def in_parts(work: Callable[[slice], None], n: int) -> None:
    """Calls `work` for n queries, `AT_ONCE` at a time, by as many threads as faiss would use."""
    if n <= AT_ONCE:  # handing it to a thread takes longer than doing it
        work(slice(n))
        return
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
    """The distance of missing neighbours, which no other exceeds."""
    return np.finfo(np.float32).max if metric == "l2" else np.finfo(np.float32).min


def faiss_reason(error: RuntimeError | str) -> str:
    """The message of a faiss error, without the place in faiss where it arose."""
    return re.sub(r".*\.(cpp|h):\d+: ", "", str(error).strip().splitlines()[-1])


class FlatRetriever(BaseRetriever):
    """Exact search that reads all keys, block by block: no index file, no copy of the keys.

    Args:
        datastore: where to search.
        metric: how keys are compared.
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
