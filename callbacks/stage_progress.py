"""`StageProgress`: tells how far a training or a pass over a split is, with loss, perplexity and
tokens per second, by the bars and lines of `common.progress`."""

import math
import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from neighborlm.common.progress import Bars

LOOK_SECONDS = 1.0
"""How often a bar's figures change: to read a loss is to wait for the device."""
EVALUATING = "evaluating"
"""What a pass over a split does, unless a callback has another word for it as its `doing`."""


class StageProgress(Callback):
    """Tells how far each stage is.

    A training gets a line at the updates that are logged, and after each validation; what is left
    is the time of the whole training, its validations included.

    Args:
        shown: whether on the screen, see `Bars`.
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self.bars: Bars | None = None
        self._begin_count()
        self.looked_at = 0.0
        self.tested: Tensor | float = 0.0  # the sum of log-probabilities
        self.told_update = -1
        self.doing = EVALUATING

    def _begin(self, trainer: Trainer, title: str) -> None:
        self.close()
        self.bars = Bars(title, shown=self.shown and trainer.is_global_zero)

    def close(self, *_: Any, **__: Any) -> None:
        """Leaves the screen."""
        if self.bars is not None:
            self.bars.close()
            self.bars = None

    def _begin_count(self) -> None:
        self.passed: tuple[int, float] = (0, 0)
        self.tokens: Tensor | int = 0
        self.since = time.perf_counter()

    def _rate(self, trainer: Trainer) -> str:
        seconds = time.perf_counter() - self.since
        return f"{trainer.world_size * int(self.tokens) / seconds:,.0f} tokens/s"

    # -- training ------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what is trained."""
        self._begin(trainer, "")
        if trainer.is_global_zero:
            sizes = [(p.numel(), p.requires_grad) for p in pl_module.parameters()]
            trained = sum(size for size, is_trained in sizes if is_trained)
            total = sum(size for size, _ in sizes)
            self.bars.say(f"model: {total:,} parameters, {trained:,} of them trained")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins where the training goes on."""
        self._begin_count()
        self.told_update = trainer.global_step
        total = trainer.estimated_stepping_batches
        self.updates = int(total) if 0 < total < math.inf else 0
        self._tell_training(trainer, "", line=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the tokens."""
        self.tokens = self.tokens + batch.scored.sum()
        step, now = trainer.global_step, time.perf_counter()
        due = step % trainer.log_every_n_steps == 0 or step == self.updates
        due &= step > self.told_update
        if due or now - self.looked_at > LOOK_SECONDS:
            self.looked_at = now
            loss = trainer.callback_metrics.get("train/loss")
            figures = [f"epoch {trainer.current_epoch + 1}"]
            figures += [] if loss is None else [figures_of(loss.item())]
            self._tell_training(trainer, ", ".join([*figures, self._rate(trainer)]), due or None)
        if due:
            self.told_update = step
            self._begin_count()

    def _tell_training(self, trainer: Trainer, more: str, line: bool | None) -> None:
        if trainer.is_global_zero:
            name = getattr(trainer.datamodule, "name", "")
            self.bars(
                f"training on {name}", trainer.global_step, self.updates, "updates", more, line
            )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Moves the bar of the validation."""
        trial = trainer.sanity_checking
        total = (trainer.num_sanity_val_batches if trial else trainer.num_val_batches)[0]
        self._tell_pass(trainer, validation_of(trainer), batch_idx + 1, total, line=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what came of it."""
        if self.bars is None:
            return
        self.bars.drop(validation_of(trainer))
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.is_global_zero and loss is not None and not trainer.sanity_checking:
            at = f"update {trainer.global_step:,}"
            self.bars.say(f"validation at {at}: {figures_of(loss.item())}")
        self._begin_count()

    # -- passes over a split -------------------------------------------------------------------

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to count."""
        others = (callback for callback in trainer.callbacks if callback is not self)
        doings = [other.doing for other in others if hasattr(other, "doing")]
        self.doing = doings[0] if doings else EVALUATING
        self._begin(trainer, f"{self.doing} {split_of(trainer.test_dataloaders)}".rstrip())
        self.tested = 0.0
        self._begin_count()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the tokens and their log-probabilities."""
        self.tokens = self.tokens + batch.scored.sum()
        if self.doing == EVALUATING and getattr(outputs, "log_probs", None) is not None:
            self.tested = self.tested - outputs.log_probs.sum(dtype=torch.float64)
        self._tell_batch(trainer, batch_idx, trainer.num_test_batches[0])

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to count."""
        self._begin(trainer, f"keys of {split_of(trainer.predict_dataloaders)}".rstrip())
        self.tested = 0.0
        self._begin_count()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the tokens."""
        self.tokens = self.tokens + batch.scored.sum()
        self._tell_batch(trainer, batch_idx, trainer.num_predict_batches[0])

    def _tell_batch(self, trainer: Trainer, batch_idx: int, total: int) -> None:
        now = time.perf_counter()
        self.passed = (batch_idx + 1, total)
        if batch_idx + 1 < total and now - self.looked_at > LOOK_SECONDS:
            self.looked_at = now
            self._tell_passed(trainer)

    def _tell_passed(self, trainer: Trainer) -> None:
        tokens, more = int(self.tokens), [self._rate(trainer)]
        if isinstance(self.tested, Tensor) and tokens:
            more = [figures_of(self.tested.item() / tokens), *more]
        self._tell_pass(trainer, "", *self.passed, ", ".join(more))

    def _end_pass(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells a pass at its end, once the memories beside the model have answered too."""
        if self.bars is not None and self.passed[0]:
            self._tell_passed(trainer)
        self.close()

    def _tell_pass(
        self,
        trainer: Trainer,
        stage: str,
        done: int,
        total: float,
        more: str = "",
        line: bool | None = None,
    ) -> None:
        if trainer.is_global_zero and self.bars is not None:
            self.bars(stage, done, int(total) if total < math.inf else 0, "batches", more, line)

    # -- the end -------------------------------------------------------------------------------

    on_test_end = on_predict_end = _end_pass
    on_exception = teardown = close

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says where the training has ended, where that is not what was announced."""
        if self.bars is not None and not self.updates:
            self._tell_training(trainer, "", line=True)
        self.close()


def figures_of(loss: float) -> str:
    """A loss in nats and its perplexity."""
    return f"loss {loss:.3f}, perplexity {math.exp(loss) if loss < 700 else math.inf:,.2f}"


def validation_of(trainer: Trainer) -> str:
    """What a validation is called; Lightning tries two batches before a training."""
    return "a trial of the validation" if trainer.sanity_checking else "validation"


def split_of(loader: Any) -> str:
    """The split that a loader of `LMDataModule` goes over; no name where it does not say."""
    return getattr(getattr(loader, "dataset", None), "split", "")
