"""The k nearest of far more vectors of inverted lists than are wanted.

Bringing all distances together, as a `Visit` does, would take longer than computing them. So a
bound is found for each query on a sample, and of all distances only those below it are kept. Where
the processor multiplies bytes four times as fast as numbers of 32 bits, products of bytes tell
first what may be below (`Bytes`), with errors that are known, and distances are computed for that
alone.
"""

import math
from collections.abc import Callable
from functools import cache, cached_property
from typing import NamedTuple

import faiss
import numpy as np
import torch

from retrieval.inverted_lists import InvertedLists
from retrieval.parallel import product
from retrieval.retriever import Take
from retrieval.selection import k_smallest, sort_rows
from retrieval.visit import GROUP, Visit, scratch

ROWS, COLUMNS = 512, 1024
"""Queries and vectors whose distances are looked at together: they stay in the cache."""
LENGTHS = 4
"""Bytes of a vector that stand for its squared length."""
TOO_MANY = 8
"""How many times more than there are may seem to be below the bound by products of bytes, for these
to be worth while."""
COMMON = 0.99
"""Share of the queries whose largest number decides the scale of all."""
LIMIT = 2**30
"""More than any product of bytes comes to, and a number that fp32 and int32 both have."""


@cache
def bytes_are_exact() -> bool:
    """Whether torch multiplies bytes without losing any bit. On processors that lack instructions
    for it sums of pairs are cut off at 16 bits."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch, "_int_mm")):
        return False
    one = torch.full((33, 260), 127, dtype=torch.int8)
    one[1::3], one[2::3, ::2] = -127, -127
    found = torch._int_mm(one.repeat(8, 1), one.T)
    return torch.equal(found.double(), one.repeat(8, 1).double() @ one.T.double())


@cache
def bytes_pay() -> bool:
    """Whether products of bytes are likely to be worth while here."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and bytes_are_exact()


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


Sift = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, int]]
"""From numbers of queries int64 `[n]`, to what is nearer to them than their bounds: where it is in
the array of all distances `[n, m]`, flattened, int64 ascending, these distances fp32, and how many
were computed."""


