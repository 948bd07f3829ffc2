"""Work in parts, by threads that take one core each, also in torch's matrix products.

OpenMP's threads wait for one another at the end of every loop, spinning; loops are short here, and
beside a model that computes at the same time they would wait longer than they work.
"""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike
from threadpoolctl import ThreadpoolController

from neighborlm.common.interrupts import interrupts_held


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


def pool(threads: int, initializer: Callable | None = None) -> ThreadPoolExecutor:
    """Threads, the first of which runs: where an interrupt comes while that one starts, nobody
    would ever end it, and the process would wait for it for good. (It tells later ones to end.)"""
    workers = ThreadPoolExecutor(threads, initializer=initializer)
    with interrupts_held() as held:
        workers.submit(int).result()
    if held:
        signal.raise_signal(held[0])  # for whoever holds interrupts, if anybody does
    return workers


@cache
def _pool() -> ThreadPoolExecutor:
    return pool(os.cpu_count(), _take_one_core)


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


def _take_one_core() -> None:
    torch.get_num_threads()  # from its first call in a thread on it leaves the number alone
    ThreadpoolController().select(user_api="openmp").limit(limits=1)
    # MKL, by which torch multiplies on x86, has a number of its own for each thread.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if library.is_file():
        set_threads = getattr(ctypes.CDLL(str(library)), "MKL_Set_Num_Threads_Local", None)
        if set_threads is not None:
            set_threads(1)
