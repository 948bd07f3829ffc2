"""Searches the shards of a datastore one by one, and keeps the nearest neighbours of all."""

from collections.abc import Sequence

import numpy as np

from neighborlm.common.contracts import Metric, Neighbors, Retriever
from neighborlm.retrieval.engine import k_smallest, sort_rows
from neighborlm.retrieval.search.retriever import BaseRetriever, missing_distance
from neighborlm.retrieval.store.datastore import Datastore


class ShardedRetriever(BaseRetriever):
    """Several retrievers as one.

    Args:
        datastore: the whole, or the one shard of it that is searched.
        retrievers: one for each shard; they find rows of the whole.
        metric: how keys are compared.
        trained: fingerprint of the trained index that the shards' indexes began with, if any.
    """

    def __init__(
        self,
        datastore: Datastore,
        retrievers: Sequence[Retriever],
        metric: Metric,
        trained: str | None = None,
    ) -> None:
        self.datastore = datastore
        self.retrievers = retrievers
        self.metric = metric
        self.trained = trained
        self.exact = all(retriever.exact for retriever in retrievers)

    def search(self, queries: np.ndarray, k: int, ordered: bool = True) -> Neighbors:
        """See `contracts.Retriever.search`; in any case ordered."""
        found = self.retrievers[0].search(queries, k)[:2]
        for retriever in self.retrievers[1:]:
            found = nearest_of([found, retriever.search(queries, k)[:2]], k, self.metric)
        return self.checked(Neighbors(*found))


def nearest_of(
    found: Sequence[Sequence[np.ndarray]], k: int, metric: Metric
) -> tuple[np.ndarray, ...]:
    """The k nearest of several sets of neighbours of the same queries, nearest first.

    Args:
        found: of each set distances fp32, rows int64, -1 where missing, and any other columns; each
            `[Q, n]` with any n.
        k: number of neighbours.
        metric: metric of the distances.

    Returns:
        the same columns of the nearest, `[Q, k]`.
    """
    distances, rows, *others = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
    sign, farthest = np.float32(1 if metric == "l2" else -1), missing_distance("l2")
    values = np.minimum(sign * distances, farthest)
    values[(rows < 0) | np.isnan(values)] = farthest
    n, width = values.shape
    chosen = k_smallest(values, min(k, width)) + np.arange(0, n * width, width)[:, None]
    values, order = sort_rows(np.take(values, chosen))
    nearest = np.take(chosen, order)
    columns = [sign * values, *(np.take(column, nearest) for column in (rows, *others))]
    lacking = [(0, 0), (0, max(k - width, 0))]
    fill = [sign * farthest, -1, *([0] * len(others))]
    return tuple(
        np.pad(column, lacking, constant_values=value)
        for column, value in zip(columns, fill, strict=True)
    )
