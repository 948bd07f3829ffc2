"""Files and folders that others see whole or not at all, the locks under which they are made, and
digests of what they hold."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from neighborlm.common.errors import InputError


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Gives a name beside `path` to write a file or a folder under, which becomes `path` when the
    body ends and all of it is on disk. Where the body fails, nothing is left of it.

    What processes left that were killed in here is removed first. Several processes may publish
    the same path at once only under its lock.
    """
    _sweep(path)
    making = path.with_name(f"{path.name}.making-{os.getpid()}")
    try:
        yield making
        _bring_to_disk(making)
        os.replace(making, path)
    finally:
        _remove(making)


def _sweep(path: Path) -> None:
    """Removes what killed processes left; up to version 0.1 some of it had no process in its
    name."""
    ended = re.compile(re.escape(path.name) + r"\.making(-(\d+))?")
    for left_over in path.parent.iterdir():
        found = ended.fullmatch(left_over.name)
        if found and not (found[2] and _is_running(int(found[2]))):
            _remove(left_over)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # somebody else's
    return True


def _bring_to_disk(path: Path) -> None:
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


class Lock(FileLock):
    """Lets one process, and one thread of it, at what is made at a place; the others wait."""

    def acquire(self, *args: Any, **settings: Any) -> Any:
        """See `filelock.FileLock.acquire`.

        Raises:
            InputError: nothing can be locked there.
            Timeout: somebody else holds it.
        """
        try:
            return super().acquire(*args, **settings)
        except Timeout:
            raise
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{self.lock_file}: cannot be locked ({reason}), which whoever makes something "
                "there must; expected a place to write at, on a file system that knows locks"
            ) from None


def digest_of(*parts: str | bytes | Path, size: int = 8) -> str:
    """BLAKE2b of some parts, one after the other, in hexadecimal.

    Args:
        parts: text, bytes, or a file, of which the content counts and not the name.
        size: bytes of the digest.

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
