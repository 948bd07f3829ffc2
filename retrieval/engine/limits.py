"""How much a search works on at a time, and from when on which of its ways is the faster one."""

from dataclasses import dataclass, field

from neighborlm.retrieval.engine.processor import bytes_pay


@dataclass(frozen=True)
class Limits:
    """What a `ListSearch` goes by; the defaults suit cores with caches of one or two megabytes.

    Attributes:
        queries_a_list: that must visit a list, on average, for the search to be worth while.
        group: queries whose neighbours are selected at a time: their distances stay in the cache.
        list_bytes: of vectors that are decoded together, and of queries that visit their lists.
        visit_bytes: of distances that a `Visit` holds.
        sieve_bytes: of what a `Sieve` keeps.
        sieve_from: vectors that a query visits, from which on a `Sieve` is faster than a `Visit`,
            for each of its neighbours; and in all, `sieve_from_in_all`.
        sieve_queries, sieve_vectors: whose distances a `Sieve` looks at together: they stay in the
            cache.
        by_bytes: whether a `Sieve` multiplies bytes first.
        too_many: how many times more vectors than there are below the bound may seem to be there by
            products of bytes, for these to be worth while.
    """

    queries_a_list: int = 4
    group: int = 128
    list_bytes: int = 2 << 20
    visit_bytes: int = 64 << 20
    sieve_bytes: int = 256 << 20
    sieve_from: int = 32
    sieve_from_in_all: int = 1 << 14
    sieve_queries: int = 512
    sieve_vectors: int = 1024
    by_bytes: bool = field(default_factory=bytes_pay)
    too_many: int = 8

    def sieve_pays(self, visited: float, k: int) -> bool:
        """Whether queries that visit so many vectors, on average, had better go through a
        `Sieve`."""
        return visited >= max(self.sieve_from * k, self.sieve_from_in_all)
