"""Selects and sorts the smallest numbers of rows, much faster than numpy's argsort, and checks that
neighbours are in order."""

import numpy as np

from neighborlm.retrieval.engine.loops import ascending, choose_of_rows, out_of_order


def k_smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k smallest of each row, in ascending order of the columns.

    Args:
        values: `[n, w]`, without NaN; compared as fp32.
        k: at most w.

    Returns:
        int64 `[n, k]`; of equal numbers at the k-th place, the first.

    Raises:
        ValueError: k is more than w.
    """
    if k > values.shape[1]:
        raise ValueError(f"{k} of {values.shape[1]} numbers")
    columns = np.empty((len(values), k), dtype=np.int64)
    choose_of_rows(np.ascontiguousarray(values, dtype=np.float32), columns)
    return columns


def sort_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in ascending order.

    Numbers and places are sorted together, as one integer each.

    Args:
        values: fp32 `[n, w]`, without NaN.

    Returns:
        the sorted numbers fp32 `[n, w]`, and where each was in `values.ravel()`, int64 `[n, w]`.
    """
    n, width = values.shape
    packed = np.empty((n, width, 2), dtype=np.int32)
    packed[..., 1] = ascending(values.view(np.int32))
    packed[..., 0] = np.arange(width)
    packed.view(np.int64).sort(axis=1)
    places = packed[..., 0] + (width * np.arange(n))[:, None]
    return ascending(packed[..., 1]).view(np.float32), places


def first_out_of_order(distances: np.ndarray, rows: np.ndarray, similar: bool) -> int:
    """The first query whose neighbours are not in order, nearest first and the missing last; -1
    where there is none.

    Args:
        distances: fp32 `[Q, k]`.
        rows: int64 `[Q, k]`, -1 where missing.
        similar: whether large is near.
    """
    return out_of_order(np.ascontiguousarray(distances), np.ascontiguousarray(rows), similar)
