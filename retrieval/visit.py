"""The k nearest of all vectors of the inverted lists that queries visit.

One matrix product a list gives the distances of all queries that visit it; those of a query lie in
a row, from which a partition cuts the k nearest off.
"""

import itertools
import threading

import numpy as np
from numpy.typing import DTypeLike

from retrieval.inverted_lists import InvertedLists
from retrieval.parallel import product
from retrieval.retriever import Take
from retrieval.selection import k_smallest, kth_smallest, sort_rows

GROUP = 64
"""Queries whose nearest are selected at a time: their distances stay in the cache."""
BLOCK = 1 << 19
"""Distances of a list that are computed at a time, for the same reason."""

_memory = threading.local()


def scratch(size: int, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Memory `[size]`, one of each type, that this thread uses again and again: new memory costs
    more than what is written to it."""
    name = np.dtype(dtype).name
    if len(getattr(_memory, name, ())) < size:
        setattr(_memory, name, np.empty(size, dtype))
    return getattr(_memory, name)[:size]


class Visit:
    """Distances of some queries to all vectors of the lists they visit.

    They lie in one buffer, a row a query; queries are in the order of how many there are, in groups
    of `GROUP` with rows of one width, filled up with infinity.

    Args:
        search: where.
        queries: fp32 `[Q, d]`.
        lists: int64 `[Q, probes]`.
        k: neighbours to select.
        ordered: nearest first.
        stride: of each list look at every so-manieth vector only.
    """

    def __init__(
        self,
        search: InvertedLists,
        queries: np.ndarray,
        lists: np.ndarray,
        k: int,
        ordered: bool = True,
        stride: int = 1,
    ) -> None:
        self.search = search
        self.k = k
        self.ordered = ordered
        self.stride = stride
        self.sizes = -(-search.sizes // stride)
        found = self.sizes[lists].sum(1)
        self.order = np.argsort(found, kind="stable")
        self.lists = lists[self.order]
        self.queries = queries[self.order]
        self.found = found[self.order]
        last = np.minimum(np.arange(GROUP - 1, len(found) + GROUP - 1, GROUP), len(found) - 1)
        self.widths = np.repeat(np.maximum(self.found[last], k), GROUP)[: len(found)]
        self.rows = np.cumsum(self.widths) - self.widths
        sizes = self.sizes[self.lists]
        self.columns = np.cumsum(sizes, axis=1) - sizes
        self.buffer = scratch(int(self.widths.sum()))
        for first in range(0, len(self.rows), GROUP):
            self._values(first)[:, self.found[first] :] = np.inf  # the rest is filled by `_measure`

    def hand_over(self, take: Take, which: np.ndarray) -> None:
        """Gives what is found of the queries, whose numbers are these, to `take`."""
        self._measure()

        def select(first: int) -> None:
            take(which[self.order[first : first + GROUP]], *self._select(first))

        self.search.map(select, range(0, len(self.order), GROUP))

    def farthest(self) -> np.ndarray:
        """The distance of the k-th nearest of each query, fp32 `[Q]`; infinite where there are
        fewer."""
        self._measure()
        result = np.empty(len(self.order), dtype=np.float32)

        def find(first: int) -> None:
            group = self.order[first : first + GROUP]
            result[group] = kth_smallest(self._values(first), self.k)

        self.search.map(find, range(0, len(self.order), GROUP))
        return result

    def _values(self, first: int) -> np.ndarray:
        """The part of the buffer that is of the group from `first` on, `[n, width]`."""
        n, width = len(self.rows[first : first + GROUP]), int(self.widths[first])
        begin = int(self.rows[first])
        return self.buffer[begin : begin + n * width].reshape(n, width)

    def _measure(self) -> None:
        """Fills the buffer, list by list."""
        search = self.search
        numbers, order, bounds = search.visits(self.lists)
        visitors = order // self.lists.shape[1]
        places = (self.rows[:, None] + self.columns).ravel()[order]
        left = search.left(self.queries)

        bounds = bounds.tolist()

        def measure(part: slice) -> None:
            right, starts = search.right(numbers[part].tolist(), slice(None, None, self.stride))
            ends = bounds[part.start : part.stop + 1]
            mine = np.take(left, visitors[ends[0] : ends[-1]], axis=0)
            of_lists = zip(itertools.pairwise(ends), itertools.pairwise(starts), strict=True)
            for here, (start, end) in of_lists:
                if start == end:
                    continue
                # Windows of the list's size on the buffer, one from each of its places.
                shape = (len(self.buffer) - (end - start) + 1, end - start)
                windows = np.ndarray(shape, np.float32, self.buffer, strides=(4, 4))
                rows = max(BLOCK // (end - start), 1)
                for first in range(here[0], here[1], rows):
                    some = slice(first, min(first + rows, here[1]))
                    near = mine[some.start - ends[0] : some.stop - ends[0]]
                    block = scratch(len(near) * (end - start)).reshape(len(near), -1)
                    windows[places[some]] = product(near, right[start:end].T, out=block)

        search.map(measure, search.together(numbers, np.diff(bounds), self.stride))

    def _select(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and ids of the k nearest of a group."""
        group = slice(first, first + GROUP)
        values = self._values(first)
        n, width = values.shape
        row_starts = np.arange(0, n * width, width)[:, None]
        chosen = k_smallest(values, self.k)
        chosen += row_starts
        # From places in the buffer to places among the ids: shifted alike for all of a visit.
        bounds = (self.columns[group] + row_starts).ravel()
        counts = np.diff(np.searchsorted(chosen.ravel(), np.append(bounds, n * width)))
        shifts = self.search.ids_at[self.lists[group]].ravel() - bounds
        places = chosen.ravel() + np.repeat(shifts, counts)
        distances = np.take(values, chosen)
        if self.ordered:
            distances, nearest = sort_rows(distances)
            places = np.take(places, nearest)
        ids = np.take(self.search.ids, places, mode="clip").reshape(distances.shape)
        if self.found[first] < self.k:
            missing = np.isinf(distances)
            ids[missing], distances[missing] = -1, np.finfo(np.float32).max
        return (-distances if self.search.similar else np.maximum(distances, 0)), ids
