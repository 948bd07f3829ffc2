"""`TrainableLM`: the LightningModule that all models trained here derive from.

Training and validation steps, optimiser, checkpoints and sharding over ranks. It knows nothing of
retrieval; test and prediction runs belong to `Scorer`, which takes models of any kind.
"""

from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from neighborlm.common.contracts import Batch, Scored, Want
from neighborlm.common.errors import Diverged
from neighborlm.models.decoder import DecoderLayer
from neighborlm.models.metrics import TokenLoss
from neighborlm.models.optimization import Optimization
from neighborlm.models.weights import content_hash, not_finite, weights_version


class TrainableLM(pl.LightningModule):
    """A `common.contracts.LanguageModel` with losses, optimiser and schedule. A subclass adds its
    network, `vocab_size`, `max_target_positions`, `key_width` and `score`.

    Args:
        optimization: fields of `Optimization`, which become hyper-parameters of the model.
    """

    COMPUTING: tuple[str, ...] = ()
    """Hyper-parameters that change what the same weights compute."""

    def __init__(self, **optimization) -> None:
        super().__init__()
        self.optimization = Optimization(**optimization)
        self.save_hyperparameters(asdict(self.optimization))
        self.val_loss = TokenLoss()
        self.dictionary_fingerprint: str | None = None
        """Fingerprint of the vocabulary of its training; saved with checkpoints."""
        self.checkpoint: str | None = None
        """The file that it was loaded from, for messages and for the places of what is made."""
        self.updates = 0
        """Optimiser steps in the checkpoint that it was loaded from."""
        self.batch_seed: tuple[int, ...] = (0,)
        """Seed of what all ranks draw alike for the batch that is trained on."""
        self._fingerprint: tuple[Any, str] | None = None
        self._loss_of_update: Tensor | float = 0.0  # summed over its batches so far
        self._gradient_norm: Tensor | None = None  # of the update that is being made

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        raise NotImplementedError

    @property
    def max_target_positions(self) -> int:
        """Longest row that the model reads, in tokens."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """A hash of all weights and of the settings that change what they compute, independent of
        the file they came from.

        In evaluation mode it is cached until `train()`, `eval()` or a change of a weight that torch
        counts; see `weights_version`.
        """
        version = weights_version(self)
        if self.training or self._fingerprint is None or self._fingerprint[0] != version:
            self._fingerprint = version, content_hash(self, self._computing())
        return self._fingerprint[1]

    def _computing(self) -> Mapping[str, Any]:
        """The settings that, besides the weights, determine what the model computes."""
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
        """Width of the keys of a type.

        Raises:
            InputError: the model has no keys of this type.
        """
        raise NotImplementedError

    def score(self, batch: Batch, want: Want) -> Scored:
        """What is wanted of the scored tokens of a batch."""
        raise NotImplementedError

    def training_log_probs(self, batch: Batch) -> Tensor:
        """Natural-log probability of each scored target, fp32 `[n]`, with its gradient."""
        return self.score(batch, Want()).log_probs

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the batch's targets; of an epoch's last update, to which
        fewer batches come, so much more that Lightning's division gives the mean of these."""
        loss = -self.training_log_probs(batch).mean()
        self.log("train/loss", loss, prog_bar=True)
        self._loss_of_update = self._loss_of_update + loss.detach()
        usual = self.trainer.accumulate_grad_batches
        first = batch_idx - batch_idx % usual
        batches = min(usual, self.trainer.num_training_batches - first)
        return loss if batches == usual else loss * (usual / batches)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds to the validation loss."""
        self.val_loss.update(self.score(batch, Want()).log_probs)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss` and `val/ppl`.

        Raises:
            Diverged: they are not finite.
        """
        loss = self.val_loss.compute()["loss"]
        self.val_loss.reset()
        if not loss.isfinite():
            raise self._diverged(f"the validation loss is {loss.item()}")
        self.log_dict({"val/loss": loss.float(), "val/ppl": loss.exp().float()}, prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Records the dictionary to which the ids belong, and the text.

        Raises:
            Diverged: the weights are not finite.
        """
        damaged = not_finite(checkpoint["state_dict"])
        if damaged is not None:
            raise self._diverged(f"the weights of {damaged} are not finite")
        data = self.trainer.datamodule
        if data is not None:
            checkpoint["dictionary"] = data.dictionary.fingerprint
            splits = (split for split in ("train", "valid") if data.has(split))
            checkpoint["corpus"] = {split: data.fingerprint(split) for split in splits}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the norm of the gradient, by which it is clipped afterwards; logs it at the updates
        that Lightning logs.

        Raises:
            Diverged: it or the loss is not finite. A precision with a scaler skips such updates and
                lowers its scale; there, a gradient only counts once the scale is below 1.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self._gradient_norm = nn.utils.get_total_norm(gradients)
        norm = self._gradient_norm
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss, self._loss_of_update = float(self._loss_of_update), 0.0
        if not isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if not isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            raise self._diverged(f"the norm of the gradient is {norm.item()}")
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/grad_norm", norm)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning clips, but by the norm that is known already."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            parameters = [p for p in self.parameters() if p.grad is not None]
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self._gradient_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _diverged(self, found: str) -> Diverged:
        """At the update that is being made, or after those that were."""
        return Diverged(
            f"the training has diverged at update {self.trainer.global_step + 1}: {found}; "
            "expected finite numbers: in another --trainer.default_root_dir, try a lower "
            "--model.lr, more --model.warmup_updates, a smaller --trainer.gradient_clip_val or, in "
            "16 bits, --trainer.precision bf16-mixed (checkpoints stay in "
            f"{self.trainer.default_root_dir})"
        )

    def configure_model(self) -> None:
        """Under `--trainer.strategy fsdp`, shards parameters, gradients and the optimiser's state
        over the ranks: each layer on its own, and all the rest together."""
        if self.device_mesh is None or isinstance(self, FSDPModule):
            return
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                fully_shard(module)
        fully_shard(self)
        for step in (self.training_step, self.validation_step):
            register_fsdp_forward_method(self, step.__name__)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser of the parameters that are trained, and its schedule."""
        return self.optimization.configure([p for p in self.parameters() if p.requires_grad])
