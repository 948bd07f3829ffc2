"""Finds out what this processor does fast; the only file that uses private names of torch and
MKL."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from threadpoolctl import ThreadpoolController

multiply_bytes = getattr(torch, "_int_mm", None)
"""The product of int8 `[n, d]` and `[d, m]` as int32, where torch has one; it is wrong for d =
1."""


@cache
def bytes_are_exact() -> bool:
    """Whether torch multiplies bytes exactly. On processors without instructions for it, sums of
    pairs saturate at 16 bits."""
    if not torch.backends.mkldnn.is_available() or multiply_bytes is None:
        return False
    one = torch.full((33, 260), 127, dtype=torch.int8)
    one[1::3], one[2::3, ::2] = -127, -127
    found = multiply_bytes(one.repeat(8, 1), one.T)
    return torch.equal(found.double(), one.repeat(8, 1).double() @ one.T.double())


@cache
def bytes_pay() -> bool:
    """Whether products of bytes are likely to be worth while."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and bytes_are_exact()


def take_one_core() -> None:
    """Limits all libraries to one core for the work of the calling thread."""
    torch.get_num_threads()  # torch sets the number at its first call in a thread, and then no more
    ThreadpoolController().select(user_api="openmp").limit(limits=1)
    # MKL, by which torch multiplies on x86, has a number of its own for each thread.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if library.is_file():
        set_threads = getattr(ctypes.CDLL(str(library)), "MKL_Set_Num_Threads_Local", None)
        if set_threads is not None:
            set_threads(1)
