"""Searches the inverted lists of a faiss index for many queries at a time.

faiss visits the lists of one query after another and keeps the k nearest in a heap; for k = 1024
the heap takes longer than the distances. Here each list is decoded once, one matrix product gives
the distances of all queries that visit it, and the k nearest of each query are selected (`Visit`).
Where a query visits many more vectors than k, only distances below a bound are kept (`Sieve`), so
that many more queries can share the decoded vectors. A few queries share no lists; where they are
of half-precision vectors, one loop reads them and a selection takes the place of the heap
(`search_each`).
"""

import itertools
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from neighborlm.common.contracts import Neighbors, Votes
from neighborlm.retrieval.engine.inverted_lists import InvertedLists, stores_halves
from neighborlm.retrieval.engine.loops import measure_halves, nearest_of_visits
from neighborlm.retrieval.engine.parallel import scratch
from neighborlm.retrieval.engine.selection import sort_rows
from neighborlm.retrieval.engine.sieve import Sieve
from neighborlm.retrieval.engine.visit import Take, Visit
from neighborlm.retrieval.engine.votes import Ballot

LITTLE = 1 << 24
"""Numbers of vectors that the calling thread reads in less time than it takes to have other threads
do it, while those of a model's matrix products wait for the next one on the same cores."""


class ListSearch(InvertedLists):
    """Finds what `faiss.Index.search` finds: it visits the same lists and measures distances to the
    decoded vectors. It uses as many threads as faiss would."""

    def pays(self, queries: int) -> bool:
        """Whether so many queries share lists often enough for this search to be the faster one."""
        return queries * self.probing.most >= self.limits.queries_a_list * self.ivf.nlist

    def search(self, queries: np.ndarray, k: int, ordered: bool = True) -> Neighbors:
        """The k nearest vectors of the lists that are visited.

        Args:
            queries: fp32 `[Q, d]`.
            ordered: nearest first, the missing last; otherwise in any order.

        Returns:
            neighbours whose rows are ids of the index, without values.
        """
        distances = np.empty((len(queries), k), dtype=np.float32)
        ids = np.empty((len(queries), k), dtype=np.int64)

        def write(which: np.ndarray, *found: np.ndarray) -> None:
            distances[which], ids[which] = found

        def select(visit: Visit, part: np.ndarray) -> None:
            visit.hand_over(write, part)

        self._search(queries, k, write, select, ordered)
        return Neighbors(distances, ids)

    @property
    def reads_halves(self) -> bool:
        """Whether `search_each` can search."""
        return stores_halves(self.ivf) and not self.ivf.by_residual

    def search_each(self, queries: np.ndarray, k: int, ordered: bool = True) -> Neighbors:
        """As `search`, query by query: faster for a few, which share no lists. Where there is more
        to read than `LITTLE`, threads share the lists, even those of one query."""
        self.threads = faiss.omp_get_max_threads()
        finite = np.isfinite(queries).all(axis=1)
        lists = self.nearest(queries)  # none for a query that is not finite
        queries = np.where(finite[:, None], queries, np.float32(0))
        sizes = self.sizes[lists]
        ends = np.cumsum(sizes).reshape(sizes.shape)
        rows = ends - sizes
        distances = scratch("distances", int(sizes.sum()))
        begins = (self.codes_at[lists] - self._odd) // 2
        numbers = np.broadcast_to(np.arange(len(lists))[:, None], lists.shape)
        visits = [column.ravel() for column in (begins, sizes, numbers, rows)]

        def measure(part: slice) -> None:
            begin, size, number, row = (column[part] for column in visits)
            of_lists = (self._halves, begin, size)
            measure_halves(*of_lists, queries, number, self.similar, row, distances)

        is_little = len(distances) * self.ivf.d <= LITTLE
        if is_little:
            measure(slice(None))
        else:
            shares = len(distances) * np.arange(1, self.threads) // self.threads
            cuts = [0, *np.searchsorted(ends.ravel(), shares).tolist(), ends.size]
            self.map(measure, [slice(*part) for part in itertools.pairwise(cuts)])
        found = np.empty((len(queries), k), dtype=np.float32)
        ids = np.empty((len(queries), k), dtype=np.int64)
        ids_at, lengths = self.ids_at[lists], np.zeros(len(queries), dtype=np.float32)

        def select(part: slice) -> None:
            of_visits = (distances, rows[part], sizes[part], ids_at[part], self.ids)
            nearest_of_visits(*of_visits, lengths[part], found[part], ids[part])

        if is_little:
            select(slice(None))
        else:
            step = -(-len(queries) // self.threads)
            self.map(select, [slice(at, at + step) for at in range(0, len(queries), step)])
        if ordered:
            found, nearest = sort_rows(found)
            ids = np.take(ids, nearest)
        return Neighbors(-found if self.similar else found, ids)

    def vote(
        self,
        queries: np.ndarray,
        k: int,
        values: Any,
        targets: np.ndarray,
        temperature: float,
        counts: Any = None,
    ) -> Votes:
        """The votes for targets of the k nearest vectors of the lists that are visited; the
        neighbours themselves are not gathered.

        Args:
            queries: fp32 `[Q, d]`.
            values: unsigned `[N]` or like it, indexed by arrays of the index's ids.
            targets: int64 `[Q]`.
            temperature: divides the scores.
            counts: as `values`, for how many entries each stands; None where each is one.
        """
        ballot = Ballot(values, targets, temperature, self.similar, counts)

        def vote(visit: Visit, part: np.ndarray) -> None:
            visit.vote(ballot, part)

        self._search(queries, k, ballot.count, vote, ordered=False)
        return ballot.votes

    def _search(
        self,
        queries: np.ndarray,
        k: int,
        take: Take,
        finish: Callable[[Visit, np.ndarray], None],
        ordered: bool,
    ) -> None:
        """Passes neighbours that a sieve finds to `take`, and for all other queries a `Visit` to
        `finish`, each with the numbers of the queries."""
        limits, self.threads = self.limits, faiss.omp_get_max_threads()
        lists = self.nearest(queries)  # none for a query that is not finite
        finite = np.isfinite(queries).all(axis=1)
        if not finite.all():
            queries = np.where(finite[:, None], queries, np.float32(0))
        visited = self.sizes[lists].sum(1)
        ranks = np.take(self.probing.ranks, lists[:, 0], mode="clip")  # the empty list has no rank
        everyone = np.argsort(ranks, kind="stable")  # those that share lists lie together
        left = everyone
        if limits.sieve_pays(visited.mean(), k):
            sieve = Sieve(self, k, int(visited.mean()), ordered)
            at_once = max(limits.sieve_bytes // sieve.bytes_a_query, 1)
            parts = np.array_split(everyone, -(-len(queries) // at_once))
            left = [part[sieve.hand_over(take, part, queries, lists)] for part in parts]
            left = np.concatenate(left)
        if not len(left):
            return
        sizes = 4 * np.maximum(visited[left], k)
        room = max(limits.visit_bytes - sizes.max(), sizes.max())  # a part may take a query more
        sizes = np.cumsum(sizes)
        parts = -(-int(sizes[-1]) // int(room))  # alike, as each decodes what it visits
        cuts = np.searchsorted(sizes, sizes[-1] * np.arange(1, parts) // parts)
        for part in filter(len, np.split(left, cuts)):
            finish(Visit(self, queries[part], lists[part], k, ordered), part)
