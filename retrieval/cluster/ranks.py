"""Sends arrays between the ranks of a distributed search, and tells which rank is lost.

All ranks go in step: in each step every rank sends a header and arrays to every other one. Each
pair of ranks does so by itself, since collectives of gloo neither take arrays of different sizes
nor tell who has failed. A rank that cannot go on sends the reason, and the rank that caused it, in
place of its next header; so all ranks name the same one, and none waits longer than the timeout.
"""

import socket
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import DTypeLike

from neighborlm.common.errors import LostRank

WORDS = 3
"""Numbers in a header that are the caller's."""
HEADER_BYTES = 8 * (2 + WORDS)
HEADERS, ARRAYS = 0, 1
"""Tags of messages."""
Arrays = Sequence[np.ndarray]


class State(IntEnum):
    """What has become of a rank; of several that are lost the first of the highest is named."""

    GOES_ON = 0
    ENDED = 1
    FAILED = 2
    SILENT = 3


SENTENCES = {
    State.ENDED: "has ended",
    State.FAILED: "has failed",
    State.SILENT: "has said nothing for {timeout:g} seconds",
}


class Loss(NamedTuple):
    """A rank, and what has become of it."""

    state: State
    rank: int


class Ranks:
    """All ranks of a group, and the way from this one to the others.

    Args:
        group: of gloo; nobody else may use it, and one thread at a time this object.
        timeout: the group's own, in seconds.

    Attributes:
        rank: this one's number.
        size: how many there are.
        hosts: the machine of each.
        traffic: `bytes_sent` and `bytes_received` by this one.

    Raises:
        LostRank: not all ranks came.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self.group = group
        self.timeout = timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.traffic: Counter[str] = Counter()
        self.lost: dict[int, Loss] = {}
        """The ranks to which there is no way any more, and why."""
        self.error: LostRank | None = None
        self.hosts: list[str] = self.gather(socket.gethostname())

    @classmethod
    def connect(cls, timeout: float) -> "Ranks":
        """All ranks of the default group, in one of their own; each must call this."""
        return cls(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)), timeout)

    def gather(self, value: Any) -> list[Any]:
        """What each rank calls this with.

        Raises:
            LostRank: not all ranks did.
        """
        values = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise LostRank(
                f"rank {self.rank} on {socket.gethostname()} does not reach the other ranks of "
                f"{self.size} ({str(error).splitlines()[0]})"
            ) from None
        return values

    def step(
        self,
        words: Sequence[int],
        outgoing: Sequence[Arrays],
        shapes: Callable[[np.ndarray], Sequence[Sequence[tuple[tuple[int, ...], DTypeLike]]]],
    ) -> tuple[np.ndarray, Sequence[Arrays]]:
        """Sends arrays to each rank and receives those of each; the own ones come back.

        Args:
            words: of the header.
            outgoing: for each rank, contiguous arrays.
            shapes: from the headers int64 `[ranks, WORDS]` to shape and type of each array that
                comes from each rank.

        Returns:
            the headers, and the arrays from each rank.

        Raises:
            LostRank: a rank has ended, has failed or is silent.
        """
        if self.error is not None:
            raise self.error
        headers = np.zeros((self.size, 2 + WORDS), dtype=np.int64)
        headers[self.rank, 2:] = words
        works = self._start(dist.isend, ARRAYS, outgoing)
        self._swap(headers)
        received = [
            [np.empty(*described) for described in of_rank] for of_rank in shapes(headers[:, 2:])
        ]
        received[self.rank] = outgoing[self.rank]
        works += self._start(dist.irecv, ARRAYS, received)
        self._wait(works)
        if self.lost:
            loss = max(self.lost.values(), key=lambda loss: (loss.state, -loss.rank))
            self._leave(loss)
            raise self.error
        return headers[:, 2:], received

    def fail(self) -> None:
        """Tells the others, in place of the next step, that this rank cannot go on."""
        if self.error is None:
            self._leave(Loss(State.FAILED, self.rank))

    def _leave(self, loss: Loss) -> None:
        what = SENTENCES[loss.state].format(timeout=self.timeout)
        self.error = LostRank(
            f"rank {loss.rank} on {self.hosts[loss.rank]} {what}, and without it the "
            f"{self.size} ranks cannot search; what it said itself may tell why"
        )
        headers = np.zeros((self.size, 2 + WORDS), dtype=np.int64)
        headers[self.rank, :2] = loss
        self._swap(headers)

    def _swap(self, headers: np.ndarray) -> None:
        """Sends the own header, and fills in those of the others."""
        works = self._start(dist.isend, HEADERS, [headers[[self.rank]]] * self.size)
        works += self._start(dist.irecv, HEADERS, [[header] for header in headers])
        self._wait(works)
        for rank, (state, because_of, *_) in enumerate(headers.tolist()):
            if state != State.GOES_ON and rank != self.rank:
                self.lost.setdefault(rank, Loss(State(state), because_of))

    def _start(self, begin: Callable, tag: int, arrays: Sequence[Arrays]) -> list:
        """Begins to send or to receive; each thing to wait for, with the number of the rank."""
        sends = begin is dist.isend
        peer = "group_dst" if sends else "group_src"
        works = []
        for rank, of_rank in enumerate(arrays):
            for array in of_rank:
                if rank == self.rank or rank in self.lost or array.size == 0:
                    continue
                self.traffic["bytes_sent" if sends else "bytes_received"] += array.nbytes
                try:
                    tensor = torch.from_numpy(array)
                    works.append((rank, begin(tensor, group=self.group, tag=tag, **{peer: rank})))
                except RuntimeError as error:
                    self._lose(rank, error)
        return works

    def _wait(self, works: list) -> None:
        """Waits for every rank, whichever is lost: the others count on this one."""
        for rank, work in works:
            if rank not in self.lost:
                try:
                    work.wait()
                except RuntimeError as error:
                    self._lose(rank, error)

    def _lose(self, rank: int, error: RuntimeError) -> None:
        silent = "timed out" in str(error).lower()
        self.lost[rank] = Loss(State.SILENT if silent else State.ENDED, rank)
