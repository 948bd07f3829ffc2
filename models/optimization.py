"""`Optimization`: the optimiser and the learning-rate schedule of all models that are trained
here."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from neighborlm.common.errors import InputError
from neighborlm.models import schedules


@dataclass(frozen=True)
class Optimization:
    """How a model is trained.

    Args:
        optimizer: `adam` (AdamW) or `nag` (Nesterov's accelerated gradient); the papers' recipe for
            WikiText-103 is `nag` with a learning rate near 1.
        lr: peak learning rate; lower it if the loss jumps or becomes NaN, raise it if the loss
            falls slowly.
        schedule: what follows the warm-up: `cosine` (down to min_lr, then again from the peak),
            `inverse_sqrt` or `constant`.
        warmup_updates: updates during which the learning rate rises linearly to lr; raise it for
            large models and for `nag`.
        warmup_init_lr: learning rate of the first update, where there is a warm-up.
        min_lr: learning rate at the end of each period of the cosine.
        lr_period_updates: updates in the first period of the cosine; set it to the updates after
            the warm-up, so that the training ends at min_lr.
        t_mult: length of each further period of the cosine relative to the one before it.
        lr_shrink: factor of lr and min_lr at each further period of the cosine.
        momentum: momentum of `nag`.
        adam_betas: decay rates of the averages of gradients and of their squares in `adam`.
        weight_decay: weight decay, decoupled in `adam`, an L2 penalty in `nag`; raise it if the
            model overfits.

    Raises:
        InputError: a value is out of range.
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
        """The learning rate at an update, counted from 0."""
        warmup = {
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
                **warmup,
            )
        if self.schedule == "inverse_sqrt" or update < self.warmup_updates:
            return schedules.inverse_sqrt(update, **warmup)
        return self.lr

    def configure(self, parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
        """The optimiser of some parameters and its schedule, stepped at every update, in the form
        that Lightning's `configure_optimizers` returns."""
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
