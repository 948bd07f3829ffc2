"""Sharing the cores between the model, which Lightning's loop runs, and the memories, which a
thread beside it asks.

Each part of the model takes the threads that are free when it begins; Python lets the two threads
take turns more often than by default. `end` restores everything; `Interpolation` calls it on an
exception too.
"""

import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

SWITCH_SECONDS = 5e-5
"""How long Python lets one thread keep another waiting: a hundredth of what it does by default,
since the model and the memories call many functions that take less than a millisecond."""


class CoreSharing:
    """The cores of a process during one pass.

    Args:
        on_cpu: whether the model computes on the CPU too; else the memories have all threads.

    Attributes:
        threads: of both together, and of a memory behind whose question another one waits.
        share: threads of a memory while the model computes.
    """

    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu = on_cpu
        self.threads = torch.get_num_threads()
        self.share = max(self.threads // 2, 1) if on_cpu else self.threads
        self.switch_seconds = sys.getswitchinterval()
        self.hooks: list[RemovableHandle] = []

    def begin(self, model: nn.Module, is_busy: Callable[[], bool]) -> None:
        """Shares the cores from now on.

        Args:
            model: each of its parts takes the threads that are free when it begins.
            is_busy: whether a memory is being asked.
        """
        sys.setswitchinterval(SWITCH_SECONDS)

        def take_what_is_free(*_) -> None:
            torch.set_num_threads(max(self.threads - self.share * is_busy(), 1))

        if self.on_cpu:
            self.hooks = [
                part.register_forward_pre_hook(take_what_is_free) for part in model.modules()
            ]

    def end(self) -> None:
        """Restores everything; may be called more than once."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        torch.set_num_threads(self.threads)
        sys.setswitchinterval(self.switch_seconds)
