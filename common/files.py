"""Files and folders that become visible only when complete, the locks under which they are made,
what is said of disks that do not take them, and digests of their contents."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from neighborlm.common.errors import NO_ROOM, InputError, free_at
from neighborlm.common.units import size_of

LEFTOVER = r"\.making(-(\d+))?"
"""Ends the temporary names; up to version 0.1 some named no process."""

# -- whole or not at all -------------------------------------------------------------------------


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` under which the body writes a file or a folder. When
    the body ends, this is synced to disk and takes the place of `path`; when it fails, it is
    removed.

    Leftovers of killed processes are removed first. Several processes may publish the same path at
    once only under its lock.
    """
    pattern = re.compile(re.escape(path.name) + LEFTOVER)
    for other in path.parent.iterdir():
        found = pattern.fullmatch(other.name)
        if found and not (found[2] and _is_running(int(found[2]))):
            _remove(other)
    making = path.with_name(f"{path.name}.making-{os.getpid()}")
    try:
        yield making
        _sync(making)
        if making.is_dir():
            _remove(path)
        os.replace(making, path)
    except (OSError, RuntimeError) as error:  # many do not know the file
        error.filename = _place_of(error, making, path)
        raise
    finally:
        _remove(making)


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file; a reader sees the old one or the new one, see `publishing`."""
    content = content.encode() if isinstance(content, str) else content
    with publishing(path) as making, needing(len(content), making):
        making.write_bytes(content)


def _place_of(error: Exception, making: Path, path: Path) -> str:
    """Where an error has happened, by the name that somebody knows."""
    found = getattr(error, "filename", None)
    return str(path) if not isinstance(found, str) else found.replace(str(making), str(path))


def publish_folder(
    folder: Path,
    make: Callable[[Path], None],
    flag: str,
    is_whole: Callable[[Path], bool] = Path.is_dir,
    needed: float | None = None,
) -> None:
    """Makes a folder unless it exists; of several processes one makes it. One that exists may be on
    a read-only file system. What killed processes have left of any folder beside it is removed.

    Args:
        folder: the folder; an incomplete one is replaced.
        make: fills an empty folder, which is then renamed.
        flag: the setting that chooses the place, for messages.
        is_whole: whether an existing folder is complete.
        needed: about how many bytes it takes, if that is known.

    Raises:
        InputError: the place cannot be written to, or is full.
    """
    if is_whole(folder):
        return
    with sentences_about(folder.parent, flag):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(f"{folder}.lock").acquire()
        except InputError as error:
            raise InputError(f"{error}, or another one named as {flag}") from None
        with lock:
            if is_whole(folder):
                return
            _remove_leftovers(folder.parent)
            told = nullcontext() if needed is None else needing(needed, folder)
            with publishing(folder) as making, told:
                making.mkdir()
                make(making)


def _remove_leftovers(parent: Path) -> None:
    """Removes temporary folders that nobody is filling any more."""
    for other in parent.iterdir():
        found = re.fullmatch(f"(.+){LEFTOVER}", other.name)
        lock = parent / f"{found[1]}.lock" if found else parent
        if lock.is_file():  # made by `publish_folder`
            with suppress(Timeout), Lock(lock).acquire(timeout=0):
                _remove(other)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # another user's, or no process of this system: not ours to remove
    return True


def _sync(path: Path) -> None:
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# -- disks ---------------------------------------------------------------------------------------


class Lock(FileLock):
    """A lock file: one thread of one process holds it, all others wait."""

    def acquire(self, *args: Any, **settings: Any) -> Any:
        """See `filelock.FileLock.acquire`.

        Raises:
            InputError: the file cannot be made or locked.
            Timeout: another process or thread still holds it.
        """
        try:
            return super().acquire(*args, **settings)
        except Timeout:
            raise
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{self.lock_file}: cannot be locked ({reason}); expected a writable folder on a "
                "file system that supports locks"
            ) from None


@contextmanager
def needing(n_bytes: float, path: Path) -> Iterator[None]:
    """Has an error that says that the disk is full say also about how many bytes are `needed` and
    for which file, unless it does."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            error.needed = getattr(error, "needed", n_bytes)
            error.filename = error.filename or str(path)
        raise


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
            found = f"{size_of(free_at(place))} free"
            if hasattr(error, "needed"):
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
            f"{where}: {error.strerror or error}; expected a folder that can be written, or "
            f"another one named as {flag}"
        ) from None


def digest_of(*parts: str | bytes | Path, size: int = 8) -> str:
    """BLAKE2b digest of the concatenation of some parts, in hexadecimal.

    Args:
        parts: text, bytes, or the path of a file, whose contents are read.
        size: of the digest, in bytes.

    >>> digest_of("a", b"b") == digest_of("ab")
    True
    >>> digest_of("", size=4)
    '1271cf25'
    """
    digest = blake2b(digest_size=size)
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()
