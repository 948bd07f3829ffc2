"""The k nearest of far more vectors of inverted lists than are wanted.

Bringing all distances together, as a `Visit` does, would take longer than computing them. So a
bound is found for each query on a sample, and of all distances only those below it are kept. Where
the processor multiplies bytes four times as fast as numbers of 32 bits, products of bytes tell
first what may be below (`Bytes`), with errors that are known, and distances are computed for that
alone.
"""

import threading
from functools import cache

import numpy as np
import torch

from retrieval.compiled import compiled, summing
from retrieval.inverted_lists import InvertedLists
from retrieval.retriever import Take
from retrieval.selection import choose, sort_rows
from retrieval.visit import GROUP, Visit, scratch

ROWS, COLUMNS = 512, 1024
"""Queries and vectors whose distances are looked at together: they stay in the cache."""
TOO_MANY = 8
"""How many times more than there are may seem to be below the bound by products of bytes, for these
to be worth while."""
ROUNDING = np.float32(2**-20)
"""More than the rounding of fp32 adds to a number."""
SMALLEST = np.float32(2**-100)
"""The largest number of a vector counts as no less, so that one over its scale is finite."""
ROOM = 3 << 19
"""Distances that one piece of memory holds; at least those of a block."""


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


class Kept:
    """What is nearer to queries than their bounds, in the order in which it was found.

    Attributes:
        queries, places, distances: int32, int64 and fp32 `[ROOM]`: numbers of the queries, places
            among the ids.
        n: how many there are.
    """

    def __init__(self) -> None:
        self.queries = np.empty(ROOM, dtype=np.int32)
        self.places = np.empty(ROOM, dtype=np.int64)
        self.distances = np.empty(ROOM, dtype=np.float32)
        self.n = 0


class Pieces:
    """As many pieces of memory for what is kept as are needed, each used again by later searches:
    new memory costs more than what is written to it."""

    def __init__(self) -> None:
        self.all: list[Kept] = []
        self.used = 0

    def clear(self) -> None:
        """Forgets what was kept."""
        self.used = 0

    def last(self, needed: int) -> Kept:
        """One with room for so many more, at most `ROOM`."""
        if not self.used or ROOM - self.all[self.used - 1].n < needed:
            if self.used == len(self.all):
                self.all.append(Kept())
            self.all[self.used].n = 0
            self.used += 1
        return self.all[self.used - 1]


_memory = threading.local()


