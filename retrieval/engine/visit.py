"""Finds the k nearest of all vectors in the inverted lists that queries visit.

One matrix product a list gives the distances of all queries that visit it. The distances of a query
are then gathered from its lists, and the k nearest vectors are chosen.
"""

import itertools
from collections.abc import Callable

import numpy as np

from neighborlm.retrieval.engine.inverted_lists import InvertedLists
from neighborlm.retrieval.engine.loops import (
    farthest_of_visits,
    lay_out,
    nearest_of_visits,
    votes_of_visits,
)
from neighborlm.retrieval.engine.parallel import product, scratch
from neighborlm.retrieval.engine.selection import sort_rows
from neighborlm.retrieval.engine.votes import Ballot, no_votes

Take = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Receives numbers of queries int64 `[n]` with the distances fp32 and the ids int64 `[n, k]` of
their nearest vectors; called for some queries at a time, from several threads."""


class Visit:
    """The distances of some queries to all vectors of the lists that they visit.

    The distances to the vectors of a list lie together, one row for each query that visits it.
    Squared distances lack the query's squared length, which does not change their order.

    Args:
        search: the lists.
        queries: fp32 `[Q, d]`, finite.
        lists: int64 `[Q, probes]`.
        k: neighbours to select.
        ordered: nearest first.
        stride: visits only every `stride`-th vector of a list; use `farthest` alone then.
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
        self.lists = lists
        self.k = k
        self.ordered = ordered
        self.stride = stride
        sizes = -(-search.sizes // stride)
        self.sizes = sizes[lists]
        self.visitors, self.bounds, self.begins, self.rows = lay_out(lists, sizes)
        self.queries = queries - search.middle
        self.lengths = np.zeros(len(queries), dtype=np.float32)
        if not search.similar:
            np.vecdot(self.queries, self.queries, out=self.lengths)
        room = search.limits.visit_bytes // 4
        self.buffer = scratch("distances", int(self.sizes.sum()), room=room)

    def hand_over(self, take: Take, which: np.ndarray) -> None:
        """Passes the nearest vectors of the queries to `take`; `which` are the queries' numbers."""
        self._measure()

        def select(group: slice) -> None:
            take(which[group], *self._select(group))

        self._by_groups(select)

    def vote(self, ballot: Ballot, which: np.ndarray) -> None:
        """Counts the votes of the nearest vectors; `which` are the queries' numbers."""
        search = self.search
        self._measure()
        visits = np.diff(self.bounds)
        sizes = np.where(visits > 0, search.sizes, 0)
        ends = np.cumsum(sizes)
        at = ends - sizes
        values = np.empty(ends[-1], dtype=np.int32)
        counts = np.empty(0 if ballot.counts is None else ends[-1], dtype=np.float32)

        def look_up(numbers: list[int]) -> None:
            ids = np.concatenate([search.ids_of(number) for number in numbers])
            part = slice(at[numbers[0]], ends[numbers[-1]])
            values[part] = ballot.values[ids]
            if ballot.counts is not None:
                counts[part] = ballot.counts[ids]

        search.map(look_up, search.together(visits))
        targets = ballot.targets[which]
        least = np.float32(-np.inf if search.similar else 0)

        def count(group: slice) -> None:
            lists, lengths = self.lists[group], self.lengths[group]
            votes = no_votes(len(lists))
            of_lists = (self.rows[group], self.sizes[group], at[lists], values, counts)
            asked = (lengths, least, targets[group], self.k, ballot.temperature)
            votes_of_visits(self.buffer, *of_lists, *asked, *votes)
            ballot.write(which[group], votes)

        self._by_groups(count)

    def farthest(self) -> np.ndarray:
        """The distance of each query's k-th nearest vector, fp32 `[Q]`; infinite where there are
        fewer."""
        self._measure()
        result = np.empty(len(self.rows), dtype=np.float32)

        def find(group: slice) -> None:
            of_lists = (self.rows[group], self.sizes[group])
            farthest_of_visits(self.buffer, *of_lists, self.k, result[group])

        self._by_groups(find)
        return result + self.lengths

    def _by_groups(self, work: Callable[[slice], None]) -> None:
        """Calls `work` for `Limits.group` queries at a time, in several threads."""
        step = self.search.limits.group
        firsts = range(0, len(self.rows), step)
        self.search.map(work, [slice(first, first + step) for first in firsts])

    def _measure(self) -> None:
        """Fills the buffer with distances, list by list."""
        search, bounds, begins = self.search, self.bounds.tolist(), self.begins.tolist()
        more = not search.similar
        n, d = self.queries.shape
        left = scratch("queries", n * (d + more)).reshape(n, d + more)
        np.multiply(self.queries, np.float32(-1 if search.similar else -2), out=left[:, :d])
        left[:, d:] = 1

        def measure(numbers: list[int]) -> None:
            vectors, squares, starts = search.vectors(numbers, slice(None, None, self.stride), more)
            if more:
                vectors[:, -1] = squares
            first, last = bounds[numbers[0]], bounds[numbers[-1] + 1]
            mine = scratch("visitors", (last - first) * left.shape[1])
            mine = mine.reshape(-1, left.shape[1])
            np.take(left, self.visitors[first:last], axis=0, out=mine, mode="clip")
            for number, (start, end) in zip(numbers, itertools.pairwise(starts), strict=True):
                near = mine[bounds[number] - first : bounds[number + 1] - first]
                block = self.buffer[begins[number] :][: len(near) * (end - start)]
                product(near, vectors[start:end].T, out=block.reshape(len(near), -1))

        search.map(measure, search.together(np.diff(self.bounds), self.stride))

    def _select(self, group: slice) -> tuple[np.ndarray, np.ndarray]:
        """Distances fp32 and ids int64 `[n, k]` of the k nearest vectors of a group of queries."""
        search, rows = self.search, self.rows[group]
        distances = np.empty((len(rows), self.k), dtype=np.float32)
        ids = np.empty((len(rows), self.k), dtype=np.int64)
        of_lists = (rows, self.sizes[group], search.ids_at[self.lists[group]])
        nearest_of_visits(self.buffer, *of_lists, search.ids, self.lengths[group], distances, ids)
        if self.ordered:
            distances, nearest = sort_rows(distances)
            ids = np.take(ids, nearest)
        return (-distances if search.similar else np.maximum(distances, 0)), ids
