"""Searches the inverted lists of a faiss index for many queries at a time.

faiss visits the lists of one query after another, and keeps the k nearest in a heap: for k = 1024
the heap costs more than the distances. Here each list is decoded once, one matrix product gives the
distances of all queries that visit it, and the k nearest of each query are cut off by a partition
(`Visit`). Where a query visits many times more vectors than it has neighbours, all but those nearer
than a bound are dropped at once (`Sieve`), so that many more queries share what is decoded.
"""

import itertools
import threading
from typing import NamedTuple

import faiss
import numpy as np
from numpy.typing import DTypeLike

from retrieval.inverted_lists import InvertedLists
from retrieval.parallel import product
from retrieval.retriever import Take
from retrieval.selection import k_smallest, kth_smallest, sort_rows

BUFFER_BYTES = 320 << 20
"""What the distances of the queries that are worked on at a time may take."""
GROUP = 64
"""Queries whose nearest are selected at a time: their distances stay in the cache."""
QUERIES_A_LIST = 4
"""Queries that must visit a list, on average, for this to be worth while."""
MANY, AT_LEAST = 32, 1 << 14
"""Vectors that a query visits, for each of its neighbours and in all, from which on a `Sieve` is
faster."""
ROWS, COLUMNS = 512, 1024
"""Queries and vectors whose distances a sieve looks at together: they stay in the cache."""


