"""Loops over numbers, compiled when they first run and kept beside the source.

numpy goes through memory once for every step of a computation; a compiled loop takes all steps
while a number is in a register. Other threads run meanwhile.
"""

from functools import partial

from numba import njit

compiled = partial(njit, nogil=True, cache=True)
"""For functions of arrays: no argument is checked, and an index is not either."""
summing = partial(compiled, fastmath={"reassoc", "contract"})
"""For sums: the order of their terms is the compiler's, so that it can add several at a time."""
