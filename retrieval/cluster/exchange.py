"""What the ranks give one another of a datastore in shards where each host has a shard of its own:
rows of arrays, batch by batch, and small files that all must have alike.

All ranks call these functions the same number of times and in the same order, each from one thread.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neighborlm.common.errors import InputError
from neighborlm.common.files import digest_of
from neighborlm.retrieval.cluster.distributed import deal
from neighborlm.retrieval.cluster.ranks import Ranks
from neighborlm.retrieval.store.datastore import Datastore


class Exchange:
    """The way to rows of other hosts' shards.

    Each shard is read by one rank that reaches it, for all that do not; those of a host read its
    shard by themselves.

    Args:
        shard: the one that this host has, opened as part of the whole.
        ranks: all of them.

    Raises:
        InputError: a shard is on no host.
    """

    def __init__(self, shard: Datastore, ranks: Ranks) -> None:
        part = shard.part
        self.number, self.placement, self.ranks = part.number, part.placement, ranks
        dealt = deal(self.placement, ranks.gather([part.number]), part.path)
        self.readers = np.empty(self.placement.shards, dtype=np.int64)
        for rank, numbers in enumerate(dealt):
            self.readers[numbers] = rank

    @property
    def communication(self) -> dict[str, int]:
        """Figures of this rank so far: `ranks`, `bytes_sent` and `bytes_received`."""
        return {"ranks": self.ranks.size, **self.ranks.traffic}

    def rows(self, own: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rows of an array that lies in shards.

        Args:
            own: its part in this host's shard, `[size, …]`.
            rows: of the whole, int64 `[n]`; each rank asks for others, or none.

        Returns:
            `[n, …]`.

        Raises:
            LostRank: another rank cannot go on.
        """
        numbers, places = self.placement.locate(rows)
        readers = np.where(numbers == self.number, self.ranks.rank, self.readers[numbers])
        order = np.argsort(readers, kind="stable")
        ends = np.searchsorted(readers[order], np.arange(1, self.ranks.size))
        wanted = np.split(places[order], ends)
        counts = self._swap([np.array([len(of_rank)]) for of_rank in wanted], [(1,)] * len(wanted))
        asked = self._swap(wanted, [(int(count[0]),) for count in counts])
        try:
            answers = [np.ascontiguousarray(own[of_rank]) for of_rank in asked]
        except BaseException:
            self.ranks.fail()
            raise
        found = self._swap(answers, [(len(of_rank), *own.shape[1:]) for of_rank in wanted])
        result = np.empty((len(rows), *own.shape[1:]), dtype=own.dtype)
        result[order] = np.concatenate(found)
        return result

    def _swap(
        self, outgoing: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]
    ) -> list[np.ndarray]:
        """Sends an array to each rank; those of these shapes, and of the same type, come back."""
        described = [[(shape, outgoing[0].dtype)] for shape in shapes]
        _, received = self.ranks.step((0, 0, 0), [[one] for one in outgoing], lambda _: described)
        return [of_rank[0] for of_rank in received]


class ExchangedArray:
    """An array in shards as one, like `ShardedArray`, of which this rank reaches but a part: all
    ranks read at the same time.

    Args:
        own: the part in this host's shard, `[size, …]`.
        exchange: the way to the others.
    """

    def __init__(self, own: np.ndarray, exchange: Exchange) -> None:
        self.own = own
        self.exchange = exchange
        self.dtype = own.dtype
        self.shape = (exchange.placement.rows, *own.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Rows int64 of any shape; those below 0 count from the end."""
        flat = np.where(rows < 0, rows + len(self), rows).ravel()
        return self.exchange.rows(self.own, flat).reshape(*rows.shape, *self.shape[1:])


def share_files(ranks: Ranks, paths: Sequence[Path], make: Callable[[], Any]) -> None:
    """Has every host have the same few small files: where they are missing they are written as the
    first rank has them that has them all, and where no rank has, rank 0 makes them.

    Args:
        paths: where they lie on this host; the names are the same on all.
        make: makes all of them.

    Raises:
        InputError: they differ from host to host.
    """
    held = ranks.gather(_digests(paths))
    if not any(held):
        if ranks.rank == 0:
            make()
        held = ranks.gather(_digests(paths))
    source = next(rank for rank, digests in enumerate(held) if digests)
    if any(digests not in (None, held[source]) for digests in held):
        raise InputError(
            f"{paths[0]}: is another one on {ranks.hosts[ranks.rank]} than on other hosts; "
            f"expected the same, so remove it, and what was made by it, on all hosts but one"
        )
    if all(held):
        return
    mine = [path.read_bytes() for path in paths] if ranks.rank == source else None
    contents = ranks.gather(mine)[source]
    if held[ranks.rank] is None:
        for path, content in zip(paths, contents, strict=True):
            making = path.with_name(f"{path.name}.{os.getpid()}.making")
            making.write_bytes(content)
            making.replace(path)


def _digests(paths: Sequence[Path]) -> dict[str, str] | None:
    """Of each file by its name; None where one is missing."""
    if not all(path.is_file() for path in paths):
        return None
    return {path.name: digest_of(path) for path in paths}
