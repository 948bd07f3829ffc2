"""How folders of this room come to be: filled under another name by one process for all, and
renamed when they are whole. What a killed process left is never taken for the folder, and is
removed when one is made the next time."""

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
    """A file did not fit.

    Attributes:
        needed: how many bytes all of it takes, about.
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
    """Makes a folder unless it is there. One that is there needs no place that can be written.

    Args:
        folder: what is wanted; one that is not whole is replaced.
        make: fills an empty folder, which then gets the name.
        flag: the setting that chooses the place, for messages.
        is_whole: whether the folder is what `make` made.

    Raises:
        InputError: the place cannot be written, or is full.
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
            _sweep(folder.parent)
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
    """Turns what is refused where files are written into one sentence that names the place.

    Args:
        place: the folder; errors of files elsewhere are not its own.
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
                f"{flag}, and the same command makes it"
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
    """The folder or the nearest one above it that is there."""
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())


def _sweep(parent: Path) -> None:
    """Removes what killed processes left of other folders."""
    for left in parent.glob(f"*{MAKING}"):
        lock = Path(f"{str(left).removesuffix(MAKING)}.lock")
        if not lock.exists():  # not made here
            continue
        try:
            with FileLock(lock).acquire(timeout=0):
                shutil.rmtree(left, ignore_errors=True)
        except Timeout:  # somebody is making it now
            continue


def _sync(folder: Path) -> None:
    """Brings files to disk, so that a folder that has its name after a power failure is whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
