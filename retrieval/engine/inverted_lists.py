"""The inverted lists of a faiss index, read from its memory-mapped file."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import faiss
import numpy as np
from numpy.typing import DTypeLike

from neighborlm.retrieval.engine.limits import Limits
from neighborlm.retrieval.engine.loops import shift_halves, shift_lists
from neighborlm.retrieval.engine.parallel import in_parallel, scratch
from neighborlm.retrieval.engine.probing import Probing


class InvertedLists:
    """Decodes the vectors of an index, list by list, and chooses the lists that a query visits.

    Args:
        ivf: an index of a type that `serves` accepts.
        probing: chooses the lists to visit; by default as many as the index's nprobe.
        limits: sizes of the blocks to work on.

    Attributes:
        threads: how many work at a time, each on one core.
        similar: whether a large distance is near, as with inner products.
        sizes: int64 `[nlist]`, vectors of each list.
        ids: int64, the file as ids; those of a list begin at its `ids_at`.
    """

    def __init__(
        self, ivf: faiss.IndexIVF, probing: Probing | None = None, limits: Limits | None = None
    ) -> None:
        self.ivf = ivf
        self.limits = limits or Limits()
        self.probing = probing or Probing(ivf, ivf.nprobe)
        self.threads = 1
        self.similar = self.probing.similar
        self.middle = self.probing.middle
        lists = faiss.downcast_InvertedLists(ivf.invlists)
        self.file = faiss.rev_swig_ptr(lists.ptr, lists.totsize)
        self.sizes, self.codes_at, ids_at = _layout(lists)
        shift = int(ids_at[0] % 8)
        self.ids = _from(self.file, shift, np.int64)
        self.ids_at = (ids_at - shift) // 8
        self._odd = int(self.codes_at[0] % 2)  # lists of halves all begin alike, odd or even
        self._halves = _from(self.file, self._odd, np.uint16)

    @staticmethod
    def serves(index: faiss.Index) -> bool:
        """Whether this class can read the lists of an index."""
        served = faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer | faiss.IndexIVFPQ
        if not isinstance(index, served) or isinstance(index, faiss.IndexIVFFlatDedup):
            return False
        lists = faiss.downcast_InvertedLists(index.invlists)
        if not isinstance(lists, faiss.OnDiskInvertedLists) or index.ntotal == 0:
            return False
        return len(np.unique(_layout(lists)[2] % 8)) == 1

    def nearest(self, queries: np.ndarray) -> np.ndarray:
        """The lists to visit, int64 `[Q, probes]`, the nearest first, filled up with an empty
        list."""
        _, lists = self.probing.nearest(queries, self.threads)
        if (lists < 0).any():
            lists[lists < 0] = self._empty
        return lists

    @cached_property
    def _empty(self) -> int:
        self.sizes = np.append(self.sizes, 0)
        self.codes_at, self.ids_at = np.append(self.codes_at, 0), np.append(self.ids_at, 0)
        return len(self.sizes) - 1

    def map(self, function: Callable, parts: Iterable) -> list:
        """The function's result for each part, computed by `threads` threads."""
        return in_parallel(function, parts, self.threads)

    def vectors(
        self, numbers: Sequence[int], which: slice = slice(None), more: int = 0
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Decodes vectors of some lists.

        Args:
            numbers: of the lists.
            which: of each list's vectors.
            more: columns to leave for the caller.

        Returns:
            the vectors relative to `middle`, fp32 `[n, d + more]`; their squared lengths fp32
            `[n]`, or zeros for inner products; and where each list's vectors begin, followed by n.
            The next call in the same thread overwrites these arrays.
        """
        ivf, sizes = self.ivf, self.sizes[numbers]
        first, last, step = which.start or 0, sizes, which.step or 1
        if which.stop is not None:
            last = np.minimum(sizes, which.stop)
        bounds = np.zeros(len(numbers) + 1, dtype=np.int64)
        np.cumsum(np.maximum(-((first - last) // step), 0), out=bounds[1:])
        n = int(bounds[-1])
        vectors = scratch("vectors", n * (ivf.d + more)).reshape(n, ivf.d + more)
        squares = scratch("squares", n)
        if isinstance(ivf, faiss.IndexIVFFlat) or not ivf.by_residual:
            shifts = np.tile(-self.middle, (len(numbers), 1))
        else:  # the empty list that fills up has no centroid, but no codes either
            shifts = np.take(self.probing.centroids, numbers, axis=0, mode="clip")
        if stores_halves(ivf):
            begins = (self.codes_at[numbers] - self._odd) // 2 + first * ivf.d
            shift_halves(self._halves, begins, step * ivf.d, bounds, shifts, vectors, squares)
        else:
            stored = self._decoded(np.concatenate([self._codes(i)[which] for i in numbers]))
            shift_lists(stored, bounds, shifts, vectors, squares)
        if self.similar:
            squares[:] = 0
        return vectors, squares, bounds.tolist()

    def _decoded(self, codes: np.ndarray) -> np.ndarray:
        """The vectors, or residuals, fp32 `[n, d]` of codes uint8 `[n, code_size]`."""
        if isinstance(self.ivf, faiss.IndexIVFFlat):
            return codes.view(np.float32)
        if isinstance(self.ivf, faiss.IndexIVFPQ):
            return self.ivf.pq.decode(codes)
        return self.ivf.sq.decode(codes)

    def _codes(self, number: int) -> np.ndarray:
        """The codes of a list, uint8 `[n, code_size]`."""
        shape = (int(self.sizes[number]), self.ivf.code_size)
        begin = int(self.codes_at[number])
        return self.file[begin : begin + math.prod(shape)].reshape(shape)

    def ids_of(self, number: int) -> np.ndarray:
        """The ids of the vectors of a list, int64 `[n]`."""
        return self.ids[self.ids_at[number] :][: self.sizes[number]]

    def together(self, visits: np.ndarray, stride: int = 1) -> list[list[int]]:
        """Groups of lists to work on at a time, so small that every `stride`-th of their vectors
        and the queries that visit them stay in the cache.

        Args:
            visits: int64 `[nlist]`, the number of queries that visit each; others are left out.
        """
        numbers = np.flatnonzero(visits)
        rows = -(-self.sizes[numbers] // stride) + visits[numbers]
        bytes_so_far = np.cumsum(4 * self.ivf.d * rows)
        cuts = np.flatnonzero(np.diff(bytes_so_far // self.limits.list_bytes)) + 1
        return [part.tolist() for part in np.split(numbers, cuts) if len(part)]


def _from(file: np.ndarray, begin: int, dtype: DTypeLike) -> np.ndarray:
    """The bytes from `begin` on, as numbers of a type."""
    end = begin + (len(file) - begin) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize
    return file[begin:end].view(dtype)


def stores_halves(index: faiss.Index) -> bool:
    """Whether an index is inverted lists of half-precision vectors, with no transform before
    them."""
    halves = faiss.ScalarQuantizer.QT_fp16
    return isinstance(index, faiss.IndexIVFScalarQuantizer) and index.sq.qtype == halves


def _layout(lists: faiss.OnDiskInvertedLists) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes of lists, and where in the file their codes and ids begin, int64 `[nlist]` each."""
    entries = [lists.lists.at(number) for number in range(lists.nlist)]
    sizes = np.array([entry.size for entry in entries], dtype=np.int64)
    codes = np.array([entry.offset for entry in entries], dtype=np.int64)
    capacities = np.array([entry.capacity for entry in entries], dtype=np.int64)
    return sizes, codes, codes + capacities * lists.code_size
