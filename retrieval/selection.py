"""Selects and sorts the smallest numbers of rows, much faster than by their indices."""

import numpy as np
from numba.extending import register_jitable

from retrieval.compiled import compiled


def k_smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k smallest of each row, in ascending order of the columns.

    Args:
        values: fp32 `[n, w]`, without NaN.
        k: at most w.

    Returns:
        int64 `[n, k]`; of equal numbers at the k-th place, the first.

    Raises:
        ValueError: k is more than w.
    """
    if k > values.shape[1]:
        raise ValueError(f"{k} of {values.shape[1]} numbers")
    columns = np.empty((len(values), k), dtype=np.int64)
    _of_rows(np.ascontiguousarray(values, dtype=np.float32), columns)
    return columns


@compiled
def _of_rows(values, columns):
    k = columns.shape[1]
    chosen = np.empty(values.shape[1], dtype=np.int32)
    for i in range(len(values)):
        choose(values[i], k, chosen)
        columns[i] = chosen[:k]


@compiled
def choose(row, k, chosen):
    """Finds the k smallest of a row.

    Args:
        row: fp32 `[w]`, without NaN.
        k: at most w.
        chosen: int32, at least `[w]`; gets their k columns, in ascending order.
    """
    if k == len(row):
        for j in range(k):
            chosen[j] = j
        return
    limit = kth_smallest(row, k)
    n = 0
    for j in range(len(row)):  # without a branch, which nobody could predict
        chosen[n] = j
        n += row[j] <= limit
    if n != k:
        _choose_equals(row, k, limit, chosen)


@compiled
def _choose_equals(row, k, limit, chosen):
    """As `choose`, where others equal the k-th smallest, which is the limit: of these the first."""
    equal = k
    for j in range(len(row)):
        equal -= row[j] < limit
    n = 0
    for j in range(len(row)):
        below = row[j] < limit
        if n < k and (below or (equal > 0 and not row[j] > limit)):
            chosen[n] = j
            n += 1
            equal -= not below


@compiled
def kth_smallest(row, k):
    """A number that just k of a row do not exceed, or the k-th smallest where others equal it.

    Halves, like a search in a sorted array, the range of bits in which it lies: to count what is
    below a number takes a processor a small part of the time that moving numbers takes.

    Args:
        row: fp32 `[w]`, without NaN.
        k: from 1 to w, which is at least 1.
    """
    bits = row.view(np.int32)
    low = high = _ascending(bits[0])
    for j in range(len(bits)):
        here = _ascending(bits[j])
        low = min(low, here)
        high = max(high, here)
    low, high = np.int64(low) - 1, np.int64(high)
    while high - low > 1:
        middle = (low + high) >> 1
        n = _count(row, _number(middle))
        if n >= k:
            high = middle
            if n == k:
                break
        else:
            low = middle
    return _number(high)


@compiled
def _number(ascending):
    return np.int32(_ascending(np.int32(ascending))).view(np.float32)


@compiled
def _count(row, limit):
    n = np.int32(0)
    for j in range(len(row)):
        n = np.int32(n + np.int32(row[j] <= limit))
    return n


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
    packed[..., 1] = _ascending(values.view(np.int32))
    packed[..., 0] = np.arange(width)
    packed.view(np.int64).sort(axis=1)
    places = packed[..., 0] + np.arange(0, n * width, width)[:, None]
    return _ascending(packed[..., 1]).view(np.float32), places


@register_jitable
def _ascending(bits):
    """Bits of fp32 numbers as int32 of the same order, and back: for negative numbers they would
    ascend with the size."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
