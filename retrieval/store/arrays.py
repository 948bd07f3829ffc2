"""Arrays on disk: opening them, making room for them, and filling them resumably."""

import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib.format import open_memmap

from neighborlm.common.errors import InputError
from neighborlm.retrieval.store.manifest import read_manifest, write_manifest

NPY_MAGIC = b"\x93NUMPY"
SYNC_SECONDS = 10.0
"""How often what was filled is brought to disk and marked as done."""


def open_array(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, mode: Literal["r", "r+"] = "r"
) -> np.ndarray:
    """Maps a .npy file that must hold exactly this shape and type."""
    try:
        array = np.load(path, mmap_mode="r")  # in mode r+ numpy would lengthen a short file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; its manifest promises it") from None
    except (ValueError, EOFError, OSError) as error:
        size = path.stat().st_size
        needed = int(np.prod(shape)) * dtype.itemsize
        raise InputError(
            f"{path}: has {size} bytes, expected more than {needed} for {dtype} {list(shape)} "
            f"({error})"
        ) from None
    if array.shape != shape or array.dtype != dtype:
        raise InputError(
            f"{path}: holds {array.dtype} {list(array.shape)}, "
            f"but the manifest says {dtype} {list(shape)}"
        )
    return array if mode == "r" else np.load(path, mmap_mode=mode)


def open_raw(
    manifest: Path, described: dict[str, Any], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Maps a file without header that belongs to another program, from what a manifest says of it:
    its path beside the manifest's and where its data begin."""
    file, offset = manifest.parent / described["path"], described["offset"]
    needed = int(np.prod(shape)) * dtype.itemsize + offset
    found = file.stat().st_size if file.is_file() else 0
    if found != needed:
        raise InputError(f"{file}: has {found} bytes, but {manifest} needs {needed} there")
    return np.memmap(file, dtype, "r", offset, shape)


def header_bytes(path: Path) -> int:
    """Length of the header of a .npy file; 0 for a raw map."""
    with open(path, "rb") as file:
        start = file.read(12)
    if not start.startswith(NPY_MAGIC):
        return 0
    width = 2 if start[6] == 1 else 4  # of the header's length, by format version
    return 8 + width + int.from_bytes(start[8 : 8 + width], "little")


def data_offset(path: Path, expected: int, what: str) -> int:
    """Where `expected` bytes of data begin in a file that holds nothing else."""
    offset = header_bytes(path)
    found = path.stat().st_size - offset
    if found != expected:
        raise InputError(f"{path}: has {found} bytes of data, expected {expected} for {what}")
    return offset


def take_room(path: Path) -> None:
    """Gives a new file all its blocks: written through a memory map, a sparse one would end the
    program with a bus error once the disk is full."""
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                return  # the file system cannot do it
            raise InputError(
                f"{path}: the disk has no room for its {path.stat().st_size / 1e9:.1f} GB "
                f"({error.strerror})"
            ) from None


def fill_rows(
    manifest: Path,
    kind: str,
    version: int,
    fields: Mapping[str, Any],
    arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    step: int,
    compute: Callable[[int, int], tuple[np.ndarray, ...]],
    report: Callable[[int, int], None],
) -> None:
    """Fills arrays from the first row to the last, and goes on where a killed run stopped.

    Rows up to the manifest's `done` are on disk. Blocks begin at multiples of `step` also in a
    run that goes on, so a result that depends on what is computed together stays the same.

    Args:
        manifest: where it is written; the arrays lie beside it.
        kind: of the manifest.
        version: of its format.
        fields: of the manifest, `rows` among them.
        arrays: type and shape of each file.
        step: rows to compute at once.
        compute: from the first row and the one after the last to a block for each array.
        report: called with how many rows are done, and how many there are.

    Raises:
        InputError: the disk has no room.
    """
    places = {manifest.parent / name: array for name, array in arrays.items()}

    def mark(done: int, complete: bool = False) -> None:
        write_manifest(manifest, kind, version, {**fields, "done": done, "complete": complete})

    if not manifest.exists():
        make_room(manifest.parent, kind, places)
        mark(0)
    found = read_manifest(manifest, kind, version, ("complete",))
    if found["complete"]:
        return
    opened = [open_array(path, shape, dtype, "r+") for path, (dtype, shape) in places.items()]
    rows = fields["rows"]
    done = found["done"] // step * step
    last_sync = time.perf_counter()

    def sync() -> None:
        for array in opened:
            array.flush()
        mark(done)

    report(done, rows)
    try:
        for first in range(done, rows, step):
            last = min(first + step, rows)
            for array, block in zip(opened, compute(first, last), strict=True):
                array[first:last] = block
            done = last
            report(done, rows)
            if time.perf_counter() - last_sync > SYNC_SECONDS:
                sync()
                last_sync = time.perf_counter()
    finally:
        sync()
    mark(rows, complete=True)


def make_room(
    directory: Path, kind: str, places: Mapping[Path, tuple[np.dtype, tuple[int, ...]]]
) -> None:
    """Makes files of zeros of some types and shapes, in place of those that lie there.

    Raises:
        InputError: the disk has no room.
    """
    for path in places:
        path.unlink(missing_ok=True)  # of a run that was killed before it wrote its manifest
    needed = sum(dtype.itemsize * math.prod(shape) for dtype, shape in places.values())
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"{directory}: its {kind} needs {needed / 1e9:.1f} GB but the disk has "
            f"{free / 1e9:.1f} GB free; make room or choose a smaller one"
        )
    for path, (dtype, shape) in places.items():
        open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
        take_room(path)
