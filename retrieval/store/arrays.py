"""Arrays on disk: opening ours and those of other programs, and making room for new ones."""

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap

from neighborlm.common.errors import NO_ROOM, InputError, raise_no_memory
from neighborlm.common.files import needing, publishing
from neighborlm.common.units import size_of

NPY_MAGIC = b"\x93NUMPY"
PAGE = 4096
"""What the headers of a few arrays take on disk."""


class Layout(NamedTuple):
    """Type and shape of an array."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """What its data take."""
        return self.dtype.itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


# -- opening -------------------------------------------------------------------------------------


def open_array(path: Path, layout: Layout, mode: Literal["r", "r+"] = "r") -> np.ndarray:
    """Maps a .npy file that must be laid out exactly so."""
    try:
        array = np.load(path, mmap_mode="r")  # in mode r+ numpy would lengthen a short file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; its manifest promises it") from None
    except (ValueError, EOFError, OSError) as error:
        raise_no_memory(error)
        raise InputError(
            f"{path}: has {path.stat().st_size} bytes, expected more than {layout.nbytes} for "
            f"{layout} ({error})"
        ) from None
    found = Layout(array.dtype, array.shape)
    if found != layout:
        raise InputError(f"{path}: holds {found}, but the manifest says {layout}")
    return array if mode == "r" else np.load(path, mmap_mode=mode)


def open_raw(manifest: Path, described: Mapping[str, Any], layout: Layout) -> np.ndarray:
    """Maps a file without header that belongs to another program, from what a manifest says of it:
    its path beside the manifest's and where its data begin."""
    file, offset = manifest.parent / described["path"], described["offset"]
    needed = layout.nbytes + offset
    found = file.stat().st_size if file.is_file() else 0
    if found != needed:
        raise InputError(f"{file}: has {found} bytes, but {manifest} needs {needed} there")
    return np.memmap(file, layout.dtype, "r", offset, layout.shape)


def header_bytes(path: Path) -> int:
    """Length of the header of a .npy file; 0 for a raw map."""
    with open(path, "rb") as file:
        start = file.read(12)
    if not start.startswith(NPY_MAGIC):
        return 0
    width = 2 if start[6] == 1 else 4  # of the header's length, by format version
    return 8 + width + int.from_bytes(start[8 : 8 + width], "little")


def map_raw(path: Path, layout: Layout) -> tuple[np.ndarray, int]:
    """Maps a file of another program, with or without a header, that holds one array and nothing
    else; and tells where its data begin, which `open_raw` needs to know.

    Raises:
        InputError: its data have another size.
    """
    offset = header_bytes(path)
    found = path.stat().st_size - offset
    if found != layout.nbytes:
        raise InputError(
            f"{path}: has {found} bytes of data, expected {layout.nbytes} for {layout}"
        )
    return np.memmap(path, layout.dtype, "r", offset, layout.shape), offset


# -- making --------------------------------------------------------------------------------------


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a small array, whole or not at all."""
    with publishing(path) as making, needing(array.nbytes, making), open(making, "wb") as file:
        np.save(file, array)


def make_room(folder: Path, layouts: Mapping[str, Layout], kind: str, advice: str) -> None:
    """Makes files of zeros in a folder, in place of those that lie there, and gives them all their
    blocks: written through a memory map, a sparse one would end the program with a bus error once
    the disk is full.

    Args:
        layouts: by the name of the file.
        kind, advice: see `check_room`.

    Raises:
        InputError: the disk has no room.
        OSError: others have taken it meanwhile.
    """
    for name in layouts:
        (folder / name).unlink(missing_ok=True)  # somebody may still have it mapped
    check_room({folder: bytes_of(layouts.values())}, kind, advice)
    for name, layout in layouts.items():
        with needing(layout.nbytes, folder / name):
            dtype, shape = layout
            open_memmap(folder / name, mode="w+", dtype=dtype, shape=shape).flush()
            _take_room(folder / name)


def _take_room(path: Path) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    size = path.stat().st_size
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in NO_ROOM:
                return  # the file system cannot do it
            raise


def bytes_of(layouts: Iterable[Layout]) -> int:
    """What the files of a product take."""
    return PAGE + sum(layout.nbytes for layout in layouts)


def check_room(needed: Mapping[Path, int], kind: str, advice: str) -> None:
    """Refuses folders whose disks have no room for so many bytes in each.

    Args:
        needed: bytes by folder.
        kind: of the product that needs them.
        advice: what can be done about it.

    Raises:
        InputError: naming the first on such a disk.
    """
    devices = {path: path.stat().st_dev for path in needed}
    total: Counter[int] = Counter()
    for path, size in needed.items():
        total[devices[path]] += size
    for path, device in devices.items():
        free = shutil.disk_usage(path).free
        if total[device] > free:
            count = list(devices.values()).count(device)
            what = f"its {kind} needs" if count == 1 else f"{count} shards on its disk need"
            raise InputError(
                f"{path}: {what} {size_of(total[device])} but the disk has {size_of(free)} free; "
                f"{advice}; the same command then goes on"
            )


def token_counts(tokens: np.ndarray, vocab_size: int, block: int = 1 << 20) -> np.ndarray:
    """How often each token occurs, int64 `[V]`.

    Args:
        tokens: integers `[N]`, all below V; memory-mapped ones are read block by block, as numpy
            would count a copy of eight bytes a token.

    >>> token_counts(np.array([2, 0, 2], np.uint16), 4).tolist()
    [1, 0, 2, 0]
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for first in range(0, len(tokens), block):
        counts += np.bincount(tokens[first : first + block], minlength=vocab_size)
    return counts
