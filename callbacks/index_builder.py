"""`IndexBuilder`: builds the index when a datastore has been written, or on its own."""

from pathlib import Path

from filelock import FileLock
from pytorch_lightning import Callback, LightningModule, Trainer

from retrieval.datastore import Datastore
from retrieval.index import NOT_BUILT, IndexBuilding, is_path, resolve
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
        self.seconds: dict[str, float] = {}
        """Time spent in `train` and `add`; empty when nothing was built."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the datastore's writer has published it."""
        self.build()

    def build(self) -> None:
        """Builds the index now, with a progress bar; of several processes one builds and the
        others wait for it."""
        datastore = Datastore.open(self.datastore)
        factory = resolve(datastore, self.index)
        if factory in NOT_BUILT or is_path(factory):
            return
        building = IndexBuilding(datastore, factory, self.metric, self.seed)
        with FileLock(f"{building.path}.lock"):
            if building.is_complete():
                return
            with progress_bars(f"index {factory}") as report:
                building.run(report)
        self.seconds = building.seconds
