"""`DatastoreWriter`: one pass of `trainer.predict` over a split fills its datastore."""

import time
from contextlib import suppress

import numpy as np
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import BasePredictionWriter

from neighborlm.callbacks.background import Background
from neighborlm.common.contracts import Want
from neighborlm.retrieval.store.datastore import DatastoreBuilder
from neighborlm.retrieval.store.sharded_builder import ShardedBuilder


class DatastoreWriter(BasePredictionWriter):
    """Writes each token's key and value to the row of its position, while the model goes on.

    It reads what a `Scorer` of `want` predicts. Every rank opens the same store and writes the rows
    of its own batches.

    Args:
        builder: the datastore in the making.
        key_type: of its keys.
        sync_seconds: how often what was written is brought to disk and marked as done.
    """

    def __init__(
        self,
        builder: DatastoreBuilder | ShardedBuilder,
        key_type: str,
        sync_seconds: float = 10.0,
    ) -> None:
        super().__init__(write_interval="batch")
        self.builder = builder
        self.key_type = key_type
        self.want = Want((key_type,), log_probs=False)
        self.sync_seconds = sync_seconds
        self.background = Background()
        self.last_sync = time.perf_counter()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Publishes a store that only lacks its mark: without batches Lightning runs no loop."""
        if trainer.is_global_zero and self.builder.n_written == self.builder.n_rows:
            self.builder.finish()
        trainer.strategy.barrier()

    def write_on_batch_end(
        self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
    ) -> None:
        """Queues a batch's keys."""
        self.background.submit(
            self._write,
            prediction.positions.cpu().numpy(),
            prediction.keys[self.key_type].float().cpu().numpy(),
            prediction.targets.cpu().numpy(),
        )

    def _write(self, rows: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        self.builder.write(rows, keys, values)
        if time.perf_counter() - self.last_sync > self.sync_seconds:
            self.builder.sync()
            self.last_sync = time.perf_counter()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publishes the datastore once all ranks have written theirs."""
        self.background.drain()
        self.builder.sync()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self.builder.finish()
        trainer.strategy.barrier()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keeps what was written so far, also where writing itself has failed."""
        with suppress(Exception):
            self.background.drain()
        self.builder.sync()
