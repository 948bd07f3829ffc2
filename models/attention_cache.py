"""Keys and values of the tokens that a decoder has read, so that each token is read once.

Rows are padded on the left: column c of the cache holds a token of every row that has begun by
there.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

COLUMNS = 64
"""Columns that a new cache has room for; the room doubles when it is full."""


Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""Adds the keys and values `[B, heads, T, d]` of a layer's newest T columns. Returns those of all C
columns, and which of these each of the newest sees, bool `[B, 1, T, C]`, or None where each sees
all."""


class AttentionCache:
    """What a decoder has read of B rows.

    Attributes:
        width: columns read so far.
        begins: int64 `[B]`, first column of each row that is no padding.
    """

    def __init__(self) -> None:
        self.width = 0
        self.begins: Tensor | None = None
        self.stored: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each layer, `[B, heads, columns, d]`, any in columns not read yet."""
        self.mask: Tensor | None = None
        """Which columns each of the newest sees; see `Extend`."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Makes room for columns of tokens int64 `[B, T]`, -1 in front of the first token of a
        row.

        Returns:
            their positions in their rows, int64 `[B, T]`, 0 where padded.
        """
        batch, new = tokens.shape
        before = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
        before = before if self.begins is None else self.begins
        self.begins = torch.where(before == self.width, before + (tokens < 0).sum(dim=1), before)
        self.width += new
        columns = torch.arange(self.width, device=tokens.device)
        newest = columns[self.width - new :]
        self.mask = None
        if new > 1 or bool((self.begins > 0).any()):
            visible = (columns <= newest[:, None]) & (columns >= self.begins[:, None, None])
            # Padding sees itself, since attention to nothing at all is not a number.
            self.mask = (visible | (columns == newest[:, None]))[:, None]
        return (newest - self.begins[:, None]).clamp(min=0)

    def of_layer(self, layer: int) -> Extend:
        """What adds a layer's keys and values."""
        return partial(self._extended, layer)

    def _extended(
        self, layer: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if layer == len(self.stored):
            self.stored.append((keys[:, :, :0], values[:, :, :0]))
        self.stored[layer] = self._with(self.stored[layer], (keys, values))
        whole = (x[:, :, : self.width] for x in self.stored[layer])
        return *whole, self.mask

    def _with(self, stored: Sequence[Tensor], new: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values with new ones written into the newest columns."""
        room, first = stored[0].shape[2], self.width - new[0].shape[2]
        if room < self.width:
            room = max(2 * room, self.width, COLUMNS)
            wider = tuple(x.new_empty(*x.shape[:2], room, x.shape[3]) for x in new)
            for into, x in zip(wider, stored, strict=True):
                into[:, :, :first] = x[:, :, :first]
            stored = wider
        for into, x in zip(stored, new, strict=True):
            into[:, :, first : self.width] = x
        return tuple(stored)

    def select(self, rows: Tensor) -> "AttentionCache":
        """See `common.contracts.State.select`."""
        selected = AttentionCache()
        selected.width, selected.begins = self.width, self.begins[rows]
        selected.stored = [tuple(x[rows] for x in of_layer) for of_layer in self.stored]
        return selected
