"""`IndexBuilder`: builds the index of a datastore, when this has been written or at any time; one
process builds for all."""

from collections import Counter
from functools import partial
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer

from neighborlm.common.progress import progress_bars
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import Search, is_factory, lies_in_shards, resolve
from neighborlm.retrieval.search.index_recall import as_sentence
from neighborlm.retrieval.store.artifact import share_out
from neighborlm.retrieval.store.datastore import Datastore


class IndexBuilder(Callback):
    """Builds what `--knn.index` names, unless it is there already.

    Args:
        datastore: directory of the datastore, complete by the time the index is built.
        search: which index and metric; kinds of index that need no building, and files, are left
            alone.
        seed: of the training sample.
        shard: index this shard alone, by a quantiser trained on its keys unless one lies beside
            the manifest of the whole.
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
            share_out([whole.job(partial(self._build, whole, f"index {factory}"))])
            return
        with progress_bars(f"index {factory}") as report:
            share_out([whole.training_job(report)])
        self.seconds += Counter(whole.seconds)
        jobs = []
        for shard in datastore.shards() or [datastore]:
            building = IndexBuilding(shard, factory, metric, self.seed, whole.trained_path)
            title = f"index {factory}, shard {shard.part.number}"
            jobs.append(building.job(partial(self._build, building, title)))
        share_out(jobs)

    def _build(self, building: IndexBuilding, title: str) -> None:
        with progress_bars(title) as report:
            building.run(report)
        print(f"{title}: {as_sentence(building.recall)}")
        self.seconds += Counter(building.seconds)
