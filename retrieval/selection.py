"""Selects the smallest numbers of many rows."""

import numpy as np


def k_smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k smallest of each row, in ascending order of the columns.

    A partition of the numbers finds the k-th smallest several times faster than one of their
    indices does.

    Args:
        values: fp32 `[n, w]`, without NaN.
        k: at most w.

    Returns:
        int64 `[n, k]`; of equal numbers at the k-th place, some.
    """
    n, width = values.shape
    kth = np.partition(values, k - 1, axis=1)[:, k - 1 : k]
    chosen = np.flatnonzero(values <= kth)
    if len(chosen) == n * k:
        return chosen.reshape(n, k) - np.arange(0, n * width, width)[:, None]
    counts = np.bincount(chosen // width, minlength=n)
    columns = np.empty((n, k), dtype=np.int64)
    tied = counts > k
    columns[~tied] = (chosen[np.repeat(~tied, counts)] % width).reshape(-1, k)
    columns[tied] = np.sort(np.argpartition(values[tied], k - 1, axis=1)[:, :k], axis=1)
    return columns
