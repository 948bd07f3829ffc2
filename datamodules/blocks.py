"""Cuts a stream of tokens into blocks, adds their left context, and groups rows into batches.

Inputs are the stream shifted by one: the input at offset p is token p - 1 (`</s>` for p = 0), its
target is token p. A row is a block of targets, each scored once, preceded by up to `context_window`
offsets that only give context.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

BreakMode = Literal["none", "complete", "eos"]


@dataclass(frozen=True)
class Rows:
    """Half-open ranges of stream offsets, one per row, all int64 `[rows]`.

    Attributes:
        context_starts: first offset that the row reads.
        starts: first offset that the row scores.
        ends: one past the last offset.
        kept: int64, ascending, the stream offsets that remain when long lines are dropped: the
            ranges are then ranges of this array. None where they are ranges of the stream itself.
    """

    context_starts: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    kept: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens that each row reads, `[rows]`."""
        return self.ends - self.context_starts

    def scored_by(self, row_numbers: np.ndarray) -> np.ndarray:
        """Stream offsets int64 that the given rows score."""
        ranges = [np.arange(self.starts[row], self.ends[row]) for row in row_numbers]
        offsets = np.concatenate(ranges)
        return offsets if self.kept is None else self.kept[offsets]

    def behind_less_context(self, min_context: int) -> np.ndarray:
        """Stream offsets that are scored with fewer than `min_context` tokens before them in their
        row, ascending."""
        context, lengths = self.starts - self.context_starts, self.ends - self.starts
        short = np.clip(min_context - context, 0, lengths)
        first = np.repeat(np.cumsum(short) - short, short)
        offsets = np.repeat(self.starts, short) + np.arange(short.sum()) - first
        return offsets if self.kept is None else self.kept[offsets]

    def dropped(self, n_tokens: int) -> np.ndarray:
        """Stream offsets that no row scores, of `n_tokens` in all, ascending."""
        if self.kept is not None:
            return np.delete(np.arange(n_tokens), self.kept)
        edge = np.zeros(n_tokens + 1, dtype=np.int8)
        edge[self.starts] += 1
        edge[self.ends] -= 1
        return np.flatnonzero(np.cumsum(edge[:-1]) == 0)


def make_rows(
    line_starts: np.ndarray,
    break_mode: BreakMode,
    tokens_per_sample: int,
    context_window: int,
    max_target_positions: int,
    drop_long_lines: bool = False,
) -> Rows:
    """Cuts a split into rows so that exactly one row scores each offset.

    A row reads at most `tokens_per_sample` tokens, of which up to `context_window` precede its
    block. Under `none` a block is any stretch of `tokens_per_sample - context_window` tokens;
    under `complete` as many whole lines as fit into that; under `eos` one line. A longer line is
    a block of its own, cut only into pieces of `max_target_positions`; its context shrinks, down to
    none, to keep the row within `tokens_per_sample`.

    With `drop_long_lines`, blocks longer than `max_target_positions` are neither scored nor read as
    context, as in fairseq.

    Args:
        line_starts: int64 `[lines + 1]`; the last one is the length of the stream.
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


def make_windows(line_starts: np.ndarray, window: int, stride: int) -> Rows:
    """Cuts each line of a split, a group of lines of its text, into windows as knn-transformers
    does: every `stride` tokens a window ends, which reads the `window` tokens up to there and
    scores those that no window has scored. The first token of a line, before which the model reads
    nothing, is not scored.

    Args:
        line_starts: int64 `[lines + 1]`; the last one is the length of the stream.
        window: more than `stride`, or as much: then the first token of no window is scored.
    """
    firsts, lasts = line_starts[:-1], line_starts[1:]
    count = -(-(lasts - firsts) // stride)
    line = np.repeat(np.arange(len(firsts)), count)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    starts = firsts[line] + number * stride
    ends = np.minimum(starts + stride, lasts[line])
    reads = np.maximum(starts + stride - window, firsts[line]) + 1
    rows = Rows(reads, np.maximum(starts, reads), ends)
    some = rows.starts < rows.ends
    return Rows(rows.context_starts[some], rows.starts[some], rows.ends[some])


def _whole_lines(line_starts: np.ndarray, block_size: int) -> np.ndarray:
    """Edges of blocks that each hold as many whole lines as fit, at least one."""
    line_starts = np.unique(line_starts)
    # If a block starts at line i, the next one starts at line next_start[i].
    next_start = np.searchsorted(line_starts, line_starts + block_size, side="right") - 1
    next_start = np.maximum(next_start, np.arange(len(line_starts)) + 1)
    block_lines, line, last = [0], 0, len(line_starts) - 1
    while line < last:
        line = int(next_start[line])
        block_lines.append(min(line, last))
    return line_starts[block_lines]


def _cut_longer_than(limit: int, edges: np.ndarray) -> np.ndarray:
    """Edges after cutting every block longer than `limit` into pieces of `limit` and a rest."""
    lengths = np.diff(edges)
    pieces = -(-lengths // limit)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = np.repeat(edges[:-1], pieces) + (np.arange(pieces.sum()) - first) * limit
    return np.append(cut, edges[-1])


def make_batches(
    lengths: np.ndarray, order: np.ndarray, max_tokens: int, by_length: bool = True
) -> list[np.ndarray]:
    """Groups rows so that each batch has at most `max_tokens` tokens, padding included, or one row.

    Args:
        lengths: int64 `[rows]`, tokens of each row.
        order: permutation of the rows, in which they are taken.
        by_length: sort them by length first (stably), so that a batch holds rows of similar length
            and little padding.

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
