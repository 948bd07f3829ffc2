"""`IndexBuilder`: builds the index of a datastore, once for all processes."""

from collections import Counter
from pathlib import Path

from filelock import FileLock

from neighborlm.common.progress import progress_bars
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import NOT_BUILT, is_path, lies_in_shards, resolve
from neighborlm.retrieval.search.retriever import Metric
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.shards import share_out


class IndexBuilder:
    """Builds what `--knn.index` names, unless it is there already.

    Args:
        datastore: directory of the datastore, complete by the time the index is built.
        index: `auto`, `flat` or `torch` (nothing to build) or a faiss factory string.
        metric: how keys are compared.
        seed: of the training sample.
        shard: index this one alone, by a quantiser trained on its keys unless one lies beside the
            manifest of the whole.
    """

    def __init__(
        self,
        datastore: Path,
        index: str,
        metric: Metric,
        seed: int = 1,
        shard: int | None = None,
    ) -> None:
        self.datastore = datastore
        self.index = index
        self.metric = metric
        self.seed = seed
        self.shard = shard
        self.seconds: Counter[str] = Counter()
        """Time spent in `train` and `add`; empty when nothing was built."""

    def build(self) -> None:
        """Builds the index now, with a progress bar; of several processes one builds and the
        others wait for it. Of a datastore in shards each gets its own, from whichever process
        comes to it first."""
        datastore = Datastore.open(self.datastore, self.shard)
        factory = resolve(datastore, self.index)
        if factory in NOT_BUILT or is_path(factory):
            return
        whole = IndexBuilding(datastore, factory, self.metric, self.seed)
        if self.shard is None and not lies_in_shards(datastore, factory, self.metric):
            with FileLock(f"{whole.path}.lock"):
                self._build(whole, f"index {factory}")
            return
        with FileLock(f"{whole.path}.lock"), progress_bars(f"index {factory}") as report:
            trained = whole.train(report)
        self.seconds += Counter(whole.seconds)
        shards = [
            IndexBuilding(shard, factory, self.metric, self.seed, trained)
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
