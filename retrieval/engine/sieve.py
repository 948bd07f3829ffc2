"""Finds the k nearest of far more vectors than k in the inverted lists that queries visit.

Gathering all distances, as a `Visit` does, would take longer than computing them. A sample gives a
bound for each query instead, and only distances below it are kept. Where the processor multiplies
bytes four times as fast as numbers of 32 bits, products of bytes, whose errors are bounded, first
tell which vectors may be below (`Bytes`), and distances are computed for these alone.
"""

import threading
from functools import cache

import numpy as np
import torch

from neighborlm.retrieval.engine.inverted_lists import InvertedLists
from neighborlm.retrieval.engine.loops import (
    keep,
    lay_out,
    nearest_of_kept,
    round_to_bytes,
    sort_by_query,
)
from neighborlm.retrieval.engine.parallel import scratch
from neighborlm.retrieval.engine.processor import multiply_bytes
from neighborlm.retrieval.engine.selection import sort_rows
from neighborlm.retrieval.engine.visit import Take, Visit

ROOM = 3 << 19
"""Distances that one piece of memory holds: no fewer than a block has."""


class Kept:
    """Pairs of a query and a vector below its bound, in the order in which they were found.

    Attributes:
        queries: int32 `[ROOM]`, numbers of the queries.
        places: int64 `[ROOM]`, where in `InvertedLists.ids` the vectors' ids are.
        distances: fp32 `[ROOM]`.
        n: how many pairs there are.
    """

    def __init__(self) -> None:
        self.queries = np.empty(ROOM, dtype=np.int32)
        self.places = np.empty(ROOM, dtype=np.int64)
        self.distances = np.empty(ROOM, dtype=np.float32)
        self.n = 0


class Pieces:
    """As many `Kept` as are needed, of 24 MB each. Later searches use them again, since allocating
    memory takes longer than writing to it."""

    def __init__(self) -> None:
        self.all: list[Kept] = []
        self.used = 0

    def clear(self) -> None:
        """Forgets what was kept."""
        self.used = 0

    def last(self, needed: int) -> Kept:
        """A piece with room for so many more pairs.

        Raises:
            ValueError: they are more than a piece holds.
        """
        if self.used:
            piece = self.all[self.used - 1]
            if len(piece.distances) - piece.n >= needed:
                return piece
        if self.used == len(self.all):
            self.all.append(Kept())
        piece = self.all[self.used]
        if len(piece.distances) < needed:
            raise ValueError(f"room for {needed} distances, more than {len(piece.distances)}")
        piece.n = 0
        self.used += 1
        return piece


_memory = threading.local()


def rounding(dim: int) -> np.float32:
    """An upper bound of the relative error of a sum of `dim` products in fp32."""
    return np.float32((dim + 4) * 2.0**-23)


