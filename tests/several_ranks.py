"""Functions as the ranks of a gloo group, each in a process of its own, forked from one that has
imported the programs."""

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")


def start(count: int, folder: Path, function: Callable, *args) -> list:
    """Processes that call `function(rank, *args)`; what it returns or raises lies in the folder."""
    folder.mkdir()
    processes = [
        CONTEXT.Process(target=work, args=(rank, count, folder, function, args), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def work(rank: int, count: int, folder: Path, function: Callable, args: tuple) -> None:
    """One rank."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    where = f"file://{folder.absolute()}/rendezvous"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=count)
    try:
        result = function(rank, *args)
    except Exception as error:
        result = error
    making = folder / f"{rank}.making"
    making.write_bytes(pickle.dumps(result))
    making.rename(folder / f"{rank}.pickle")
    os._exit(0)  # torch waits for a group with a dead rank


def results(processes: list, folder: Path, of: list[int], seconds: float = 120) -> list:
    """What some ranks return or raise; all are ended then."""
    deadline = time.monotonic() + seconds
    try:
        for rank in of:
            while not (folder / f"{rank}.pickle").exists():
                assert time.monotonic() < deadline, f"rank {rank} says nothing"
                time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in of]


def run(count: int, folder: Path, function: Callable, *args) -> list:
    """What `function(rank, *args)` returns in each of some ranks."""
    found = results(start(count, folder, function, *args), folder, list(range(count)))
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found
