"""Sizes of the blocks that a search works on, and the conditions under which each of its algorithms
is the faster one."""

from dataclasses import dataclass, field

from neighborlm.retrieval.engine.processor import bytes_pay


@dataclass(frozen=True)
class Limits:
    """Settings of a `ListSearch`; the defaults suit cores with caches of one or two megabytes.

    Attributes:
        queries_a_list: mean number of queries that must visit a list for the engine to be faster
            than faiss.
        group: queries whose neighbours are selected at a time, so that their distances stay in the
            cache.
        list_bytes: bytes of vectors that are decoded together and of the queries that visit them.
        visit_bytes: bytes of the distances that a `Visit` holds.
        sieve_bytes: bytes of the distances that a `Sieve` keeps.
        sieve_from: a `Sieve` is faster than a `Visit` where a query visits at least this many
            vectors for each of its neighbours,
        sieve_from_in_all: and at least this many vectors in all.
        sieve_queries, sieve_vectors: size of the block of distances that a `Sieve` computes at a
            time, so that it stays in the cache.
        by_bytes: whether a `Sieve` multiplies bytes first.
        too_many: products of bytes are given up where they let through more than this many times
            the vectors that are below the bound.
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
        """Whether a `Sieve` is faster for queries that visit so many vectors on average."""
        return visited >= max(self.sieve_from * k, self.sieve_from_in_all)