class Numbers:
    """Computes all distances, and those that are near again, one by one: large terms of the first,
    |q|^2 - 2 q x + |x|^2, cancel. So what is found does not depend on how it was sifted.

    Args:
        lists: whose vectors are compared.
        queries: fp32 `[n, d]`, finite.
        bounds: fp32 `[n]`.
    """

    def __init__(self, lists: InvertedLists, queries: np.ndarray, bounds: np.ndarray) -> None:
        self.lists = lists
        self.queries = queries - lists.middle
        self.bounds = bounds
        self.left = lists.left(queries)

    def sift(self, number: int, which: slice) -> Sift:
        """Compares with some vectors of a list."""
        right = self.lists.right([number], which)[0]
        vectors = np.ascontiguousarray(right[:, : self.lists.ivf.d])

        def sift(who: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
            block = scratch(len(who) * len(right)).reshape(len(who), -1)
            product(np.take(self.left, who, axis=0), right.T, out=block)
            near = true_places(block < self.bounds[who, None])
            return near, distances_at(near, who, self, vectors), len(near)

        return sift


class Bytes:
    """Computes the distances that may be below the bounds.

    With queries a = A + e_A and vectors x = X + e_X, where A and X are bytes times a scale, the
    product a x differs from A X by no more than |a| |e_X| + |e_A| |X| (Cauchy-Schwarz), up to the
    rounding of fp32. Squared lengths of vectors are further columns of X.

    Args:
        lists, queries, bounds: see `Numbers`.
    """

    def __init__(self, lists: InvertedLists, queries: np.ndarray, bounds: np.ndarray) -> None:
        self.lists = lists
        self.given = queries
        self.queries = queries - lists.middle
        self.bounds = bounds
        factor = 1 if lists.similar else 2
        # A query with larger numbers than nearly all others has the larger error.
        largest = np.quantile(np.abs(self.queries).max(axis=1), COMMON)
        scale = max(float(largest), float(np.finfo(np.float32).tiny)) / 127
        rounded = np.clip(np.rint(self.queries / scale), -127, 127)
        self.scale = factor * scale
        self.errors = factor * np.linalg.norm(self.queries - rounded * scale, axis=1)
        lengths = np.linalg.norm(self.queries, axis=1)
        self.lengths = factor * lengths
        self.below = bounds if lists.similar else bounds - lengths**2
        self.left = np.empty((len(queries), lists.ivf.d + LENGTHS), dtype=np.int8)
        self.left[:, : lists.ivf.d] = -rounded
        self.left[:, lists.ivf.d :] = 127
        self.left[:, -1] = 1

    @cached_property
    def exactly(self) -> Numbers:
        """The same for all distances."""
        return Numbers(self.lists, self.given, self.bounds)

    def sift(self, number: int, which: slice) -> Sift:
        """Compares with some vectors of a list."""
        d = self.lists.ivf.d
        vectors = self.lists.vectors([number], which)[0]
        squares = np.zeros(len(vectors), dtype=np.float32)
        if not self.lists.similar:
            np.vecdot(vectors, vectors, out=squares)
        middle = (float(squares.max()) + float(squares.min())) / 2
        reach = (float(squares.max()) - middle) / (self.scale * 126 * 127 * (LENGTHS - 1))
        scale = max(abs(float(vectors.max())), abs(float(vectors.min()))) / 127
        scale = max(scale, reach, float(np.finfo(np.float32).tiny))
        if not math.isfinite(scale + middle + reach):
            return self.exactly.sift(number, which)
        rounded = torch.from_numpy(vectors).div(scale).round_()
        right = torch.empty(len(vectors), d + LENGTHS, dtype=torch.int8)
        right[:, :d] = rounded
        unit = scale * self.scale
        steps = np.rint((squares - middle) / unit).astype(np.int32)
        high = (steps + 63) // 127  # of which each column takes its share, rounded down or up
        for column in range(LENGTHS - 1):
            right[:, d + column] = torch.from_numpy((high + column) // (LENGTHS - 1))
        right[:, -1] = torch.from_numpy(steps - 127 * high)
        rounded = rounded.mul_(scale).numpy()
        longest = np.vecdot(rounded, rounded).max() ** 0.5
        np.subtract(vectors, rounded, out=rounded)
        farthest_off = np.vecdot(rounded, rounded).max() ** 0.5

        def sift(who: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
            error = self.errors[who] * longest + self.lengths[who] * farthest_off
            limits = np.ceil((self.below[who] - middle + error) / unit) + 2
            limits = np.clip(limits, -LIMIT, LIMIT).astype(np.int32)
            left = torch.from_numpy(np.take(self.left, who, axis=0))
            block = scratch(len(who) * len(vectors), np.int32).reshape(len(who), -1)
            torch._int_mm(left, right.T, out=torch.from_numpy(block))
            near = true_places(block < limits[:, None])
            distances = distances_at(near, who, self, vectors)
            bounds = np.repeat(self.bounds[who], counts_of_rows(near, len(who), len(vectors)))
            below = np.flatnonzero(distances < bounds)
            return np.take(near, below), np.take(distances, below), len(near)

        return sift


def distances_at(
    places: np.ndarray, who: np.ndarray, by: Numbers | Bytes, vectors: np.ndarray
) -> np.ndarray:
    """Distances fp32 `[n]` at some places int64 `[n]` of the array of all, flattened; less is
    nearer.

    Args:
        who: int64 `[m]`, numbers of the queries, one a row.
        vectors: fp32 `[v, d]`, one a column.
    """
    similar, d = by.lists.similar, vectors.shape[1]
    pairwise = faiss.pairwise_indexed_inner_product if similar else faiss.pairwise_indexed_L2sqr
    rows, columns = np.divmod(places, len(vectors))
    distances = np.empty(len(places), dtype=np.float32)
    arrays = (by.queries, np.take(who, rows), vectors, columns, distances)
    pairwise(d, len(places), *map(faiss.swig_ptr, arrays))
    return -distances if similar else distances


def counts_of_rows(places: np.ndarray, rows: int, width: int) -> np.ndarray:
    """How many of the ascending places are in each row, int64 `[rows]`."""
    return np.diff(np.searchsorted(places, np.arange(rows + 1) * width))


def true_places(mask: np.ndarray) -> np.ndarray:
    """`np.flatnonzero` of a contiguous array of bools with few true ones, eight at a time."""
    flat = mask.ravel()
    eights = flat[: len(flat) // 8 * 8].view(np.uint64)
    some = np.flatnonzero(eights != 0)
    inside = np.flatnonzero(eights[some].view(bool))
    rest = np.flatnonzero(flat[8 * len(eights) :]) + 8 * len(eights)
    return np.concatenate([8 * some[inside >> 3] + (inside & 7), rest])


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

    Attributes:
        bytes_a_query: that are needed in memory.
    """

    def __init__(self, search: InvertedLists, k: int, visited: int, ordered: bool) -> None:
        self.search = search
        self.k = k
        self.ordered = ordered
        self.stride = min(max(visited // 8192, 8), 64)
        in_sample = k / self.stride
        self.rank = int(in_sample + 5 * in_sample**0.5 + 5)
        kept = 32 * self.stride * self.rank  # a number, a place and a distance, and their copies
        self.bytes_a_query = max(kept, 4 * visited // self.stride)

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
            if not enough.any():
                return
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
        first = (Bytes if bytes_pay() else Numbers)(search, queries, bounds)
        work = np.cumsum(np.diff(firsts) * search.sizes[numbers])
        shares = work[-1] * np.arange(1, search.threads) // search.threads
        ranges = np.split(np.arange(len(numbers)), np.searchsorted(work, shares))

        def sift(mine: np.ndarray) -> list[Kept]:
            found, by, computed, below = [], first, 0, 0
            for i in mine.tolist():
                number = int(numbers[i])
                size, at = int(search.sizes[number]), int(search.ids_at[number])
                for column in range(0, size, COLUMNS):
                    width = min(COLUMNS, size - column)
                    nearer = by.sift(number, slice(column, column + width))
                    for row in range(int(firsts[i]), int(firsts[i + 1]), ROWS):
                        who = visitors[row : min(row + ROWS, int(firsts[i + 1]))]
                        near, distances, n = nearer(who)
                        counts = counts_of_rows(near, len(who), width)
                        shifts = at + column - np.arange(len(who)) * width
                        places = near + np.repeat(shifts, counts)
                        found.append(Kept(who, counts, places, distances))
                        computed, below = computed + n, below + len(near)
                    if by is first and computed > TOO_MANY * (below + ROWS):
                        by = first.exactly
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
