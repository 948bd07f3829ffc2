"""`Optimization`: the optimiser of a training and its learning rate at every update, in one place
for all models."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from neighborlm.common.errors import InputError
from neighborlm.models import schedules


@dataclass(frozen=True)
class Optimization:
    """How a model is trained: `--model.lr` and its like.

    Args:
        optimizer: `adam` (AdamW), or Nesterov's accelerated gradient `nag`, with a learning rate
            near 1, as in the papers' recipe for WikiText-103.
        lr: peak learning rate; take less where the loss jumps or is no number, more where it
            falls slowly.
        schedule: what follows the warm-up: `cosine`, down to min_lr and again from the start,
            `inverse_sqrt`, or `constant`.
        warmup_updates: updates in which the learning rate rises in a line to lr; take more for
            large models and for `nag`.
        warmup_init_lr: learning rate of the first update.
        min_lr: where each period of the cosine ends.
        lr_period_updates: length of the first period of the cosine; give it the updates after the
            warm-up and the training ends at min_lr.
        t_mult: how many times as long as the one before each further period of the cosine is.
        lr_shrink: what lr and min_lr are multiplied with at each further period of the cosine.
        momentum: of `nag`.
        adam_betas: decay of the averages of gradients and of their squares, of `adam`.
        weight_decay: of either optimiser; take more where the model learns its text by heart.

    Raises:
        InputError: a value alone cannot be right.
    """

    optimizer: Literal["nag", "adam"] = "adam"
    lr: float = 1e-3
    schedule: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"
    warmup_updates: int = 100
    warmup_init_lr: float = 1e-7
    min_lr: float = 1e-6
    lr_period_updates: int = 10000
    t_mult: float = 1.0
    lr_shrink: float = 1.0
    momentum: float = 0.99
    adam_betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "lr_period_updates"):
            if not getattr(self, name) > 0:
                raise InputError(f"--model.{name} is {getattr(self, name)}; expected more than 0")
        if self.t_mult < 1:
            raise InputError(f"--model.t_mult is {self.t_mult}; expected at least 1")

    def learning_rate(self, update: int) -> float:
        """The schedule's learning rate at an update, from 0."""
        warm = {
            "peak": self.lr,
            "warmup_updates": self.warmup_updates,
            "warmup_init": self.warmup_init_lr,
        }
        if self.schedule == "cosine":
            return schedules.cosine(
                update,
                floor=self.min_lr,
                period=self.lr_period_updates,
                t_mult=self.t_mult,
                shrink=self.lr_shrink,
                **warm,
            )
        if self.schedule == "inverse_sqrt" or update < self.warmup_updates:
            return schedules.inverse_sqrt(update, **warm)
        return self.lr

    def configure(self, parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
        """The optimiser of some parameters and, per update, its schedule, as Lightning's
        `configure_optimizers` gives them."""
        if self.optimizer == "nag":
            optimizer = torch.optim.SGD(
                parameters,
                self.lr,
                momentum=self.momentum,
                nesterov=True,
                weight_decay=self.weight_decay,
            )
        else:
            optimizer = torch.optim.AdamW(
                parameters, self.lr, betas=self.adam_betas, weight_decay=self.weight_decay
            )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda update: self.learning_rate(update) / self.lr
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
