"""`NeighborTableWriter`: searches the neighbours of every token of a split when its datastore has
been written, or on its own."""

import time
from pathlib import Path

from filelock import FileLock
from pytorch_lightning import Callback, LightningModule, Trainer

from retrieval.datastore import Datastore
from retrieval.index import is_path, open_retriever, resolve
from retrieval.neighbors import NeighborSearch, NeighborTable, find_table
from retrieval.progress import progress_bars
from retrieval.retriever import Metric


class NeighborTableWriter(Callback):
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
        keep_distances: keep them beside the rows.
    """

    def __init__(
        self,
        queries: Path,
        memory: Path,
        index: str,
        metric: Metric,
        nprobe: int,
        k: int,
        exclude_window: int = 0,
        keep_distances: bool = False,
    ) -> None:
        self.queries = queries
        self.memory = memory
        self.index = index
        self.metric: Metric = metric
        self.nprobe = nprobe
        self.k = k
        self.exclude_window = exclude_window
        self.keep_distances = keep_distances
        self.seconds: float | None = None
        """Time of the search; None when nothing was searched."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the datastore's writer has published it."""
        self.build()

    def build(self) -> NeighborTable:
        """Makes the table now, with a progress bar; of several processes one searches and the
        others wait for it.

        Returns:
            the smallest table that has k neighbours or more.
        """
        queries, memory = Datastore.open(self.queries), Datastore.open(self.memory)
        name = resolve(memory, self.index)
        name = Path(name).name if is_path(name) else name
        with FileLock(queries.path / f"neighbors-k{self.k}.lock"):
            table = find_table(
                queries,
                memory,
                self.metric,
                name,
                self.nprobe,
                self.k,
                self.exclude_window,
                self.keep_distances,
            )
            if table is not None:
                return table
            search = NeighborSearch(
                queries,
                memory,
                open_retriever(memory, self.index, self.metric, self.nprobe),
                name,
                self.nprobe,
                self.k,
                self.exclude_window,
                self.keep_distances,
            )
            start = time.perf_counter()
            with progress_bars(f"neighbours k={self.k}") as report:
                table = search.run(report)
        self.seconds = time.perf_counter() - start
        return table
