"""`IndexBuilder`: builds the index when a datastore has been written, or on its own."""

from collections import Counter
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from pytorch_lightning import Callback, LightningModule, Trainer

from retrieval.datastore import Datastore
from retrieval.index import NOT_BUILT, IndexBuilding, is_path, lies_in_shards, resolve
from retrieval.progress import progress_bars
from retrieval.retriever import Metric


class IndexBuilder(Callback):
    """Builds what `--knn.index` names, unless it is there already.

    Args:
        datastore: directory of the datastore, complete by the time the index is built.
        index: `auto`, `flat` or `torch` (nothing to build) or a faiss factory string.
        metric: how keys are compared.
        seed: of the training sample.
    """

    def __init__(self, datastore: Path, index: str, metric: Metric, seed: int = 1) -> None:
        self.datastore = datastore
        self.index = index
        self.metric = metric
        self.seed = seed
        self.seconds: Counter[str] = Counter()
        """Time spent in `train` and `add`; empty when nothing was built."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the datastore's writer has published it."""
        self.build()

    def build(self) -> None:
        """Builds the index now, with a progress bar; of several processes one builds and the
        others wait for it. Of a datastore in shards each gets its own, from whichever process
        comes to it first."""
        datastore = Datastore.open(self.datastore)
        factory = resolve(datastore, self.index)
        if factory in NOT_BUILT or is_path(factory):
            return
        whole = IndexBuilding(datastore, factory, self.metric, self.seed)
        if not lies_in_shards(datastore, factory, self.metric):
            self._build(whole, f"index {factory}")
            return
        with FileLock(f"{whole.path}.lock"), progress_bars(f"index {factory}") as report:
            trained = whole.train(report)
        self.seconds += Counter(whole.seconds)
        for wait in (0, -1):  # for a shard that another process is at, once there is no other
            for number in range(datastore.n_shards):
                shard = datastore.shard(number)
                building = IndexBuilding(shard, factory, self.metric, self.seed, trained)
                with suppress(Timeout):
                    self._build(building, f"index {factory}, shard {number}", wait)

    def _build(self, building: IndexBuilding, title: str, wait: float = -1) -> None:
        with FileLock(f"{building.path}.lock", timeout=wait):
            if building.is_complete():
                return
            with progress_bars(title) as report:
                building.run(report)
        self.seconds += Counter(building.seconds)
