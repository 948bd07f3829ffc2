"""`TrainableLM`: what every model that is trained here shares as a LightningModule.

Training and validation steps, optimiser, checkpoints and sharing out to ranks. It knows nothing of
retrieval; test and prediction runs are those of `Scorer`, for models of any kind.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from neighborlm.common.contracts import Batch, Scored, Want
from neighborlm.models.decoder import DecoderLayer
from neighborlm.models.metrics import TokenLoss
from neighborlm.models.optimization import Optimization
from neighborlm.models.weights import content_hash, weights_version


class TrainableLM(pl.LightningModule):
    """A `common.contracts.LanguageModel` with losses, optimiser and schedule; a model adds its
    network, `vocab_size`, `max_target_positions`, `key_width` and `score`.

    Args:
        optimization: fields of `Optimization`; they are hyper-parameters of the model.
    """

    COMPUTING: tuple[str, ...] = ()
    """Hyper-parameters that change what the same weights compute."""

    def __init__(self, **optimization) -> None:
        super().__init__()
        self.optimization = Optimization(**optimization)
        self.save_hyperparameters(asdict(self.optimization))
        self.val_loss = TokenLoss()
        self.dictionary_fingerprint: str | None = None
        """Of the vocabulary that it was trained with; saved with checkpoints."""
        self.updates = 0
        """Optimiser steps it had when it was saved."""
        self.batch_seed: tuple[int, ...] = (0,)
        """Of what all ranks draw alike for the batch that is trained on."""
        self._fingerprint: tuple[Any, str] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        raise NotImplementedError

    @property
    def max_target_positions(self) -> int:
        """Longest row the model reads."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """A hash of all weights and of the settings that change what they compute, whatever file
        they came from.

        In evaluation mode it is computed once and again after `train()`, `eval()` and every change
        of a weight that torch counts; see `weights_version`.
        """
        version = weights_version(self)
        if self.training or self._fingerprint is None or self._fingerprint[0] != version:
            self._fingerprint = version, content_hash(self, self._computing())
        return self._fingerprint[1]

    def _computing(self) -> Mapping[str, Any]:
        """What decides what the model computes besides its weights."""
        return {name: self.hparams[name] for name in self.COMPUTING}

    def train(self, mode: bool = True) -> "TrainableLM":
        """Training or evaluation mode."""
        self._fingerprint = None
        return super().train(mode)

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

    def score(self, batch: Batch, want: Want) -> Scored:
        """What is wanted of the scored tokens of a batch."""
        raise NotImplementedError

    def training_log_probs(self, batch: Batch) -> Tensor:
        """Natural-log probability of each scored target, fp32 `[n]`, with its gradient."""
        return self.score(batch, Want()).log_probs

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the batch's targets."""
        loss = -self.training_log_probs(batch).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds to the validation loss."""
        self.val_loss.update(self.score(batch, Want()).log_probs)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss` and `val/ppl`."""
        loss = self.val_loss.compute()["loss"]
        self.val_loss.reset()
        self.log_dict({"val/loss": loss.float(), "val/ppl": loss.exp().float()}, prog_bar=True)

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

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser of what is trained and, per update, its schedule."""
        return self.optimization.configure([p for p in self.parameters() if p.requires_grad])
