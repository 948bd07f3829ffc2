"""What all ranks of a run know together. Every rank calls these functions, or none does."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank_and_ranks() -> tuple[int, int]:
    """The number of this rank, and how many there are: 0 and 1 where a process is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_all_ranks(value: T) -> list[T]:
    """What each rank calls this with, in their order."""
    _, ranks = rank_and_ranks()
    if ranks == 1:
        return [value]
    values: list = [None] * ranks
    dist.all_gather_object(values, value)
    return values
