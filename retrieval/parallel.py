"""Work in parts, by threads that take one core each.

OpenMP's threads wait for one another at the end of every loop, spinning; loops are short here, and
beside a model that computes at the same time they would wait longer than they work.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from threadpoolctl import ThreadpoolController


def in_parallel(function: Callable, parts: Iterable, threads: int) -> list:
    """What a function gives for each part, by at most so many threads; raises what it raises.

    Its matrix products are one thread's only where the caller limits those of BLAS, which are
    everyone's.
    """
    parts = list(parts)
    results = [None] * len(parts)
    left = iter(range(len(parts)))  # whose `next` is atomic

    def work() -> None:
        for number in left:
            results[number] = function(parts[number])

    workers = [_pool().submit(work) for _ in range(min(threads, len(parts)))]
    for worker in workers:
        worker.result()
    return results


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), initializer=_take_one_core)


def _take_one_core() -> None:
    torch.get_num_threads()  # from its first call in a thread on it leaves the number alone
    ThreadpoolController().select(user_api="openmp").limit(limits=1)
