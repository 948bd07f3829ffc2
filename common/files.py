"""Files and folders that become visible only when complete, the locks under which they are made,
and digests of their contents."""

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
    """Yields a temporary name beside `path` under which the body writes a file or a folder. When
    the body ends, this is synced to disk and renamed to `path`; when it fails, it is removed.

    Leftovers of killed processes are removed first. Several processes may publish the same path at
    once only under its lock.
    """
    _remove_leftovers(path)
    making = path.with_name(f"{path.name}.making-{os.getpid()}")
    try:
        yield making
        _sync(making)
        os.replace(making, path)
    finally:
        _remove(making)


def _remove_leftovers(path: Path) -> None:
    """Removes temporary names whose process has ended; up to version 0.1 some named no process."""
    pattern = re.compile(re.escape(path.name) + r"\.making(-(\d+))?")
    for other in path.parent.iterdir():
        found = pattern.fullmatch(other.name)
        if found and not (found[2] and _is_running(int(found[2]))):
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
