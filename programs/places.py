"""Places that a command is going to write at: whether it can is found before any work, and files
appear there whole."""

import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import Timeout

from neighborlm.common.errors import InputError, free_at
from neighborlm.common.files import Lock, write_whole
from neighborlm.common.units import size_of


def check_writable(path: Path | None, flag: str, kind: Literal["file", "folder"] = "file") -> None:
    """Refuses a place that cannot be written at; what is missing on the way to it is not made.

    Args:
        path: what will be written; None for nothing.
        flag: that names it.
        kind: what will be there.

    Raises:
        InputError: it cannot.
    """
    if path is None:
        return
    named = f"{flag} {path}"
    try:
        if path.exists() and not (path.is_file() if kind == "file" else path.is_dir()):
            if kind == "file" and not path.is_dir() and os.access(path, os.W_OK):
                return  # a device or a pipe
            found = "a folder" if path.is_dir() else "no folder"
            raise InputError(f"{named}: is {found}; expected a {kind} to write")
        folder = path if kind == "folder" else path.parent
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        if not existing.is_dir():
            raise InputError(f"{named}: {existing} is no folder; expected a place to write at")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"{named}: cannot be written ({error.strerror}); expected a place to write at"
        ) from None


@contextmanager
def own_folder(directory: Path, prefix: str) -> Iterator[Path]:
    """A folder that no other command writes in, removed at the end; what killed commands have left
    is removed first.

    Args:
        directory: that holds it; made if it is missing.
        prefix: of its name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with Lock(directory / f".{prefix}.lock"):  # lest others take one that has just been made
        for other in filter(Path.is_dir, directory.glob(f"{prefix}-*")):
            with suppress(Timeout, InputError), Lock(other / ".lock").acquire(timeout=0):
                shutil.rmtree(other, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=directory))
        lock = Lock(folder / ".lock")
        lock.acquire()
    try:
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def check_folder(path: Path, flag: str) -> None:
    """Refuses a place that can be no folder, whether it is there already or not.

    Args:
        path: of the folder.
        flag: that names it.

    Raises:
        InputError: it, or what it would lie in, is something else.
    """
    existing = next((place for place in (path, *path.parents) if place.exists()), path)
    if not existing.is_dir():
        raise InputError(f"{flag} {path}: {existing} is no folder; expected a folder")


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Writes files, each whole or not at all.

    Raises:
        InputError: some could not be written; all others are.
    """
    failed = []
    for path, content in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():  # a device or a pipe
                path.write_bytes(content)
            else:
                write_whole(path, content)
        except OSError as error:
            needed = f"about {size_of(len(content))} needed, {size_of(free_at(path))} free"
            failed.append(f"{path} ({error.strerror}; {needed})")
    if failed:
        raise InputError(
            f"{', '.join(failed)}: could not be written; what could be is, and the figures stand "
            "above"
        )


def as_npz(columns: Mapping[str, np.ndarray]) -> bytes:
    """Arrays by name as an .npz file."""
    file = io.BytesIO()
    np.savez(file, **columns)
    return file.getvalue()


def as_json(content: Any) -> bytes:
    """JSON that every reader takes: what is not finite is null, and what JSON has no form for, such
    as a path, is text.

    >>> as_json({"ppl": math.inf, "of": [math.nan, 1.5]}).decode().split()
    ['{', '"ppl":', 'null,', '"of":', '[', 'null,', '1.5', ']', '}']
    """
    return (json.dumps(_finite(content), indent=1, allow_nan=False, default=str) + "\n").encode()


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
