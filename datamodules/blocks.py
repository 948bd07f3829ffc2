"""How a stream of tokens is cut into blocks, blocks get their left context, and rows make batches.

The inputs are the stream shifted by one: the input at offset p is token p - 1 (`</s>` for p = 0),
its target is token p. A row is a block of targets, each scored once, behind up to
`context_window` offsets that only give context.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

BreakMode = Literal["none", "complete", "eos"]


@dataclass(frozen=True)
class Rows:
    """Half-open ranges of stream offsets, one a row, all int64 `[rows]`.

    Attributes:
        context_starts: first offset that the row reads.
        starts: first offset that the row scores.
        ends: one past the last.
        kept: int64, the ascending offsets that are left where long lines are dropped: the ranges
            then count these. None: the ranges count the stream itself.
    """

    context_starts: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    kept: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that each row reads, `[rows]`."""
        return self.ends - self.context_starts

    def scored_by(self, row_numbers: np.ndarray) -> np.ndarray:
        """Stream offsets that some rows score, int64."""
        ranges = [np.arange(self.starts[row], self.ends[row]) for row in row_numbers]
        offsets = np.concatenate(ranges)
        return offsets if self.kept is None else self.kept[offsets]

    def behind_less_context(self, min_context: int) -> np.ndarray:
        """Stream offsets that are scored behind fewer than `min_context` tokens, ascending."""
        context, lengths = self.starts - self.context_starts, self.ends - self.starts
        short = np.clip(min_context - context, 0, lengths)
        first = np.repeat(np.cumsum(short) - short, short)
        offsets = np.repeat(self.starts, short) + np.arange(short.sum()) - first
        return offsets if self.kept is None else self.kept[offsets]

    def dropped(self, n_tokens: int) -> np.ndarray:
        """Stream offsets that no row scores, of `n_tokens` in all, ascending."""
        if self.kept is None:
            return np.empty(0, dtype=np.int64)
        return np.delete(np.arange(n_tokens), self.kept)


def make_rows(
    line_starts: np.ndarray,
    break_mode: BreakMode,
    tokens_per_sample: int,
    context_window: int,
    max_target_positions: int,
    drop_long_lines: bool = False,
) -> Rows:
    """Cuts a split into rows such that every offset is scored by exactly one of them.

    A row reads at most `tokens_per_sample` tokens, of which up to `context_window` precede its
    block. Under `none` a block is any stretch of `tokens_per_sample - context_window` tokens;
    under `complete` as many whole lines as fit into that; under `eos` one line. A longer line is
    a longer block of its own, cut only into pieces of `max_target_positions`; its context shrinks
    so that the row keeps to `tokens_per_sample`, down to none.

    `drop_long_lines` leaves out blocks longer than `max_target_positions`, from scores and from
    contexts, as fairseq does.

    Args:
        line_starts: int64 [lines + 1], the last is the length of the stream.
    """
    block_size = tokens_per_sample - context_window
    n_tokens = int(line_starts[-1])
    if break_mode == "none":
        edges = np.append(np.arange(0, n_tokens, block_size), n_tokens)
    elif break_mode == "eos":
        edges = np.unique(line_starts)
    else:
        edges = _whole_lines(line_starts, block_size)
    longest = max(max_target_positions, block_size)
    kept = None
    if drop_long_lines and (np.diff(edges) > longest).any():
        lengths = np.diff(edges)
        kept = np.flatnonzero(np.repeat(lengths <= longest, lengths))
        edges = np.append(0, np.cumsum(lengths[lengths <= longest]))
    edges = _cut_longer_than(longest, edges)
    starts, ends = edges[:-1], edges[1:]
    room = np.maximum(tokens_per_sample - (ends - starts), 0)
    context = np.minimum(np.minimum(room, context_window), starts)
    return Rows(starts - context, starts, ends, kept)


def _whole_lines(line_starts: np.ndarray, block_size: int) -> np.ndarray:
    """Edges of blocks that each hold as many whole lines as fit, at least one."""
    line_starts = np.unique(line_starts)
    after = np.searchsorted(line_starts, line_starts + block_size, side="right") - 1
    after = np.maximum(after, np.arange(len(line_starts)) + 1)  # the block after line i starts here
    block_lines, line, last = [0], 0, len(line_starts) - 1
    while line < last:
        line = int(after[line])
        block_lines.append(min(line, last))
    return line_starts[block_lines]


def _cut_longer_than(limit: int, edges: np.ndarray) -> np.ndarray:
    """Edges with every block longer than `limit` cut into pieces of `limit` and a rest."""
    lengths = np.diff(edges)
    pieces = -(-lengths // limit)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = np.repeat(edges[:-1], pieces) + (np.arange(pieces.sum()) - first) * limit
    return np.append(cut, edges[-1])


def make_batches(
    lengths: np.ndarray, order: np.ndarray, max_tokens: int, by_length: bool = True
) -> list[np.ndarray]:
    """Groups rows so that rows times longest row is at most `max_tokens` (one row at least).

    Args:
        lengths: int64 [rows], tokens of each row.
        order: permutation of the rows, in which they are taken.
        by_length: take them by length first (a stable sort), so that a batch holds rows of like
            length and padding is rare.

    Returns:
        Row numbers of each batch.
    """
    if by_length:
        order = order[np.argsort(lengths[order], kind="stable")]
    lengths = lengths[order]
    batches, start = [], 0
    while start < len(order):
        ahead = lengths[start : start + max(max_tokens // int(lengths[start]), 1)]
        cost = np.maximum.accumulate(ahead) * np.arange(1, len(ahead) + 1)
        rows = max(int(np.searchsorted(cost, max_tokens, side="right")), 1)
        batches.append(order[start : start + rows])
        start += rows
    return batches
