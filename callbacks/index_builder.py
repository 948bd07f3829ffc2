"""`IndexBuilder`: builds the index when a datastore has been written, or on its own."""

from collections import Counter
from pathlib import Path

from filelock import FileLock
from pytorch_lightning import Callback, LightningModule, Trainer

from neighborlm.common.progress import progress_bars
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import Search, is_factory, lies_in_shards, resolve
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.shards import share_out


class IndexBuilder(Callback):
    """Builds what `--knn.index` names, unless it is there already.

    Args:
        datastore: directory of the datastore, complete by the time the index is built.
        search: by what; kinds of index that need no building and files are left alone.
        seed: of the training sample.
        shard: index this one alone, by a quantiser trained on its keys unless one lies beside the
            manifest of the whole.
    """

    def __init__(
        self,
        datastore: Path,
        search: Search,
        seed: int = 1,
        shard: int | None = None,
    ) -> None:
        self.datastore = datastore
        self.search = search
        self.seed = seed
        self.shard = shard
        self.seconds: Counter[str] = Counter()
        """Time spent in `train` and `add`; empty when nothing was built."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the datastore's writer has published it."""
        self.build()

    def build(self) -> None:
        """Builds the index now, with a progress bar; of several processes one builds and the
        others wait for it. Of a datastore in shards each gets its own, from whichever process
        comes to it first."""
        datastore = Datastore.open(self.datastore, self.shard)
        factory, metric = resolve(datastore, self.search.index), self.search.metric
        if not is_factory(factory):
            return
        whole = IndexBuilding(datastore, factory, metric, self.seed)
        if self.shard is None and not lies_in_shards(datastore, self.search):
            with FileLock(f"{whole.path}.lock"):
                self._build(whole, f"index {factory}")
            return
        with FileLock(f"{whole.path}.lock"), progress_bars(f"index {factory}") as report:
            trained = whole.train(report)
        self.seconds += Counter(whole.seconds)
        shards = [
            IndexBuilding(shard, factory, metric, self.seed, trained)
            for shard in datastore.shards() or [datastore]
        ]
        share_out(
            [FileLock(f"{shard.path}.lock") for shard in shards],
            lambda i: self._build(
                shards[i], f"index {factory}, shard {shards[i].datastore.part.number}"
            ),
        )

    def _build(self, building: IndexBuilding, title: str) -> None:
        if building.is_complete():
            return
        with progress_bars(title) as report:
            building.run(report)
        self.seconds += Counter(building.seconds)
