"""Loops over numbers, compiled when they first run and kept beside the source.

numpy goes through memory once for every step of a computation; a compiled loop takes all steps
while a number is in a register. Other threads run meanwhile.
"""

from collections.abc import Callable
from functools import partial

from numba import njit


def compiled(function: Callable, **options) -> Callable:
    """The function, of arrays and numbers, as machine code: no argument is checked, nor an index.

    Args:
        options: see `numba.njit`.
    """
    try:
        return njit(function, nogil=True, cache=True, **options)
    except RuntimeError:  # nothing can be kept here, nor among the user's own files
        return njit(function, nogil=True, **options)


summing = partial(compiled, fastmath={"reassoc", "contract"})
"""For sums: the order of their terms is the compiler's, so that it can add several at a time."""
