"""The errors that the programs report in one sentence: ours, and those by which the system or a
library says that a disk or the memory is full."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from neighborlm.common.units import size_of

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space on the device, a quota, and a limit of a file's size."""
NO_PLACE = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE),
)
"""A place that this user cannot read or write, that is something else than was expected, or whose
disk fails."""
NO_ROOM_WORDS = re.compile(
    "|".join(map(os.strerror, NO_ROOM)) + r"|\d+ requested and \d+ written|file write failed"
)
"""As faiss, numpy and torch say it where they give no number."""
NO_MEMORY_WORDS = re.compile(
    "Cannot allocate memory|can't allocate memory|std::bad_alloc|out of memory"
    "|can't start new thread|unable to mmap|failed to map segment"
    "|worker .* is killed by signal|exited unexpectedly"
)
"""As torch, the loader of libraries and threads say it."""


class InputError(ValueError):
    """An input cannot be used. The message is one sentence that names the file or flag, what was
    found and what was expected."""


class Diverged(InputError):
    """A training whose loss, gradient or weights are not finite any more."""


class LostRank(RuntimeError):
    """Another rank has ended or no longer answers. The message is one sentence that names the rank
    and its host."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it: a library in between may have wrapped it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def behind(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The first error of a kind in the chain of causes, the error itself included; None if there is
    none."""
    return next((cause for cause in causes(error) if isinstance(cause, kind)), None)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that something did not fit on a disk.

    >>> disk_is_full(OSError(28, "No space left on device"))
    True
    >>> disk_is_full(OSError(2, "No such file or directory"))
    False
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NO_ROOM
    return isinstance(error, OSError | RuntimeError) and bool(NO_ROOM_WORDS.search(str(error)))


def place_is_refused(error: BaseException) -> bool:
    """Whether an error says that a file or a folder cannot be read or written.

    >>> place_is_refused(OSError(30, "Read-only file system", "runs/x"))
    True
    """
    known = isinstance(error, OSError) and isinstance(error.filename, str | Path)
    return known and error.errno in NO_PLACE


def memory_is_full(error: BaseException) -> bool:
    """Whether an error says that there was no memory, on the host or on its device.

    >>> memory_is_full(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."))
    True
    """
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    told = isinstance(error, RuntimeError | OSError | ImportError)
    return told and bool(NO_MEMORY_WORDS.search(str(error)))


def raise_no_memory(error: BaseException) -> None:
    """Raises an error again that says that there was no memory: it says nothing of what was being
    read, which must not be taken for damaged."""
    if memory_is_full(error):
        raise error


def sentence_about_disk(error: BaseException, place: Path | str | None = None) -> str:
    """What to say of a disk that is full.

    Args:
        error: that tells so; it may know the file, and in `needed` how many bytes that takes.
        place: the file or folder that was written, where the error does not know it.
    """
    named = getattr(error, "filename", None) or place
    reason = getattr(error, "strerror", None) or os.strerror(errno.ENOSPC)
    found = f"{size_of(free_at(named or '.'))} free"
    needed = getattr(error, "needed", None)
    if needed is not None:
        found += f", about {size_of(needed)} needed"
    return (
        f"{named or 'a disk'}: {reason} ({found}); make room, or name another place, and the same "
        "command goes on from what is on disk"
    )


def sentence_about_memory(error: BaseException) -> str:
    """What to say where there is no memory."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next(
        (line for line in lines if NO_MEMORY_WORDS.search(line)), lines[-1] if lines else ""
    )
    said = said.removesuffix(".")
    return (
        f"out of memory{f' ({said[:200]})' if said else ''}; expected more of it, or smaller "
        "batches (--data.max_tokens), fewer --data.num_workers or an index of shorter codes "
        "(neighborlm plan says what one takes); the same command goes on from what is on disk"
    )


def free_at(place: Path | str) -> int:
    """Bytes that are free on the disk of a place, which need not be there yet."""
    place = Path(place).absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    return shutil.disk_usage(there).free