class Numbers:
    """Tells by distances what is below the bounds.

    A product of query and vector is `scale_q scale_x` times that of what is multiplied for them,
    up to `error_q length_x + length_q error_x`; these, the query's limit for the product with the
    vector's square, and the square are the rows of `of_queries` and of what `of` gives.

    Args:
        similar: whether large products are near, not small distances.
        queries: fp32 `[Q, d]`, finite.
        bounds: fp32 `[Q]`.

    Attributes:
        left: `[Q, d]`, what is multiplied.
        of_queries: fp32 `[4, Q]`: scale, error, length and limit.
        multiply: the matrix product.
        type: of what it gives.
    """

    multiply = staticmethod(torch.mm)
    type = np.float32

    def __init__(self, similar: bool, queries: np.ndarray, bounds: np.ndarray) -> None:
        self.left = torch.from_numpy(queries)
        self.of_queries = np.zeros((4, len(queries)), dtype=np.float32)
        self.of_queries[0] = -1 if similar else -2
        self.of_queries[3] = bounds if similar else bounds - np.vecdot(queries, queries)

    def of(self, vectors: np.ndarray, squares: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """For vectors fp32 `[m, d]` and their squared lengths `[m]`, what `left` is multiplied
        with, `[d, m]`, and fp32 `[4, m]`: scale, length, error and square."""
        of_vectors = np.zeros((4, len(vectors)), dtype=np.float32)
        of_vectors[0], of_vectors[3] = 1, squares
        return torch.from_numpy(vectors).T, of_vectors


class Bytes:
    """Tells what is below the bounds, and a little more, by products of bytes.

    With queries q = Q + e_Q and vectors x = X + e_X, where Q and X are bytes times a scale of each,
    the product q x differs from Q X by no more than |e_Q| |X| + |q| |e_X| (Cauchy-Schwarz).

    Args, attributes: see `Numbers`.
    """

    multiply = staticmethod(getattr(torch, "_int_mm", None))
    type = np.int32

    def __init__(self, similar: bool, queries: np.ndarray, bounds: np.ndarray) -> None:
        left = np.empty(queries.shape, dtype=np.int8)
        scales, _, errors, lengths = _round(queries, left)
        self.left = torch.from_numpy(left)
        factor = np.float32(1 if similar else 2)
        limits = bounds + ROUNDING * np.abs(bounds)
        if not similar:
            limits -= (1 - ROUNDING) * lengths**2
        self.of_queries = np.stack([-factor * scales, factor * errors, factor * lengths, limits])

    def of(self, vectors: np.ndarray, squares: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """See `Numbers.of`."""
        right = np.empty(vectors.shape, dtype=np.int8)
        scales, rounded, errors, lengths = _round(vectors, right)
        errors += ROUNDING * lengths
        of_vectors = np.stack([scales, rounded, errors, (1 - ROUNDING) * squares])
        return torch.from_numpy(right).T, of_vectors


@summing
def _round(vectors, rounded):
    """Rounds vectors fp32 `[m, d]` to int8 times a scale of each.

    Returns:
        fp32 `[4, m]`: the scale, the length of the rounded vector, of the error, and of the vector.
        Where it is not finite the error is infinite, and the rest zero.
    """
    result = np.zeros((4, len(vectors)), dtype=np.float32)
    for i in range(len(vectors)):
        vector, whole = vectors[i], rounded[i]
        bits, of_largest = vector.view(np.int32), np.int32(0)
        for j in range(len(bits)):  # without the sign they ascend with the size
            of_largest = max(of_largest, np.int32(bits[j] & np.int32(0x7FFFFFFF)))
        largest = np.int32(of_largest).view(np.float32)
        if not largest < np.inf:
            whole[:] = 0
            result[2, i] = np.inf
            continue
        scale = max(largest, SMALLEST) / np.float32(127)
        inverse = np.float32(1) / scale
        length = off = of_rounded = np.float32(0)
        for j in range(len(vector)):
            steps = np.int32(np.int32(vector[j] * inverse + np.float32(128.5)) - np.int32(128))
            whole[j] = steps
            near = np.float32(steps) * scale
            length += vector[j] * vector[j]
            of_rounded += near * near
            off += (vector[j] - near) * (vector[j] - near)
        result[0, i], result[1, i] = scale, of_rounded**0.5
        result[2, i], result[3, i] = off**0.5, length**0.5
    return result


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
        self.stride = min(max(visited // 4096, 8), 64)
        in_sample = k / self.stride
        self.rank = int(in_sample + 4 * in_sample**0.5 + 4)
        kept = 28 * self.stride * self.rank  # numbers, places and distances, and copies of two
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
        pieces = self._kept(queries - self.search.middle, lists, bounds)
        of_pieces = [np.bincount(piece.queries[: piece.n], minlength=len(part)) for piece in pieces]
        counts = np.sum(of_pieces, axis=0)
        rows = np.cumsum(counts) - counts
        distances, places = scratch(int(counts.sum())), scratch(int(counts.sum()), np.int64)

        def bring_together(number: int) -> None:
            piece, free = pieces[number], rows + np.sum(of_pieces[:number], axis=0, dtype=np.int64)
            kept = (piece.queries[: piece.n], piece.places, piece.distances)
            _bring_together(*kept, free, places, distances)

        self.search.map(bring_together, range(len(pieces)))
        enough = np.flatnonzero(counts >= self.k)

        def select(first: int) -> None:
            group = enough[first : first + GROUP]
            found = np.empty((len(group), self.k), dtype=np.float32)
            ids = np.empty((len(group), self.k), dtype=np.int64)
            kept = (distances, places, rows[group], counts[group])
            _nearest(*kept, self.search.ids, found, ids)
            if self.ordered:
                found, nearest = sort_rows(found)
                ids = np.take(ids, nearest)
            take(part[group], -found if self.search.similar else found, ids)

        self.search.map(select, range(0, len(enough), GROUP))
        return counts < self.k

    def _kept(self, queries: np.ndarray, lists: np.ndarray, bounds: np.ndarray) -> list[Kept]:
        """What is nearer than the bounds fp32 `[n]`, of ascending ranges of lists."""
        search = self.search
        numbers, order, firsts = search.visits(lists)
        visitors = order // lists.shape[1]
        first = (Bytes if bytes_pay() else Numbers)(search.similar, queries, bounds)
        work = np.cumsum(np.diff(firsts) * search.sizes[numbers])
        shares = work[-1] * np.arange(1, search.threads) // search.threads
        ranges = np.split(np.arange(len(numbers)), np.searchsorted(work, shares))
        exactly = cache(lambda: Numbers(search.similar, queries, bounds))

        memory = vars(_memory).setdefault("of_ranges", [])
        memory.extend(Pieces() for _ in ranges[len(memory) :])

        def sift(of_range: int) -> list[Kept]:
            pieces, by, seemed, below = memory[of_range], first, 0, 0
            pieces.clear()
            for i in ranges[of_range].tolist():
                number, who = int(numbers[i]), visitors[firsts[i] : firsts[i + 1]]
                size, at = int(search.sizes[number]), int(search.ids_at[number])
                left, of_queries = by.left[torch.from_numpy(who)], by.of_queries[:, who]
                for column in range(0, size, COLUMNS):
                    part = slice(column, min(column + COLUMNS, size))
                    vectors, squares, _ = search.vectors([number], part)
                    right, of_vectors = by.of(vectors, squares)
                    for row in range(0, len(who), ROWS):
                        rows = slice(row, row + ROWS)
                        of_both = scratch(len(who[rows]) * len(vectors), by.type)
                        piece = pieces.last(len(of_both))
                        of_both, before = of_both.reshape(-1, len(vectors)), piece.n
                        by.multiply(left[rows], right, out=torch.from_numpy(of_both))
                        products = (of_both, of_queries[:, rows], of_vectors)
                        these = (who[rows], queries, vectors, bounds, search.similar, at + column)
                        kept = (piece.queries, piece.places, piece.distances, before)
                        piece.n, more = keep(*products, *these, *kept)
                        seemed, below = seemed + more, below + piece.n - before
                if by is first and seemed > TOO_MANY * (below + ROWS):
                    by = exactly()
            return pieces.all[: pieces.used]

        return [piece for found in search.map(sift, range(len(ranges))) for piece in found]


@summing
def keep(
    of_both,
    of_queries,
    of_vectors,
    who,
    queries,
    vectors,
    bounds,
    similar,
    at,
    kept_queries,
    kept_places,
    kept_distances,
    n,
):
    """Computes the distances of what may be near, and keeps those below the bounds.

    Args:
        of_both: fp32 or int32 `[n, m]`, products.
        of_queries, of_vectors: fp32 `[4, n]` and `[4, m]`, see `Numbers`.
        who: int64 `[n]`, the queries.
        queries, vectors: fp32 `[Q, d]` and `[m, d]`.
        bounds: fp32 `[Q]`.
        similar: whether large products are near.
        at: the place of the first vector.
        kept_queries, kept_places, kept_distances: see `Kept`.
        n: how many there are already.

    Returns:
        how many there are then, and how many distances were computed.
    """
    width = of_both.shape[1]
    scales, lengths = of_vectors[0], of_vectors[1]
    errors, squares = of_vectors[2], of_vectors[3]
    below = np.zeros((width + 7) // 8 * 8, dtype=np.uint8)
    eights = below.view(np.uint64)  # of which most are zero
    near = np.empty(len(below), dtype=np.int32)
    computed = 0
    for i in range(len(who)):
        row = of_both[i]
        scale, error = of_queries[0, i], of_queries[1, i]
        length, limit = of_queries[2, i], of_queries[3, i]
        for j in range(width):
            least = squares[j] - error * lengths[j] - length * errors[j]
            below[j] = np.float32(row[j]) * (scale * scales[j]) + least < limit
        some = 0
        for eight in range(len(eights)):
            if eights[eight]:
                for j in range(8 * eight, 8 * eight + 8):
                    near[some] = j
                    some += below[j]
        computed += some
        query, bound = who[i], bounds[who[i]]
        for number in range(some):  # no function of its own: arrays as arguments cost more than it
            vector = near[number]
            distance = np.float32(0)
            if similar:
                for j in range(queries.shape[1]):
                    distance -= queries[query, j] * vectors[vector, j]
            else:
                for j in range(queries.shape[1]):
                    difference = queries[query, j] - vectors[vector, j]
                    distance += difference * difference
            kept_queries[n], kept_places[n], kept_distances[n] = query, at + vector, distance
            n += distance < bound
    return n, computed


@compiled
def _bring_together(queries, places, distances, free, places_of_rows, distances_of_rows):
    """Writes what was kept of each query to where the next of its row is free."""
    for i in range(len(queries)):
        place = free[queries[i]]
        places_of_rows[place], distances_of_rows[place] = places[i], distances[i]
        free[queries[i]] += 1


@compiled
def _nearest(distances, places, rows, counts, ids, nearest, ids_of_nearest):
    """Selects the k nearest, fp32 and int64 `[n, k]`, of rows that begin here and have at least so
    many."""
    k = nearest.shape[1]
    chosen = np.empty(counts.max(), dtype=np.int32)
    for i in range(len(rows)):
        row = distances[rows[i] : rows[i] + counts[i]]
        choose(row, k, chosen)
        for j in range(k):
            nearest[i, j] = row[chosen[j]]
            ids_of_nearest[i, j] = ids[places[rows[i] + chosen[j]]]
