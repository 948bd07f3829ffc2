"""The k nearest of all vectors of the inverted lists that queries visit.

One matrix product a list gives the distances of all queries that visit it; those of a query are
brought together, and the k nearest are chosen.
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
from neighborlm.retrieval.memories.knn import Votes
from neighborlm.retrieval.search.retriever import Take

BUFFER_BYTES = 64 << 20
"""What the distances of the queries that are worked on at a time may take."""
GROUP = 128
"""Queries whose nearest are selected at a time: their distances stay in the cache."""


class Visit:
    """Distances of some queries to all vectors of the lists they visit.

    Those of the queries that visit a list lie together, a row a query. Squared distances lack the
    query's squared length, which changes no order.

    Args:
        search: where.
        queries: fp32 `[Q, d]`, finite.
        lists: int64 `[Q, probes]`.
        k: neighbours to select.
        ordered: nearest first.
        stride: of each list look at every so-manieth vector only; then `farthest` alone is right.
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
        self.buffer = scratch("distances", int(self.sizes.sum()), room=BUFFER_BYTES // 4)

    def hand_over(self, take: Take, which: np.ndarray) -> None:
        """Gives what is found of the queries, whose numbers are these, to `take`."""
        self._measure()

        def select(first: int) -> None:
            take(which[first : first + GROUP], *self._select(slice(first, first + GROUP)))

        self.search.map(select, range(0, len(which), GROUP))

    def vote(self, votes: Votes, which: np.ndarray, values_of: Callable[..., np.ndarray]) -> None:
        """Counts the votes of what is found of the queries, whose numbers are these.

        Args:
            values_of: gives the values, of the shape of the ids.
        """
        search = self.search
        self._measure()
        visits = np.diff(self.bounds)
        sizes = np.where(visits > 0, search.sizes, 0)
        ends = np.cumsum(sizes)
        at = ends - sizes
        values = np.empty(ends[-1], dtype=np.int32)

        def look_up(numbers: list[int]) -> None:
            ids = [search.ids_of(number) for number in numbers]
            values[at[numbers[0]] : ends[numbers[-1]]] = values_of(np.concatenate(ids))

        search.map(look_up, search.together(visits))
        targets = votes.targets[which].astype(np.int32)
        least = np.float32(-np.inf if search.similar else 0)

        def count(first: int) -> None:
            group = slice(first, first + GROUP)
            lists, lengths = self.lists[group], self.lengths[group]
            said = np.empty((3, len(lists)), dtype=np.float32)
            of_lists = (self.rows[group], self.sizes[group], at[lists], values)
            asked = (lengths, least, targets[group], self.k, np.float32(votes.temperature))
            votes_of_visits(self.buffer, *of_lists, *asked, said)
            votes.said[:, which[group]] = said

        search.map(count, range(0, len(which), GROUP))

    def farthest(self) -> np.ndarray:
        """The distance of the k-th nearest of each query, fp32 `[Q]`; infinite where there are
        fewer."""
        self._measure()
        result = np.empty(len(self.rows), dtype=np.float32)

        def find(first: int) -> None:
            group = slice(first, first + GROUP)
            farthest_of_visits(
                self.buffer, self.rows[group], self.sizes[group], self.k, result[group]
            )

        self.search.map(find, range(0, len(self.rows), GROUP))
        return result + self.lengths

    def _measure(self) -> None:
        """Fills the buffer, list by list."""
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
        """Distances and ids of the k nearest of a group."""
        search, rows = self.search, self.rows[group]
        distances = np.empty((len(rows), self.k), dtype=np.float32)
        ids = np.empty((len(rows), self.k), dtype=np.int64)
        of_lists = (rows, self.sizes[group], search.ids_at[self.lists[group]])
        nearest_of_visits(self.buffer, *of_lists, search.ids, self.lengths[group], distances, ids)
        if self.ordered:
            distances, nearest = sort_rows(distances)
            ids = np.take(ids, nearest)
        return (-distances if search.similar else np.maximum(distances, 0)), ids
