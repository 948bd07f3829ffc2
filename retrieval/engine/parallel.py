"""Runs work in threads that use one core each, also in torch's matrix products.

OpenMP's threads spin at the end of every loop until all are done. The loops here are short: beside
a model that computes at the same time, threads would spin longer than they work.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numpy.typing import DTypeLike

from neighborlm.common.interrupts import thread_pool, wait_for_all
from neighborlm.retrieval.engine.processor import take_one_core


def in_parallel(function: Callable, parts: Iterable, threads: int) -> list:
    """The function's result for each part, by at most so many threads. An exception of the function
    or an interrupt is raised when all threads have ended, as what they read may be freed then.

    The function should multiply matrices by `product`: the number of numpy's threads is a setting
    of the whole process.
    """
    parts = list(parts)
    results = [None] * len(parts)
    left = iter(range(len(parts)))  # whose `next` is atomic

    def work() -> None:
        for number in left:
            results[number] = function(parts[number])

    workers = [_pool().submit(work) for _ in range(min(threads, len(parts)))]
    wait_for_all(workers, give_up=lambda: list(left))
    for worker in workers:
        worker.result()
    return results


@cache
def _pool() -> ThreadPoolExecutor:
    return thread_pool(os.cpu_count(), take_one_core)


_memory = threading.local()


def scratch(what: str, size: int, dtype: DTypeLike = np.float32, room: int = 0) -> np.ndarray:
    """An array `[size]` that this thread uses again and again, as allocating memory takes longer
    than writing to it.

    Args:
        what: purpose; the next call with the same one returns the same memory.
        room: smallest size to allocate, so that the array need not grow. The system provides memory
            only when it is first written to.
    """
    memory, name = vars(_memory), f"{what} {np.dtype(dtype)}"
    if name not in memory or len(memory[name]) < size:
        memory.pop(name, None)  # frees it before more is allocated
        memory[name] = np.empty(max(size, room), dtype)
    return memory[name][:size]


def product(left: np.ndarray, right: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The matrix product of fp32 `[n, d]` and `[d, m]`, by as many threads as torch has here."""
    left, right = torch.from_numpy(left), torch.from_numpy(right)
    if out is None:
        return torch.mm(left, right).numpy()
    torch.mm(left, right, out=torch.from_numpy(out))
    return out
