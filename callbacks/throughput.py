"""`Throughput`: tokens per second and memory of a training, for the log, and times of an
evaluation."""

import resource
import sys
import time

import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs `train/tokens_per_second` and `train/peak_memory_gb` at the steps of the loss, and times
    runs.

    Attributes:
        trained_tokens: tokens of all ranks trained on by this process's run.
        trained_seconds: wall time of that, validation left out.
        seconds: wall time of the last test or predict run.
        model_seconds: the part of it that the steps of batches took.
    """

    def __init__(self) -> None:
        self.trained_tokens = 0
        self.trained_seconds = 0.0
        self.tokens = 0
        self.since = 0.0
        self.step_began = 0.0
        self.seconds = 0.0
        self.model_seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self.tokens, self.since = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx
    ) -> None:
        """Counts the batch and, when a step is logged, logs the rate since the last time, and the
        memory that was taken at most so far."""
        self.tokens += int(batch.scored.sum()) * trainer.world_size
        if trainer.global_step and trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log("train/tokens_per_second", self._count())
            pl_module.log("train/peak_memory_gb", peak_memory(pl_module.device) / 1e9)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._count()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is no training time."""
        self.since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the rest."""
        self._count()

    def _count(self) -> float:
        """Adds what was trained on since the last call; its tokens a second."""
        now = time.perf_counter()
        tokens, seconds = self.tokens, now - self.since
        if tokens:
            self.trained_tokens += tokens
            self.trained_seconds += seconds
        self.tokens, self.since = 0, now
        return tokens / seconds

    def _start(self, *_) -> None:
        self.model_seconds, self.since = 0.0, time.perf_counter()

    def _step_start(self, *_) -> None:
        self.step_began = time.perf_counter()

    def _step_end(self, *_) -> None:
        self.model_seconds += time.perf_counter() - self.step_began

    def _end(self, *_) -> None:
        self.seconds = time.perf_counter() - self.since

    on_test_start = on_predict_start = _start
    on_test_batch_start = on_predict_batch_start = _step_start
    on_test_batch_end = on_predict_batch_end = _step_end
    on_test_end = on_predict_end = _end


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has taken at most: of a CUDA device by torch, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
