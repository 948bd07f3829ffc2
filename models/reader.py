"""`Reader`: texts of any length, read token by token through the window of a model."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from neighborlm.common.contracts import State, StepwiseModel, Want

NOTHING = -1
"""In place of a token, where a row has not begun."""


class Read(NamedTuple):
    """What a model says after it has read T more tokens of B texts; see `contracts.Step`.

    Attributes:
        log_probs: fp32 `[B, V]`, natural-log probability of every next token.
        keys: `[B, T, d]` by key type, the vector of the context that ends with each token.
    """

    log_probs: Tensor
    keys: Mapping[str, Tensor]


class Reader:
    """Reads B texts, each of which may become longer than a row of the model.

    When a row is full, the model reads its last `context` tokens again as a new row, in which the
    text goes on. With half a window of context these are the rows in which an evaluation with such
    a `context_window` scores a text. What is said of a text does not depend on those beside it.

    Args:
        model: in evaluation mode.
        want: its keys.
        window: longest row, in tokens.
        context: tokens that are read again, fewer than `window`.
        start: id that rows begin with, in place of the first of these; None for that token itself.
            A text brings the start of its first row along.
    """

    def __init__(
        self, model: StepwiseModel, want: Want, window: int, context: int, start: int | None = None
    ) -> None:
        self.model = model
        self.want = want
        self.window = window
        self.context = context
        self.start = start
        self.state: State | None = None
        self.rows: Tensor | None = None
        """int64 `[B, columns]`, the tokens of the present rows, padded on the left."""

    def read(self, tokens: Tensor) -> Read:
        """Reads tokens int64 `[B, T]`, with -1 in front of the first token of a text."""
        if self.rows is None:
            self.rows = tokens[:, :0]
        parts = []
        while tokens.shape[1]:
            if self.rows.shape[1] == self.window:
                self._begin_rows()
            room = self.window - self.rows.shape[1]
            part, tokens = tokens[:, :room], tokens[:, room:]
            parts.append(self._step(part))
        keys = {name: torch.cat([p.keys[name] for p in parts], dim=1) for name in self.want.keys}
        return Read(parts[-1].log_probs, keys)

    def _step(self, tokens: Tensor) -> Read:
        log_probs, keys, self.state = self.model.step(tokens, self.state, self.want)
        self.rows = torch.cat([self.rows, tokens], dim=1)
        return Read(log_probs, keys)

    def _begin_rows(self) -> None:
        """Lets full rows begin anew; all others are read again as they are."""
        lengths = (self.rows != NOTHING).sum(dim=1)
        is_full = lengths == self.window
        kept = torch.where(is_full, self.context, lengths)
        columns = torch.arange(self.rows.shape[1], device=kept.device)
        is_kept = columns >= self.rows.shape[1] - kept[:, None]
        rows = self.rows.masked_fill(~is_kept, NOTHING)[:, self.rows.shape[1] - int(kept.max()) :]
        if self.start is not None and self.context:
            rows[is_full, rows.shape[1] - self.context] = self.start
        self.state, self.rows = None, rows[:, :0]
        if rows.shape[1]:
            self._step(rows)

    def select(self, texts: Tensor) -> None:
        """From now on text i is a copy of text `texts[i]`, int64 `[B]`."""
        self.state, self.rows = self.state.select(texts), self.rows[texts]


def padded(rows: list[list[int]]) -> Tensor:
    """Rows of tokens, of which none is empty, as int64 `[B, T]`, padded on the left.

    >>> padded([[5, 6], [7]]).tolist()
    [[5, 6], [-1, 7]]
    """
    widest = max(map(len, rows))
    return torch.stack(
        [F.pad(torch.tensor(row), (widest - len(row), 0), value=NOTHING) for row in rows]
    )
