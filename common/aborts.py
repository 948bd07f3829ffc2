"""Libraries that abort the process, as C++ does where a thread gets no memory and nobody catches
the exception. Where memory is limited (`ulimit -v`), this ends it with one sentence and status 2,
as a want of memory elsewhere does."""

import ctypes
import resource
import signal

from neighborlm.common.units import size_of

_made: list[object] = []
"""The machine code that ends this process, and what it uses."""


def explain_aborts() -> None:
    """Sets what is called in place of an abort; to be called again where Lightning has put back
    what it took for the handlers of before. The thread that aborts cannot run Python, as another
    may hold its lock for ever, so it runs machine code."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return  # memory that there is not is found out otherwise, and compiling takes a second
    system = ctypes.CDLL(None)
    try:
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):
        return  # of another system
    if not _made:
        _made.extend(_ending(system, limit))
    end = ctypes.c_void_p(_made[0].address)
    set_terminate(end)
    for number in (signal.SIGABRT, signal.SIGSEGV):  # of libraries that heed no want of memory
        system.signal(number, end)


def _ending(system: ctypes.CDLL, limit: int) -> tuple[object, ...]:
    """The machine code, and what must not be freed.

    Args:
        system: the functions of the C library.
        limit: of the memory, in bytes.
    """
    from numba import cfunc  # takes long, too

    write, leave = system.write, system._exit
    write.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    write.restype = ctypes.c_ssize_t
    leave.argtypes, leave.restype = (ctypes.c_int,), None
    sentence = ctypes.create_string_buffer(
        b"error: a library has ended the program, most likely for want of memory: ulimit -v allows "
        + size_of(limit).encode()
        + b"; expected more of it, or fewer --threads; the same command goes on from what is on "
        b"disk\n"
    )
    address, length = ctypes.addressof(sentence), len(sentence) - 1

    @cfunc("void()")
    def end() -> None:
        write(2, address, length)
        leave(2)

    return end, sentence
