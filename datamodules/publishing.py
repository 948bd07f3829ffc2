"""Makes the folders of this room: one process fills a temporary folder for all and renames it when
it is complete. Leftovers of killed processes are never taken for the folder, and are removed when
the next one is made."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from neighborlm.common.errors import InputError
from neighborlm.common.units import size_of

MAKING = ".making"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(OSError):
    """A file does not fit on the disk.

    Attributes:
        needed: about how many bytes the whole file takes.
    """

    def __init__(self, cause: OSError, needed: float) -> None:
        super().__init__(cause.errno, cause.strerror)
        self.needed = needed


def publish(
    folder: Path,
    make: Callable[[Path], None],
    flag: str,
    is_whole: Callable[[Path], bool] = Path.is_dir,
) -> None:
    """Makes a folder unless it exists. One that exists may be on a read-only file system.

    Args:
        folder: the folder; an incomplete one is replaced.
        make: fills an empty folder, which is then renamed.
        flag: the setting that chooses the place, for messages.
        is_whole: whether an existing folder is complete.

    Raises:
        InputError: the place cannot be written to, or is full.
    """
    if is_whole(folder):
        return
    with sentences_about(folder.parent, flag):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if is_whole(folder):
                return
            making = folder.with_name(f"{folder.name}{MAKING}")
            shutil.rmtree(making, ignore_errors=True)
            _remove_leftovers(folder.parent)
            making.mkdir()
            try:
                make(making)
                _sync(making)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(making, folder)
            finally:
                shutil.rmtree(making, ignore_errors=True)


@contextmanager
def sentences_about(place: Path, flag: str) -> Iterator[None]:
    """Turns errors of the file system under a folder into one sentence that names the place.

    Args:
        place: the folder; errors elsewhere pass through unchanged.
        flag: the setting that chooses it.
    """
    try:
        yield
    except OSError as error:
        where = Path(error.filename) if isinstance(error.filename, str) else place
        if error.errno in NO_ROOM:
            found = f"{size_of(shutil.disk_usage(_existing(place)).free)} free"
            if isinstance(error, DiskFull):
                found += f", about {size_of(error.needed)} needed"
            raise InputError(
                f"{place}: has no more room ({found}); make room there or name another place as "
                f"{flag}, and run the same command again"
            ) from None
        if place.absolute() not in (where.absolute(), *where.absolute().parents) and not (
            place.absolute().is_relative_to(where.absolute())
        ):
            raise
        raise InputError(
            f"{where}: {error.strerror or error}; expected a folder that can be written and "
            f"locked, or another one named as {flag}"
        ) from None


def _existing(place: Path) -> Path:
    """The folder, or its nearest ancestor that exists."""
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())


def _remove_leftovers(parent: Path) -> None:
    """Removes temporary folders that killed processes left beside this one."""
    for leftover in parent.glob(f"*{MAKING}"):
        lock = Path(f"{str(leftover).removesuffix(MAKING)}.lock")
        if not lock.exists():  # not made by `publish`
            continue
        try:
            with FileLock(lock).acquire(timeout=0):
                shutil.rmtree(leftover, ignore_errors=True)
        except Timeout:  # another process is making it now
            continue


def _sync(folder: Path) -> None:
    """Writes files through to disk, so that a folder that survives a power failure is complete."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
