"""Tells a running text from shuffled lines.

In a running text a line repeats rare words of the line before. A shuffled line shares no more of
them with its neighbour than with any other line, and a memory of the recent tokens has nothing to
remember.
"""

import numpy as np

TOKENS, LINES = 300_000, 100
"""How many tokens, from the first on, are compared, and the smallest number of lines that is
judged."""
FREQUENT = 200
"""How many of the most frequent tokens are left out: lines share them in any order."""
TIMES, SHARED = 1.2, 100
"""In a running text a line shares this many times more tokens with the next line than with a
distant one; the smallest number of tokens shared with distant lines that is judged."""


def lines_are_shuffled(tokens: np.ndarray, line_starts: np.ndarray) -> bool:
    """Whether neighbouring lines have no more rare tokens in common than distant ones.

    Args:
        tokens: integers `[N]`.
        line_starts: int64 `[lines + 1]`, the last is N.

    Returns:
        False also where that cannot be judged: few lines, or lines that share nothing.
    """
    tokens = np.asarray(tokens[:TOKENS]).astype(np.int64)
    lengths = np.diff(np.minimum(line_starts, len(tokens)))
    rare = np.bincount(tokens)
    is_rare = np.ones(len(rare), dtype=bool)
    is_rare[np.argsort(rare, kind="stable")[-FREQUENT:]] = False
    line = np.repeat(np.arange(len(lengths)), lengths)
    tokens = tokens[: len(line)]
    kept = is_rare[tokens]
    _, line = np.unique(line[kept], return_inverse=True)  # lines without any are passed over
    if not len(line) or line[-1] + 1 < LINES:
        return False
    lines, vocabulary = line[-1] + 1, len(rare)
    pairs = np.unique(line * vocabulary + tokens[kept])

    def shared_with(distance: int) -> int:
        moved = (pairs + distance * vocabulary) % (lines * vocabulary)
        return int(np.isin(moved, pairs, kind="sort").sum())

    distant = np.mean([shared_with(int(lines * part)) for part in (0.3, 0.4, 0.5)])
    return bool(distant >= SHARED and shared_with(1) < TIMES * distant)
