"""`LanguageModel`: what every model of this project shares as a LightningModule.

It knows nothing of retrieval. Its test step gives the log-probability of every scored target and,
where `key_type` is set, the vector of its context.
"""

from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from neighborlm.models import schedules
from neighborlm.models.decoder import DecoderLayer
from neighborlm.models.metrics import TokenLoss


class TokenScores(NamedTuple):
    """What a model says of the scored tokens of a batch, `n` of them, in row order.

    Attributes:
        positions: int64 `[n]`, offset of each target in its split.
        targets: int64 `[n]`.
        log_probs: fp32 `[n]`, natural-log probability of each target; None when only keys were
            asked for.
        keys: `[n, width]`, the feature `key_type` of each target's context; None without one.
        lm_log_probs: fp32 `[n]`, what a language model that this one builds on says itself; None
            for one that builds on none.
        rescoring_keys: `[n, width]`, the feature `rescoring_key_type`; None without one.
    """

    positions: Tensor
    targets: Tensor
    log_probs: Tensor | None
    keys: Tensor | None
    lm_log_probs: Tensor | None = None
    rescoring_keys: Tensor | None = None


class LanguageModel(pl.LightningModule):
    """Steps, losses, optimiser and schedule; a model adds its network and `score`.

    Its hyper-parameters must have `vocab_size`, `optimizer`, `lr`, `schedule`, `warmup_updates`,
    `warmup_init_lr`, `min_lr`, `lr_period_updates`, `t_mult`, `lr_shrink`, `momentum`, `adam_betas`
    and `weight_decay`; see `TransformerLM`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.val_loss = TokenLoss()
        self.test_loss = TokenLoss()
        self.key_type: str | None = None
        """Which feature test and predict steps return as keys."""
        self.rescoring_key_type: str | None = None
        """Which feature they return besides, to score again what the keys have found."""
        self.dictionary_fingerprint: str | None = None
        """Of the vocabulary that it was trained with; saved with checkpoints."""
        self.updates = 0
        """Optimiser steps it had when it was saved."""

    @property
    def max_target_positions(self) -> int:
        """Longest row the model reads."""
        raise NotImplementedError

    @property
    def leaves_out_parameters(self) -> bool:
        """Whether some training batches use only some of the parameters that are trained."""
        return False

    def key_width(self, key_type: str) -> int:
        """Width of the vectors of a key type.

        Raises:
            InputError: the model has no such feature.
        """
        raise NotImplementedError

    @property
    def wanted_features(self) -> list[str]:
        """The key types to compute."""
        wanted = (self.key_type, self.rescoring_key_type)
        return [key_type for key_type in wanted if key_type is not None]

    def score(self, batch, with_log_probs: bool = True) -> TokenScores:
        """Log-probabilities and keys of the scored tokens of an `LMBatch`."""
        raise NotImplementedError

    def training_log_probs(self, batch) -> Tensor:
        """Natural-log probability of each scored target, fp32 `[n]`, with its gradient."""
        return self.score(batch).log_probs

    def training_step(self, batch, batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the batch's targets."""
        loss = -self.training_log_probs(batch).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx: int) -> None:
        """Adds to the validation loss."""
        self.val_loss.update(self.score(batch).log_probs)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss` and `val/ppl`."""
        loss = self.val_loss.compute()["loss"]
        self.val_loss.reset()
        self.log_dict({"val/loss": loss.float(), "val/ppl": loss.exp().float()}, prog_bar=True)

    def test_step(self, batch, batch_idx: int) -> TokenScores:
        """Scores of the batch; the loss over the split is in `test_loss` at the end."""
        scores = self.score(batch)
        self.test_loss.update(scores.log_probs)
        return scores

    def on_test_epoch_start(self) -> None:
        """Starts a new sum."""
        self.test_loss.reset()

    def predict_step(self, batch, batch_idx: int) -> TokenScores:
        """Keys of the batch, without the softmax."""
        return self.score(batch, with_log_probs=False)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Records which dictionary the ids belong to."""
        if self.trainer.datamodule is not None:
            checkpoint["dictionary"] = self.trainer.datamodule.dictionary.fingerprint

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the norm of the gradient before it is clipped, at updates whose figures are kept."""
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps:
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def configure_model(self) -> None:
        """In a training with `--trainer.strategy fsdp`, shares parameters, gradients and the
        optimiser's state out to the ranks: those of each layer together, and those of all else."""
        if self.device_mesh is None or isinstance(self, FSDPModule):
            return
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                fully_shard(module)
        fully_shard(self)
        for step in (self.training_step, self.validation_step):
            register_fsdp_forward_method(self, step.__name__)

    def configure_optimizers(self):
        """The optimiser and, per update, its schedule."""
        h = self.hparams
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if h.optimizer == "nag":
            optimizer = torch.optim.SGD(
                trained,
                h.lr,
                momentum=h.momentum,
                nesterov=True,
                weight_decay=h.weight_decay,
            )
        else:
            optimizer = torch.optim.AdamW(
                trained, h.lr, betas=h.adam_betas, weight_decay=h.weight_decay
            )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda update: self.learning_rate(update) / h.lr
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def learning_rate(self, update: int) -> float:
        """The schedule's learning rate at an update, from 0."""
        h = self.hparams
        warm = {"peak": h.lr, "warmup_updates": h.warmup_updates, "warmup_init": h.warmup_init_lr}
        if h.schedule == "cosine":
            return schedules.cosine(
                update,
                floor=h.min_lr,
                period=h.lr_period_updates,
                t_mult=h.t_mult,
                shrink=h.lr_shrink,
                **warm,
            )
        if h.schedule == "inverse_sqrt":
            return schedules.inverse_sqrt(update, **warm)
        return h.lr if update >= h.warmup_updates else schedules.inverse_sqrt(update, **warm)
