"""How the rows of a datastore are dealt into shards, and arrays that lie in shards.

Rows are dealt in blocks: block b belongs to shard b mod S. Where there are no more blocks than
shards, each shard is one contiguous piece of the whole; otherwise it is a mixture of all parts of
the text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from neighborlm.common.errors import InputError

Kind = Literal["contiguous", "round_robin"]
BLOCK_ROWS = 1 << 16
"""Rows of a block that is dealt round-robin, unless shards are smaller."""


@dataclass(frozen=True)
class Placement:
    """Which shard holds which rows.

    Attributes:
        rows: of the whole, N.
        shards: how many there are, S.
        block_rows: consecutive rows that lie together; only the last block may have fewer.
    """

    rows: int
    shards: int
    block_rows: int

    @classmethod
    def deal(cls, rows: int, shards: int, kind: Kind, block_rows: int = BLOCK_ROWS) -> "Placement":
        """Deals rows to shards, as evenly as blocks allow.

        Args:
            rows: of the whole.
            shards: how many.
            kind: `contiguous`, one block a shard, or `round_robin`.
            block_rows: of `round_robin`; fewer where a shard would have less than a block.

        Raises:
            InputError: a shard would have no row.
        """
        size = -(-rows // shards)
        placement = cls(rows, shards, size if kind == "contiguous" else min(block_rows, size))
        filled = min(-(-rows // placement.block_rows), shards)
        if filled < shards:
            raise InputError(
                f"{shards} shards: {rows:,} rows in blocks of {placement.block_rows} fill only "
                f"{filled} of them; expected fewer shards"
            )
        return placement

    @property
    def kind(self) -> Kind:
        """`contiguous` or `round_robin`."""
        return "contiguous" if self.block_rows * self.shards >= self.rows else "round_robin"

    def described(self, number: int) -> dict[str, Any]:
        """What the manifest of shard `number` says of its place in the whole."""
        return {
            "number": number,
            "of": self.shards,
            "placement": self.kind,
            "block_rows": self.block_rows,
            "rows_of_whole": self.rows,
        }

    @classmethod
    def from_shard(cls, described: dict[str, Any]) -> "Placement":
        """The placement that a shard's manifest tells, see `described`."""
        return cls(described["rows_of_whole"], described["of"], described["block_rows"])

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From rows of the whole, int64 of any shape, to numbers of shards and rows in these."""
        blocks = rows // self.block_rows
        local = blocks // self.shards * self.block_rows + rows % self.block_rows
        return blocks % self.shards, local

    def rows_of(self, number: int, local: np.ndarray) -> np.ndarray:
        """From rows of shard `number`, int64 of any shape, to rows of the whole; -1 stays."""
        blocks = local // self.block_rows * self.shards + number
        return np.where(local < 0, -1, blocks * self.block_rows + local % self.block_rows)

    def size(self, number: int) -> int:
        """Rows of shard `number`."""
        full, rest = divmod(self.rows, self.block_rows)
        size = len(range(number, full, self.shards)) * self.block_rows
        return size + (rest if full % self.shards == number else 0)

    def runs(self, first: int, last: int) -> Iterator[tuple[int, slice, slice]]:
        """Rows `first` to `last` in pieces that lie together: the number of a shard, where in that
        shard, and where among the rows asked for."""
        at = first
        while at < last:
            block, inside = divmod(at, self.block_rows)
            length = min(self.block_rows - inside, last - at)
            begin = block // self.shards * self.block_rows + inside
            yield (
                block % self.shards,
                slice(begin, begin + length),
                slice(at - first, at - first + length),
            )
            at += length


class ShardedArray:
    """Arrays of shards as one, indexed by rows of the whole.

    Reading gives plain arrays, of any one index that numpy takes along the first axis. A slice
    inside one block is a view, everything else a copy.

    Args:
        parts: of each shard, `[size, …]`.
        placement: of the rows.
    """

    def __init__(self, parts: Sequence[np.ndarray], placement: Placement) -> None:
        self.parts = list(parts)
        self.placement = placement
        self.dtype = parts[0].dtype
        self.shape = (placement.rows, *parts[0].shape[1:])
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def narrowed(self, columns: int) -> "ShardedArray":
        """The first few columns of each row, as views."""
        return ShardedArray([part[:, :columns] for part in self.parts], self.placement)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, in memory."""
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            first, last, step = rows.indices(len(self))
            return self._range(first, last) if step == 1 else self._rows(np.arange(len(self))[rows])
        rows = np.asarray(rows)
        if rows.dtype == bool:
            return self._rows(np.flatnonzero(rows))
        if rows.size == 0:
            return np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        return self._rows(rows.ravel()).reshape(*rows.shape, *self.shape[1:])[()]

    def _range(self, first: int, last: int) -> np.ndarray:
        runs = list(self.placement.runs(first, last))
        if len(runs) == 1:
            number, local, _ = runs[0]
            return self.parts[number][local]
        result = np.empty((max(last - first, 0), *self.shape[1:]), self.dtype)
        for number, local, out in runs:
            result[out] = self.parts[number][local]
        return result

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """These rows, `[n, …]`; those below 0 count from the end."""
        lowest, highest = rows.min(initial=0), rows.max(initial=0)
        if lowest < -len(self) or highest >= len(self):
            raise IndexError(f"rows from {lowest} to {highest} of an array of {len(self)}")
        if lowest < 0:
            rows = np.where(rows < 0, rows + len(self), rows)
        numbers, local = self.placement.locate(rows)
        smallest_type = np.min_scalar_type(self.placement.shards)  # numpy sorts 16 bits by radix
        order = np.argsort(numbers.astype(smallest_type), kind="stable")
        bounds = np.searchsorted(numbers[order], np.arange(self.placement.shards + 1))
        result = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for part, begin, end in zip(self.parts, bounds[:-1], bounds[1:], strict=True):
            if begin < end:
                result[order[begin:end]] = part[local[order[begin:end]]]
        return result


def shard_name(number: int, of: int) -> str:
    """What the directory of a shard is called, inside that of the whole."""
    return f"shard-{number:05}-of-{of:05}"