class ListSearch(InvertedLists):
    """Finds what `faiss.Index.search` finds: the same lists are visited, and distances are those to
    the vectors that the codes stand for."""

    def pays(self, queries: int) -> bool:
        """Whether so many queries share lists often enough."""
        return queries * self.probing.most >= QUERIES_A_LIST * self.ivf.nlist

    def search(
        self, queries: np.ndarray, k: int, ordered: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of the lists that are visited; by as many threads as faiss would take
        here.

        Args:
            queries: fp32 `[Q, d]`.
            ordered: nearest first, the missing last; otherwise in any order.

        Returns:
            distances fp32 and ids int64 `[Q, k]`; -1 where missing.
        """
        distances = np.empty((len(queries), k), dtype=np.float32)
        ids = np.empty((len(queries), k), dtype=np.int64)

        def write(which: np.ndarray, *found: np.ndarray) -> None:
            distances[which], ids[which] = found

        self.search_in_parts(queries, k, write, ordered)
        return distances, ids

    def search_in_parts(self, queries: np.ndarray, k: int, take: Take, ordered: bool) -> None:
        """As `search`; see `Retriever.search_in_parts`."""
        self.threads = faiss.omp_get_max_threads()
        lists = self.nearest(queries)
        visited = self.sizes[lists].sum(1)
        everyone = np.arange(len(queries))
        left = everyone
        if sieve_pays(visited.mean(), k):
            sieve = Sieve(self, k, int(visited.mean()), ordered)
            parts = np.array_split(everyone, -(-len(queries) // sieve.queries_at_once))
            left = [part[sieve.hand_over(take, part, queries, lists)] for part in parts]
            left = np.concatenate(left)
        bytes_so_far = np.cumsum(4 * np.maximum(visited[left], k))
        cuts = np.flatnonzero(np.diff(bytes_so_far // BUFFER_BYTES)) + 1
        for part in np.split(left, cuts) if len(left) else ():
            Visit(self, queries[part], lists[part], k, ordered).hand_over(take, part)


def sieve_pays(visited: float, k: int) -> bool:
    """Whether queries that visit so many vectors, on average, had better go through a `Sieve`."""
    return visited >= max(MANY * k, AT_LEAST)


_memory = threading.local()


def scratch(size: int, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Memory `[size]`, one of each type, that this thread uses again and again: new memory costs
    more than what is written to it."""
    name = np.dtype(dtype).name
    if len(getattr(_memory, name, ())) < size:
        setattr(_memory, name, np.empty(size, dtype))
    return getattr(_memory, name)[:size]


def true_places(mask: np.ndarray) -> np.ndarray:
    """`np.flatnonzero` of a contiguous array of bools with few true ones, eight at a time."""
    flat = mask.ravel()
    eights = flat[: len(flat) // 8 * 8].view(np.uint64)
    some = np.flatnonzero(eights != 0)
    inside = np.flatnonzero(eights[some].view(bool))
    rest = np.flatnonzero(flat[8 * len(eights) :]) + 8 * len(eights)
    return np.concatenate([8 * some[inside >> 3] + (inside & 7), rest])


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
        search: ListSearch,
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

        def measure(some: slice) -> None:
            right, starts = search.right(numbers[some].tolist(), slice(None, None, self.stride))
            ends = bounds[some.start : some.stop + 1]
            mine = np.take(left, visitors[ends[0] : ends[-1]], axis=0)
            for here, (start, end) in zip(itertools.pairwise(ends), itertools.pairwise(starts)):
                if start == end:
                    continue
                # Windows of the list's size on the buffer, one from each of its places.
                shape = (len(self.buffer) - (end - start) + 1, end - start)
                windows = np.ndarray(shape, np.float32, self.buffer, strides=(4, 4))
                near = mine[here[0] - ends[0] : here[1] - ends[0]]
                block = scratch(len(near) * (end - start)).reshape(len(near), -1)
                windows[places[slice(*here)]] = product(near, right[start:end].T, out=block)

        search.map(measure, search.together(numbers, self.stride))

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


class Kept(NamedTuple):
    """What is nearer than their bounds to some queries, of some vectors of a list.

    Attributes:
        queries: int64 `[n]`.
        counts: int64 `[n]`, how many are kept of each.
        places, distances: int64 and fp32 `[sum of counts]`, places among the ids.
    """

    queries: np.ndarray
    counts: np.ndarray
    places: np.ndarray
    distances: np.ndarray


class Sieve:
    """Finds what a `Visit` finds, keeping of all distances only those below a bound.

    The bound of a query is the distance of the r-th nearest of every `stride`-th vector that it
    visits: of its k nearest about k / stride are among these, and r is so much larger that fewer
    than k vectors below it are improbable. Queries that have fewer, such as where many vectors are
    the same, are left to a `Visit`: what is found does not depend on the sample.

    Args:
        search: where.
        k: neighbours to select.
        visited: vectors that a query visits, on average.
        ordered: nearest first.
    """

    def __init__(self, search: ListSearch, k: int, visited: int, ordered: bool) -> None:
        self.search = search
        self.k = k
        self.ordered = ordered
        self.stride = min(max(visited // 8192, 8), 64)
        in_sample = k / self.stride
        self.rank = int(in_sample + 5 * in_sample**0.5 + 5)
        kept = 32 * self.stride * self.rank  # a number, a place and a distance, and their copies
        self.queries_at_once = max(BUFFER_BYTES // max(kept, 4 * visited // self.stride), 1)

    def hand_over(
        self, take: Take, part: np.ndarray, queries: np.ndarray, lists: np.ndarray
    ) -> np.ndarray:
        """Gives what is found of some queries to `take`.

        Args:
            part: int64 `[n]`, which queries.
            queries, lists: fp32 `[Q, d]` and int64 `[Q, probes]`.

        Returns:
            those of `part` that are left to a `Visit`, bool `[n]`.
        """
        queries, lists = queries[part], lists[part]
        bounds = Visit(self.search, queries, lists, self.rank, stride=self.stride).farthest()
        kept = self._kept(queries, lists, bounds)
        of_ranges = np.zeros((len(kept), len(part)), dtype=np.int64)
        for counts, parts in zip(of_ranges, kept, strict=True):
            for of_block in parts:
                counts[of_block.queries] += of_block.counts
        counts = of_ranges.sum(0)
        firsts = np.arange(0, len(part), GROUP)
        widths = np.repeat(np.maximum(np.maximum.reduceat(counts, firsts), self.k), GROUP)
        rows = (np.cumsum(widths) - widths)[: len(part)]
        distances_kept = scratch(int(widths[: len(part)].sum()))
        places_kept = scratch(len(distances_kept), np.int64)

        def of_group(first: int) -> slice:
            n = len(part[first : first + GROUP])
            return slice(int(rows[first]), int(rows[first] + n * widths[first]))

        for first in firsts.tolist():
            of_queries = distances_kept[of_group(first)].reshape(-1, widths[first])
            of_queries[:, counts[first : first + GROUP].min() :] = np.inf

        def place(number: int) -> None:
            free = rows + of_ranges[:number].sum(0)
            for queries, counts, places, values in kept[number]:
                before = np.cumsum(counts) - counts
                at = np.repeat(free[queries] - before, counts) + np.arange(len(values))
                distances_kept[at], places_kept[at] = values, places
                free[queries] += counts

        self.search.map(place, range(len(kept)))

        def select(first: int) -> None:
            here, width = of_group(first), int(widths[first])
            enough = counts[first : first + GROUP] >= self.k
            found = (distances_kept[here], places_kept[here])
            group = part[first : first + GROUP][enough]
            take(group, *self._nearest(*(column.reshape(-1, width)[enough] for column in found)))

        self.search.map(select, firsts.tolist())
        return counts < self.k

    def _kept(
        self, queries: np.ndarray, lists: np.ndarray, bounds: np.ndarray
    ) -> "list[list[Kept]]":
        """What is nearer than the bounds fp32 `[n]`, of ascending ranges of lists, one a thread."""
        search = self.search
        numbers, order, firsts = search.visits(lists)
        visitors = order // lists.shape[1]
        left = search.left(queries)
        work = np.cumsum(np.diff(firsts) * search.sizes[numbers])
        shares = work[-1] * np.arange(1, search.threads) // search.threads
        ranges = np.split(np.arange(len(numbers)), np.searchsorted(work, shares))

        def sift(mine: np.ndarray) -> list[Kept]:
            found = []
            for i in mine.tolist():
                number = int(numbers[i])
                size, at = int(search.sizes[number]), int(search.ids_at[number])
                for column in range(0, size, COLUMNS):
                    right = search.right([number], slice(column, column + COLUMNS))[0].T
                    for row in range(int(firsts[i]), int(firsts[i + 1]), ROWS):
                        who = visitors[row : min(row + ROWS, int(firsts[i + 1]))]
                        block = product(left[who], right)
                        near = true_places(block < bounds[who, None])
                        starts = np.arange(len(who) + 1) * block.shape[1]
                        counts = np.diff(np.searchsorted(near, starts))
                        places = near + np.repeat(at + column - starts[:-1], counts)
                        found.append(Kept(who, counts, places, block.ravel()[near]))
            return found

        return search.map(sift, ranges)

    def _nearest(self, values: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances and ids `[n, k]` of the nearest.

        Args:
            values: fp32 `[n, width]`, distances of at least k, then infinite ones.
            places: int64 `[n, width]`, among the ids.
        """
        chosen = k_smallest(values, self.k) + np.arange(0, values.size, values.shape[1])[:, None]
        distances, places = np.take(values, chosen), np.take(places, chosen)
        if self.ordered:
            distances, nearest = sort_rows(distances)
            places = np.take(places, nearest)
        ids = np.take(self.search.ids, places)
        return (-distances if self.search.similar else np.maximum(distances, 0)), ids
