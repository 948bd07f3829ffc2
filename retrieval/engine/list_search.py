"""Searches the inverted lists of a faiss index for many queries at a time.

faiss visits the lists of one query after another, and keeps the k nearest in a heap: for k = 1024
the heap costs more than the distances. Here each list is decoded once, one matrix product gives the
distances of all queries that visit it, and the k nearest of each query are cut off (`Visit`). Where
a query visits many times more vectors than it has neighbours, all but those nearer than a bound are
dropped at once (`Sieve`), so that many more queries share what is decoded.
"""

from collections.abc import Callable

import faiss
import numpy as np

from neighborlm.retrieval.engine.inverted_lists import InvertedLists
from neighborlm.retrieval.engine.sieve import Sieve
from neighborlm.retrieval.engine.visit import BUFFER_BYTES, Visit
from neighborlm.retrieval.memories.knn import Votes
from neighborlm.retrieval.search.retriever import Take

KEPT_BYTES = 256 << 20
"""What a `Sieve` keeps of the queries that are worked on at a time may take."""
QUERIES_A_LIST = 4
"""Queries that must visit a list, on average, for this to be worth while."""
MANY, AT_LEAST = 32, 1 << 14
"""Vectors that a query visits, for each of its neighbours and in all, from which on a `Sieve` is
faster."""


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
        """As `search`, but what is found of a few queries is handed over at once: it is in the
        cache then, and not all of it need be in memory.

        Args:
            take: gets numbers of queries, their distances and ids, once for every query, from
                several threads at the same time.
        """

        def hand_over(visit: Visit, part: np.ndarray) -> None:
            visit.hand_over(take, part)

        self._search(queries, k, take, hand_over, ordered)

    def vote(
        self, queries: np.ndarray, k: int, votes: Votes, values_of: Callable[..., np.ndarray]
    ) -> None:
        """See `Retriever.vote`.

        Args:
            values_of: gives the values, of the shape of the ids.
        """

        def take(which: np.ndarray, distances: np.ndarray, ids: np.ndarray) -> None:
            votes.take(which, distances, ids, values_of(ids))

        def vote(visit: Visit, part: np.ndarray) -> None:
            visit.vote(votes, part, values_of)

        self._search(queries, k, take, vote, ordered=False)

    def _search(
        self,
        queries: np.ndarray,
        k: int,
        take: Take,
        go: Callable[[Visit, np.ndarray], None],
        ordered: bool,
    ) -> None:
        """Gives what a sieve finds to `take`, and the visits of the other queries to `go`."""
        self.threads = faiss.omp_get_max_threads()
        lists = self.nearest(queries)  # none for a query that is not finite
        finite = np.isfinite(queries).all(axis=1)
        if not finite.all():
            queries = np.where(finite[:, None], queries, np.float32(0))
        visited = self.sizes[lists].sum(1)
        ranks = np.take(self.probing.ranks, lists[:, 0], mode="clip")  # nobody has the empty one's
        everyone = np.argsort(ranks, kind="stable")  # those that share lists lie together
        left = everyone
        if sieve_pays(visited.mean(), k):
            sieve = Sieve(self, k, int(visited.mean()), ordered)
            at_once = max(KEPT_BYTES // sieve.bytes_a_query, 1)
            parts = np.array_split(everyone, -(-len(queries) // at_once))
            left = [part[sieve.hand_over(take, part, queries, lists)] for part in parts]
            left = np.concatenate(left)
        if not len(left):
            return
        sizes = 4 * np.maximum(visited[left], k)
        room = max(BUFFER_BYTES - sizes.max(), sizes.max())  # a part may take one query more
        sizes = np.cumsum(sizes)
        parts = -(-int(sizes[-1]) // int(room))  # alike, as each decodes what it visits
        cuts = np.searchsorted(sizes, sizes[-1] * np.arange(1, parts) // parts)
        for part in filter(len, np.split(left, cuts)):
            go(Visit(self, queries[part], lists[part], k, ordered), part)


def sieve_pays(visited: float, k: int) -> bool:
    """Whether queries that visit so many vectors, on average, had better go through a `Sieve`."""
    return visited >= max(MANY * k, AT_LEAST)
