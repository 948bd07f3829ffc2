"""What this processor does well, and the private names of torch and MKL by which it is had."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from threadpoolctl import ThreadpoolController

multiply_bytes = getattr(torch, "_int_mm", None)
"""The product of int8 `[n, d]` and `[d, m]` as int32, where torch has one. Columns of one byte it
multiplies wrongly."""


@cache
def bytes_are_exact() -> bool:
    """Whether torch multiplies bytes without losing any bit. On processors that lack instructions
    for it sums of pairs are cut off at 16 bits."""
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
    """Has all libraries use one core for what the calling thread asks of them."""
    torch.get_num_threads()  # from its first call in a thread on it leaves the number alone
    ThreadpoolController().select(user_api="openmp").limit(limits=1)
    # MKL, by which torch multiplies on x86, has a number of its own for each thread.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if library.is_file():
        set_threads = getattr(ctypes.CDLL(str(library)), "MKL_Set_Num_Threads_Local", None)
        if set_threads is not None:
            set_threads(1)