class Numbers:
    """Tells by products of fp32 numbers which vectors are below the bounds.

    A distance, without the query's squared length, is `scale_q scale_x` times a product, plus the
    vector's squared length, with an error of at most `error_q length_x + length_q error_x`.

    Args:
        similar: whether large products are near, not small distances.
        queries: fp32 `[Q, d]`, finite.
        bounds: fp32 `[Q]`.

    Attributes:
        left: `[Q, d]`, the queries as they are multiplied.
        of_queries: fp32 `[Q, 4]`: scale, length, error, and the bound less the squared length.
        multiply: the matrix product.
        type: dtype of the product.
    """

    multiply = staticmethod(torch.mm)
    type = np.float32

    def __init__(self, similar: bool, queries: np.ndarray, bounds: np.ndarray) -> None:
        self.similar = similar
        self.queries = queries
        self.bounds = bounds
        self.slack = rounding(queries.shape[1])
        self.left, scales, _, errors, lengths = self.rounded(queries)
        limits = bounds + self.slack * np.abs(bounds)
        if not similar:
            limits -= (1 - self.slack) * lengths**2
        factor = np.float32(1 if similar else 2)
        columns = (-factor * scales, factor * lengths, factor * errors, limits)
        self.of_queries = np.stack(columns, axis=1)

    def of(self, vectors: np.ndarray, squares: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Vectors fp32 `[m, d]`, with squared lengths `[m]`, as they are multiplied, `[d, m]`; and
        fp32 `[4, m]`: scale, length when rounded, error, and squared length."""
        right, scales, rounded, errors, lengths = self.rounded(vectors)
        errors = errors + self.slack * lengths
        return right.T, np.stack([scales, rounded, errors, (1 - self.slack) * squares])

    @staticmethod
    def rounded(vectors: np.ndarray) -> tuple[torch.Tensor, *tuple[np.ndarray, ...]]:
        """Vectors fp32 `[m, d]` as they are multiplied, and fp32 `[m]` each: the scale, and the
        lengths of the rounded vector, of the error and of the vector. Nothing is rounded here."""
        lengths = np.linalg.norm(vectors, axis=1)
        ones, zeros = np.ones_like(lengths), np.zeros_like(lengths)
        return torch.from_numpy(vectors), ones, lengths, zeros, lengths


class Bytes(Numbers):
    """Tells by products of bytes which vectors may be below the bounds.

    With queries q = Q + e_Q and vectors x = X + e_X, where Q and X are bytes times a scale of each,
    the product q x differs from Q X by no more than |e_Q| |X| + |q| |e_X| (Cauchy-Schwarz).
    """

    multiply = staticmethod(multiply_bytes)
    type = np.int32

    @staticmethod
    def rounded(vectors: np.ndarray) -> tuple[torch.Tensor, *tuple[np.ndarray, ...]]:
        """See `Numbers.rounded`."""
        rounded = np.empty(vectors.shape, dtype=np.int8)
        return torch.from_numpy(rounded), *round_to_bytes(vectors, rounded)


class Sieve:
    """Finds what a `Visit` finds, but keeps only distances below a bound.

    The sample of a query is every `stride`-th vector that it visits, and its bound is the distance
    of the r-th nearest of these. About k / stride of its k nearest vectors are in the sample; r is
    so much larger that fewer than k vectors below the bound are improbable. Queries that have
    fewer, for example because many vectors are equal, are left to a `Visit`: the result does not
    depend on the sample.

    Args:
        search: the lists.
        k: neighbours to select.
        visited: vectors that a query visits, on average.
        ordered: nearest first.

    Attributes:
        bytes_a_query: memory that a query needs.
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
        """Passes the nearest vectors of some queries to `take`.

        Args:
            part: int64 `[n]`, numbers of the queries.
            queries, lists: fp32 `[Q, d]` and int64 `[Q, probes]`, of all queries.

        Returns:
            bool `[n]`, which queries of `part` are left to a `Visit`.
        """
        queries, lists = queries[part], lists[part]
        bounds = Visit(self.search, queries, lists, self.rank, stride=self.stride).farthest()
        pieces = self._kept(queries - self.search.middle, lists, bounds)
        of_pieces = np.zeros((len(pieces), len(part)), dtype=np.int64)
        for number, piece in enumerate(pieces):
            of_pieces[number] = np.bincount(piece.queries[: piece.n], minlength=len(part))
        counts = of_pieces.sum(0)
        rows = np.cumsum(counts) - counts
        total = int(counts.sum())
        distances, places = scratch("kept", total), scratch("places", total, np.int64)

        def bring_together(number: int) -> None:
            piece, free = pieces[number], rows + of_pieces[:number].sum(0)
            kept = (piece.queries[: piece.n], piece.places, piece.distances)
            sort_by_query(*kept, free, places, distances)

        self.search.map(bring_together, range(len(pieces)))
        enough, step = np.flatnonzero(counts >= self.k), self.search.limits.group

        def select(first: int) -> None:
            group = enough[first : first + step]
            found = np.empty((len(group), self.k), dtype=np.float32)
            ids = np.empty((len(group), self.k), dtype=np.int64)
            kept = (distances, places, rows[group], counts[group])
            nearest_of_kept(*kept, self.search.ids, found, ids)
            if self.ordered:
                found, nearest = sort_rows(found)
                ids = np.take(ids, nearest)
            take(part[group], -found if self.search.similar else found, ids)

        self.search.map(select, range(0, len(enough), step))
        return counts < self.k

    def _kept(self, queries: np.ndarray, lists: np.ndarray, bounds: np.ndarray) -> list[Kept]:
        """The vectors below the bounds fp32 `[n]`, found in several ranges of lists at a time."""
        search, limits = self.search, self.search.limits
        visitors, bounds_of_lists, _, _ = lay_out(lists, search.sizes)
        visits = np.diff(bounds_of_lists)
        by_bytes = limits.by_bytes and search.ivf.d > 1  # see `multiply_bytes`
        first = (Bytes if by_bytes else Numbers)(search.similar, queries, bounds)
        work = np.cumsum(visits * search.sizes)
        shares = work[-1] * np.arange(1, search.threads) // search.threads
        ranges = np.split(np.arange(len(visits)), np.searchsorted(work, shares))
        exactly = cache(lambda: Numbers(search.similar, queries, bounds))
        memory = vars(_memory).setdefault("of_ranges", [])
        memory.extend(Pieces() for _ in ranges[len(memory) :])

        def sift(of_range: int) -> list[Kept]:
            pieces, by, seemed, below = memory[of_range], first, 0, 0
            pieces.clear()
            numbers = ranges[of_range]
            for number in numbers[visits[numbers] > 0].tolist():
                who = visitors[bounds_of_lists[number] : bounds_of_lists[number + 1]]
                computed, kept = self._sift_list(number, who, by, pieces)
                seemed, below = seemed + computed, below + kept
                if by is first and seemed > limits.too_many * (below + limits.sieve_queries):
                    by = exactly()
            return pieces.all[: pieces.used]

        return [piece for found in search.map(sift, range(len(ranges))) for piece in found]

    def _sift_list(
        self, number: int, who: np.ndarray, by: Numbers, pieces: Pieces
    ) -> tuple[int, int]:
        """Keeps the vectors of a list that are below the bounds of the queries that visit it.

        Args:
            number: of the list.
            who: int64 `[n]`, numbers of the queries.
            by: tells which vectors may be near.
            pieces: where they are kept.

        Returns:
            how many distances were computed, and how many are kept.
        """
        search, computed, kept = self.search, 0, 0
        step, width = search.limits.sieve_queries, search.limits.sieve_vectors
        left, of_queries = by.left[torch.from_numpy(who)], by.of_queries[who]
        for column in range(0, int(search.sizes[number]), width):
            vectors, squares, _ = search.vectors([number], slice(column, column + width))
            right, of_vectors = by.of(vectors, squares)
            place = int(search.ids_at[number]) + column
            for row in range(0, len(who), step):
                rows = slice(row, row + step)
                products = scratch("products", len(who[rows]) * len(vectors), by.type)
                piece = pieces.last(len(products))
                products, before = products.reshape(-1, len(vectors)), piece.n
                by.multiply(left[rows], right, out=torch.from_numpy(products))
                compared = (products, of_queries[rows], of_vectors)
                these = (who[rows], by.queries, vectors, by.bounds, by.similar, place)
                where = (piece.queries, piece.places, piece.distances, before)
                piece.n, more = keep(*compared, *these, *where)
                computed, kept = computed + more, kept + piece.n - before
        return computed, kept
