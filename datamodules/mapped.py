"""How data sets go to other processes: what they map from files is not sent but mapped again.

Under the start methods spawn and forkserver (the defaults of macOS and of Python 3.14) a worker
gets a pickled copy of its data set, in which numpy would put the whole of each memory map.
"""

import io
import pickle
from typing import Any

import numpy as np


class MappedByPath:
    """Base of classes whose pickles name the files of their read-only memory maps, however deep
    these lie in their attributes. The files must be there when one is unpickled."""

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
    """Part of a file, `place` bytes from its beginning."""
    whole = np.memmap(filename, np.uint8, "r")
    return np.ndarray(shape, dtype, whole, place, strides)


def _restore(kind: type, attributes: bytes) -> Any:
    restored = kind.__new__(kind)
    restored.__dict__.update(pickle.loads(attributes))
    return restored
