"""One worker thread beside Lightning's loop: searching and writing overlap the next step."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import faiss
import torch

from neighborlm.common.interrupts import thread_pool


class Background:
    """Runs tasks one after another in a thread of its own.

    Args:
        ahead: how many tasks may wait; `submit` blocks beyond that, so memory stays bounded.
        threads: that torch and faiss take for the tasks; by default what they would take anyway.
    """

    def __init__(self, ahead: int = 2, threads: int | None = None) -> None:
        self.ahead = ahead
        # These counts belong to a thread, except that of torch's matrix products, which all threads
        # share: the thread starts now, so that whoever sets that count later has the last word.
        self.pool = thread_pool(1, partial(_take_threads, threads) if threads is not None else None)
        self.tasks: deque[Future] = deque()

    def submit(self, task: Callable, *args) -> None:
        """Queues `task(*args)`; raises what an earlier task raised."""
        while len(self.tasks) >= self.ahead:
            self.tasks.popleft().result()
        self.tasks.append(self.pool.submit(task, *args))

    def drain(self) -> None:
        """Waits for all tasks; raises what one of them raised."""
        while self.tasks:
            self.tasks.popleft().result()


def _take_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
