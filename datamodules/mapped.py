"""Sends data sets to worker processes without copying their memory maps, which are mapped again.

Under the start methods spawn and forkserver (the defaults of macOS and of Python 3.14) a worker
gets a pickled copy of its data set, into which numpy would write each memory map in full.
"""

import io
import pickle
from typing import Any

import numpy as np


class MappedByPath:
    """Base of classes whose pickles hold the paths of read-only memory maps in place of their
    contents, however deeply nested in attributes. Unpickling needs the files."""

    def __reduce__(self) -> tuple:
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(self.__dict__)
        return _restore, (type(self), buffer.getvalue())


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.memmap) and obj.filename is not None and obj.mode == "r":
            root = obj
            while isinstance(root.base, np.memmap):
                root = root.base
            place = root.offset + obj.ctypes.data - root.ctypes.data
            return _map, (obj.filename, obj.dtype, place, obj.shape, obj.strides)
        return NotImplemented


def _map(
    filename: str, dtype: np.dtype, place: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    """Maps an array that begins `place` bytes after the beginning of a file."""
    whole = np.memmap(filename, np.uint8, "r")
    return np.ndarray(shape, dtype, whole, place, strides)


def _restore(kind: type, attributes: bytes) -> Any:
    restored = kind.__new__(kind)
    restored.__dict__.update(pickle.loads(attributes))
    return restored
