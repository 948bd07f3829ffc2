"""The inverted lists of a faiss index, read from its memory-mapped file."""

from functools import cached_property

import faiss
import numpy as np
import torch

from retrieval.parallel import in_parallel
from retrieval.probing import Probing


class InvertedLists:
    """What the codes of an index stand for, list by list, and which lists a query visits.

    Args:
        ivf: an index that `serves`, with inverted lists in a memory-mapped file.
        probing: which of them are visited; by default as many as its nprobe says.

    Attributes:
        threads: that work at a time, each on one core.
        similar: whether large is near.
        sizes: int64 `[nlist]`.
        ids: int64, of all lists one after another, each from its `ids_at` on.
    """

    def __init__(self, ivf: faiss.IndexIVF, probing: Probing | None = None) -> None:
        self.ivf = ivf
        self.probing = probing or Probing(ivf, ivf.nprobe)
        self.threads = 1
        self.similar = ivf.metric_type == faiss.METRIC_INNER_PRODUCT
        self.centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)
        self.middle = np.zeros(ivf.d, dtype=np.float32)
        if not self.similar:  # distances from far away would lose their digits
            self.middle = self.centroids.mean(0)
        lists = faiss.downcast_InvertedLists(ivf.invlists)
        self.file = faiss.rev_swig_ptr(lists.ptr, lists.totsize)
        self.sizes, self.codes_at, ids_at = _layout(lists)
        shift = int(ids_at[0] % 8)
        end = shift + (len(self.file) - shift) // 8 * 8
        self.ids = self.file[shift:end].view(np.int64)
        self.ids_at = (ids_at - shift) // 8

    @staticmethod
    def serves(index: faiss.Index) -> bool:
        """Whether an index is of a type whose lists this can read."""
        known = faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer | faiss.IndexIVFPQ
        if not isinstance(index, known) or isinstance(index, faiss.IndexIVFFlatDedup):
            return False
        lists = faiss.downcast_InvertedLists(index.invlists)
        if not isinstance(lists, faiss.OnDiskInvertedLists) or index.ntotal == 0:
            return False
        return len(np.unique(_layout(lists)[2] % 8)) == 1

    def nearest(self, queries: np.ndarray) -> np.ndarray:
        """The lists to visit, int64 `[Q, probes]`; where there are fewer an empty one stands in."""
        parts = np.array_split(queries, self.threads)
        lists = np.concatenate(self.map(lambda part: self.probing.nearest(part)[1], parts))
        if (lists < 0).any():
            lists[lists < 0] = self._empty
        return lists

    @cached_property
    def _empty(self) -> int:
        self.sizes = np.append(self.sizes, 0)
        self.codes_at, self.ids_at = np.append(self.codes_at, 0), np.append(self.ids_at, 0)
        return len(self.sizes) - 1

    def map(self, function, parts) -> list:
        """Results for each part, by as many threads as are allowed."""
        return in_parallel(function, parts, self.threads)

    def left(self, queries: np.ndarray) -> np.ndarray:
        """What is multiplied with the transpose of `right` for negative inner products or squared
        distances.

        Args:
            queries: fp32 `[n, d]`.

        Returns:
            fp32 `[n, d]`, or `[n, d + 2]`: -2 times the query, one, and its squared length.
        """
        if self.similar:
            return -queries
        left = np.empty((len(queries), self.ivf.d + 2), dtype=np.float32)
        relative = np.subtract(queries, self.middle, out=left[:, :-2])
        left[:, -2] = 1
        np.vecdot(relative, relative, out=left[:, -1])
        relative *= -2
        return left

    def right(self, number: int, which: slice = slice(None)) -> np.ndarray:
        """What some of a list's codes stand for, fp32 `[n, d]`, or `[n, d + 2]`: the vector, its
        squared length and one. Both sides are relative to the middle of all."""
        ivf, size, d = self.ivf, int(self.sizes[number]), self.ivf.d
        begin = self.codes_at[number]
        codes = self.file[begin : begin + size * ivf.code_size].reshape(size, -1)[which]
        codes = np.ascontiguousarray(codes)
        middle = self.middle
        if isinstance(ivf, faiss.IndexIVFFlat):
            stored = codes.view(np.float32)
        else:
            if ivf.by_residual:
                middle = middle - self.centroids[number]
            if (
                isinstance(ivf, faiss.IndexIVFScalarQuantizer)
                and ivf.sq.qtype == faiss.ScalarQuantizer.QT_fp16
            ):
                stored = codes.view(np.float16)
            else:
                coder = ivf.pq if isinstance(ivf, faiss.IndexIVFPQ) else ivf.sq
                stored = coder.decode(codes)
        right = np.empty((len(codes), d if self.similar else d + 2), dtype=np.float32)
        vectors = right[:, :d]
        # torch converts and subtracts at once, several times faster than numpy.
        torch.sub(*map(torch.from_numpy, (stored, middle)), out=torch.from_numpy(vectors))
        if not self.similar:
            np.vecdot(vectors, vectors, out=right[:, d])
            right[:, d + 1] = 1
        return right

    def visits(self, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The lists int64 `[Q, probes]` in ascending order of their numbers: which one each of
        these visits is to, its place in `lists.ravel()`, and where each list's visits begin and the
        last one's end."""
        flat = lists.ravel()
        smallest_type = np.min_scalar_type(len(self.sizes))  # numpy sorts 16 bits by radix
        order = np.argsort(flat.astype(smallest_type), kind="stable")
        numbers, firsts = np.unique(flat[order], return_index=True)
        return numbers, order, np.append(firsts, len(order))


def _layout(lists: faiss.OnDiskInvertedLists) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes of lists, and where in the file their codes and ids begin, int64 `[nlist]` each."""
    entries = [lists.lists.at(number) for number in range(lists.nlist)]
    sizes = np.array([entry.size for entry in entries], dtype=np.int64)
    codes = np.array([entry.offset for entry in entries], dtype=np.int64)
    capacities = np.array([entry.capacity for entry in entries], dtype=np.int64)
    return sizes, codes, codes + capacities * lists.code_size
