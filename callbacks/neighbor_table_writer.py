"""`NeighborTableWriter`: searches the neighbours of every token of a split, once for all ranks."""

import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from neighborlm.common.progress import progress_bars
from neighborlm.retrieval.cluster.distributed import open_distributed
from neighborlm.retrieval.engine.probing import NProbe
from neighborlm.retrieval.neighbors.tables import NeighborSearch, NeighborTable, find_table
from neighborlm.retrieval.search.index import is_path, open_retriever, resolve
from neighborlm.retrieval.search.retriever import Metric, Retriever
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.shards import share_out


class NeighborTableWriter:
    """Makes the neighbour table of a split, unless one that serves is there already.

    Args:
        queries: directory of the split's own datastore, complete by the time of the search.
        memory: directory of the datastore to search; so must its index be.
        index: `auto`, `flat`, a faiss factory string or the path of an index.
        metric: how keys are compared.
        nprobe: inverted lists to visit.
        k: neighbours a token.
        exclude_window: of a split that searches itself, leave out the rows less than this many
            tokens away.
        device: where the index `torch` computes.
        shard: the one of the memory's shards that this host has, where others have the others; of
            `queries` too where that is the same datastore.
    """

    def __init__(
        self,
        queries: Path,
        memory: Path,
        index: str,
        metric: Metric,
        nprobe: NProbe,
        k: int,
        exclude_window: int = 0,
        device: str | torch.device = "cpu",
        shard: int | None = None,
    ) -> None:
        self.queries = queries
        self.memory = memory
        self.index = index
        self.metric: Metric = metric
        self.nprobe = nprobe
        self.k = k
        self.exclude_window = exclude_window
        self.device = device
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
        name = resolve(memory, self.index)
        name = Path(name).name if is_path(name) else name
        made_by = (memory, self.metric, name, self.nprobe, self.k, self.exclude_window)
        parts = queries.shards() or [queries]

        @cache
        def retriever() -> Retriever:
            how = (memory, self.index, self.metric, self.nprobe, self.device)
            return open_retriever(*how) if self.shard is None else open_distributed(*how)

        def work(number: int) -> None:
            if find_table(parts[number], *made_by) is None:
                shard = f", shard {number}" if len(parts) > 1 else ""
                what = (parts[number], memory, retriever(), name)
                self._search(*what, f"neighbours k={self.k}{shard}")

        locks = [FileLock(part.path / f"neighbors-k{self.k}.lock") for part in parts]
        if self.shard is None:
            share_out(locks, work)
        else:
            retriever().connect()
            with suppress(Timeout), locks[0].acquire(timeout=0):
                for number in range(len(parts)):
                    work(number)
            retriever().serve()
        return find_table(queries, *made_by)

    def _search(
        self, queries: Datastore, memory: Datastore, retriever: Retriever, name: str, title: str
    ) -> None:
        start = time.perf_counter()
        search = NeighborSearch(
            queries,
            memory,
            retriever,
            name,
            self.nprobe,
            self.k,
            self.exclude_window,
        )
        with progress_bars(title) as report:
            search.run(report)
        self.seconds += time.perf_counter() - start
