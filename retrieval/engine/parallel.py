"""Work in parts, by threads that take one core each, also in torch's matrix products.

OpenMP's threads wait for one another at the end of every loop, spinning; loops are short here, and
beside a model that computes at the same time they would wait longer than they work.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import numpy as np
import torch
from numpy.typing import DTypeLike

from neighborlm.common.interrupts import thread_pool
from neighborlm.retrieval.engine.processor import take_one_core


def in_parallel(function: Callable, parts: Iterable, threads: int) -> list:
    """What a function gives for each part, by at most so many threads; raises what it raises, when
    all threads have ended.

    Its matrix products should be `product`: how many threads numpy's take is everyone's affair.
    """
    parts = list(parts)
    results = [None] * len(parts)
    left = iter(range(len(parts)))  # whose `next` is atomic

    def work() -> None:
        for number in left:
            results[number] = function(parts[number])

    workers = [_pool().submit(work) for _ in range(min(threads, len(parts)))]
    wait(workers)
    for worker in workers:
        worker.result()
    return results


@cache
def _pool() -> ThreadPoolExecutor:
    return thread_pool(os.cpu_count(), take_one_core)


_memory = threading.local()


def scratch(what: str, size: int, dtype: DTypeLike = np.float32, room: int = 0) -> np.ndarray:
    """Memory `[size]` that this thread uses again and again: new memory costs more than what is
    written to it.

    Args:
        what: it is for; what was written for that before is lost.
        room: as many at least are taken, so that it need not grow; the system gives memory when it
            is first written to, and no more than is used.
    """
    memory, name = vars(_memory), f"{what} {np.dtype(dtype)}"
    if name not in memory or len(memory[name]) < size:
        memory.pop(name, None)  # first, so that it can be taken again
        memory[name] = np.empty(max(size, room), dtype)
    return memory[name][:size]


def product(left: np.ndarray, right: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The matrix product of fp32 `[n, d]` and `[d, m]`, by as many threads as torch has here."""
    left, right = torch.from_numpy(left), torch.from_numpy(right)
    if out is None:
        return torch.mm(left, right).numpy()
    torch.mm(left, right, out=torch.from_numpy(out))
    return out
