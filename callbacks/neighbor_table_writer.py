"""`NeighborTableWriter`: searches the neighbours of every token of a split; the ranks share the
result."""

import time
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from filelock import Timeout

from neighborlm.common.contracts import Retriever
from neighborlm.common.progress import progress_bars
from neighborlm.retrieval.cluster.distributed import open_distributed
from neighborlm.retrieval.neighbors.tables import (
    NeighborSearch,
    NeighborTable,
    TableSettings,
    find_table,
    lock_of_tables,
)
from neighborlm.retrieval.search.index import Search, is_path, open_retriever, resolve
from neighborlm.retrieval.store.artifact import Job, share_out
from neighborlm.retrieval.store.datastore import Datastore


class NeighborTableWriter:
    """Makes the neighbour table of a split, unless one that serves is there already.

    Args:
        queries: directory of the split's own datastore, complete by the time of the search.
        memory: directory of the datastore to search; so must its index be.
        search: by which index, metric and number of probes.
        k: neighbours a token.
        exclude_window: of a split that searches itself, leave out the rows less than this many
            tokens away.
        shard: the one of the memory's shards that this host has, where hosts have one each; of
            `queries` too where that is the same datastore.
    """

    def __init__(
        self,
        queries: Path,
        memory: Path,
        search: Search,
        k: int,
        exclude_window: int = 0,
        shard: int | None = None,
    ) -> None:
        self.queries = queries
        self.memory = memory
        self.search = search
        self.k = k
        self.exclude_window = exclude_window
        self.shard = shard
        self.seconds = 0.0
        """Time of the search; 0 when nothing was searched."""

    def build(self) -> NeighborTable:
        """Makes the table now, with a progress bar; of several processes one searches and the
        others wait for it. Of a split in shards each gets its own, from whichever process comes to
        it first.

        Where hosts have a shard each, all processes call this: one of each host asks for its own
        tokens, and all search.

        Returns:
            the smallest table that has k neighbours or more.
        """
        memory = Datastore.open(self.memory, self.shard)
        queries = memory if self.queries == self.memory else Datastore.open(self.queries)
        search = self.search
        name = resolve(memory, search.index)
        name = Path(name).name if is_path(name) else name
        settings = TableSettings(search.metric, name, search.nprobe, self.k, self.exclude_window)
        parts = queries.shards() or [queries]

        @cache
        def retriever() -> Retriever:
            if self.shard is None:  # each process searches for other tokens, by itself
                return open_retriever(memory, search)
            return open_distributed(memory, search)

        def work(number: int) -> None:
            start = time.perf_counter()
            filling = NeighborSearch(parts[number], memory, retriever(), settings)
            shard = f", shard {number}" if len(parts) > 1 else ""
            with progress_bars(f"neighbours k={self.k} of {self.queries.name}{shard}") as report:
                filling.run(report)
            self.seconds += time.perf_counter() - start

        jobs = [
            Job(
                lock_of_tables(part, self.k),
                lambda part=part: find_table(part, memory, settings) is not None,
                partial(work, number),
            )
            for number, part in enumerate(parts)
        ]
        if self.shard is None:
            share_out(jobs)
        else:
            retriever().begin_pass()
            with suppress(Timeout), jobs[0].lock.acquire(timeout=0):
                for job in jobs:
                    if not job.is_done():
                        job.work()
            retriever().end_pass()
        return find_table(queries, memory, settings)
