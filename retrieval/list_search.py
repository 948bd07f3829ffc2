"""Searches the inverted lists of a faiss index for many queries at a time.

faiss visits the lists of one query after another, and keeps the k nearest in a heap: for k = 1024
the heap costs more than the distances. Here each list is decoded once, one matrix product gives the
distances of all queries that visit it, and the k nearest of each query are cut off by a partition.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import faiss
import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from retrieval.selection import k_smallest, sort_rows

BUFFER_BYTES = 256 << 20
"""What the distances of the queries that are worked on at a time may take."""
GROUP = 64
"""Queries whose nearest are selected at a time: their distances stay in the cache."""
QUERIES_A_LIST = 4
"""Queries that must visit a list, on average, for this to be worth while."""


class ListSearch:
    """Finds what `faiss.Index.search` finds: the same lists are visited, and distances are those to
    the vectors that the codes stand for.

    Args:
        ivf: an index that `serves`, with inverted lists in a memory-mapped file.
    """

    def __init__(self, ivf: faiss.IndexIVF) -> None:
        self.ivf = ivf
        self.pool = ThreadPoolExecutor()
        self.threads = 1
        self.similar = ivf.metric_type == faiss.METRIC_INNER_PRODUCT
        self.centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)
        lists = faiss.downcast_InvertedLists(ivf.invlists)
        self.file = faiss.rev_swig_ptr(lists.ptr, lists.totsize)
        self.sizes, self.codes_at, ids_at = _layout(lists)
        shift = int(ids_at[0] % 8)
        end = shift + (len(self.file) - shift) // 8 * 8
        self.ids = self.file[shift:end].view(np.int64)
        self.ids_at = (ids_at - shift) // 8
        self.blas = ThreadpoolController().select(user_api="blas")

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

    def pays(self, queries: int) -> bool:
        """Whether so many queries share lists often enough."""
        return queries * self.ivf.nprobe >= QUERIES_A_LIST * self.ivf.nlist

    def search(
        self, queries: np.ndarray, k: int, ordered: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of the lists that `nprobe` allows; by as many threads as faiss would take
        here.

        Args:
            queries: fp32 `[Q, d]`.
            ordered: nearest first, the missing last; otherwise in any order.

        Returns:
            distances fp32 and ids int64 `[Q, k]`; -1 where missing.
        """
        self.threads = faiss.omp_get_max_threads()
        probes = min(self.ivf.nprobe, self.ivf.nlist)
        distances = np.empty((len(queries), k), dtype=np.float32)
        ids = np.empty((len(queries), k), dtype=np.int64)
        with self.blas.limit(limits=1):
            lists = self._coarse(queries, probes)
            bytes_so_far = np.cumsum(4 * np.maximum(self.sizes[lists].sum(1), k))
            cuts = np.flatnonzero(np.diff(bytes_so_far // BUFFER_BYTES)) + 1
            for part in np.split(np.arange(len(queries)), cuts):
                Visit(self, queries[part], lists[part], k, ordered).into(distances, ids, part)
        return distances, ids

    def _coarse(self, queries: np.ndarray, probes: int) -> np.ndarray:
        """The lists to visit, int64 `[Q, probes]`."""
        parts = np.array_split(queries, self.threads)
        found = self.map(lambda part: self.ivf.quantizer.search(part, probes)[1], parts)
        lists = np.concatenate(found)
        if (lists < 0).any():  # an approximate quantizer may find too few: an empty list stands in
            lists = np.where(lists < 0, self._empty, lists)
        return lists

    @cached_property
    def _empty(self) -> int:
        self.sizes = np.append(self.sizes, 0)
        self.codes_at, self.ids_at = np.append(self.codes_at, 0), np.append(self.ids_at, 0)
        return len(self.sizes) - 1

    def map(self, function, parts) -> list:
        """Results for each part, in this thread where it is the only one."""
        if self.threads == 1:
            return [function(part) for part in parts]
        return list(self.pool.map(function, parts))

    def decoded(self, number: int) -> np.ndarray:
        """What a list's codes stand for, fp32 `[n, d]`; for l2 relative to its centroid, so that
        distances do not lose their digits where vectors lie far from the origin."""
        ivf, size = self.ivf, int(self.sizes[number])
        begin = self.codes_at[number]
        codes = self.file[begin : begin + size * ivf.code_size]
        if isinstance(ivf, faiss.IndexIVFFlat):
            vectors = codes.view(np.float32).reshape(size, -1)
        elif (
            isinstance(ivf, faiss.IndexIVFScalarQuantizer)
            and ivf.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        ):
            halves = torch.from_numpy(codes.view(np.float16).reshape(size, -1))
            vectors = halves.float().numpy()  # numpy takes seven times as long
        else:
            coder = ivf.pq if isinstance(ivf, faiss.IndexIVFPQ) else ivf.sq
            vectors = coder.decode(codes.reshape(size, -1))
        relative = ivf.by_residual and not isinstance(ivf, faiss.IndexIVFFlat)
        if relative == (not self.similar):
            return vectors
        centroid = self.centroids[number]
        return vectors + centroid if relative else vectors - centroid


class Visit:
    """Distances of some queries to all vectors of the lists they visit.

    They lie in one buffer, a row a query; queries are in the order of how many there are, in groups
    of `GROUP` with rows of one width, filled up with infinity.

    Args:
        search: where.
        queries: fp32 `[Q, d]`.
        lists: int64 `[Q, probes]`.
        k: neighbours to select.
        ordered: nearest first.
    """

    def __init__(
        self,
        search: ListSearch,
        queries: np.ndarray,
        lists: np.ndarray,
        k: int,
        ordered: bool = True,
    ) -> None:
        self.search = search
        self.k = k
        self.ordered = ordered
        found = search.sizes[lists].sum(1)
        self.order = np.argsort(found, kind="stable")
        self.lists = lists[self.order]
        self.queries = queries[self.order]
        self.found = found[self.order]
        last = np.minimum(np.arange(GROUP - 1, len(found) + GROUP - 1, GROUP), len(found) - 1)
        self.widths = np.repeat(np.maximum(self.found[last], k), GROUP)[: len(found)]
        self.rows = np.cumsum(self.widths) - self.widths
        sizes = search.sizes[self.lists]
        self.columns = np.cumsum(sizes, axis=1) - sizes
        self.buffer = np.full(int(self.widths.sum()), np.inf, dtype=np.float32)

    def into(self, distances: np.ndarray, ids: np.ndarray, rows: np.ndarray) -> None:
        """Writes what is found to these rows of the results."""
        self._measure()
        firsts = range(0, len(self.order), GROUP)

        def select(first: int) -> None:
            here = rows[self.order[first : first + GROUP]]
            distances[here], ids[here] = self._select(first)

        self.search.map(select, firsts)

    def _measure(self) -> None:
        """Fills the buffer, list by list."""
        flat = self.lists.ravel()
        smallest_type = np.min_scalar_type(len(self.search.sizes))  # numpy sorts 16 bits by radix
        order = np.argsort(flat.astype(smallest_type), kind="stable")
        visitors = order // self.lists.shape[1]
        places = (self.rows[:, None] + self.columns).ravel()[order]
        numbers, firsts = np.unique(flat[order], return_index=True)
        ends = np.append(firsts[1:], len(order))
        scaled = self.queries * np.float32(-1 if self.search.similar else -2)
        visits = [
            (number, visitors[a:b], places[a:b])
            for number, a, b in zip(numbers.tolist(), firsts.tolist(), ends.tolist(), strict=True)
        ]

        def measure(visits: list) -> None:
            for number, visitors, places in visits:
                size = int(self.search.sizes[number])
                if size == 0:
                    continue
                # Windows of the list's size on the buffer, one from each of its places.
                shape = (len(self.buffer) - size + 1, size)
                windows = np.ndarray(shape, np.float32, self.buffer, strides=(4, 4))
                windows[places] = self._distances(scaled[visitors], number)

        threads = self.search.threads
        self.search.map(measure, [visits[i::threads] for i in range(threads)])

    def _distances(self, scaled: np.ndarray, number: int) -> np.ndarray:
        """Negative inner products of queries and a list's vectors, or squared distances.

        Args:
            scaled: fp32 `[n, d]`, queries times -1 for inner products or -2 for distances.
        """
        vectors = self.search.decoded(number)
        if self.search.similar:
            return scaled @ vectors.T
        scaled += 2 * self.search.centroids[number]  # -2 (q - c)
        distances = scaled @ vectors.T
        distances += np.einsum("ij,ij->i", vectors, vectors)
        distances += np.einsum("ij,ij->i", scaled, scaled)[:, None] / 4
        return distances

    def _select(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and ids of the k nearest of a group."""
        group = slice(first, first + GROUP)
        n, width, begin = len(self.rows[group]), int(self.widths[first]), int(self.rows[first])
        values = self.buffer[begin : begin + n * width].reshape(n, width)
        row_starts = np.arange(0, n * width, width)[:, None]
        chosen = k_smallest(values, self.k)
        chosen += row_starts
        # From places in the buffer to places among the ids: shifted alike for all of a visit.
        bounds = (self.columns[group] + row_starts).ravel()
        counts = np.diff(np.searchsorted(chosen.ravel(), np.append(bounds, n * width)))
        shifts = self.search.ids_at[self.lists[group]].ravel() - bounds
        places = chosen.ravel() + np.repeat(shifts, counts)
        distances = np.take(values, chosen)
        if self.ordered:
            distances, nearest = sort_rows(distances)
            places = np.take(places, nearest)
        ids = np.take(self.search.ids, places, mode="clip").reshape(distances.shape)
        if self.found[first] < self.k:
            missing = np.isinf(distances)
            ids[missing], distances[missing] = -1, np.finfo(np.float32).max
        return (-distances if self.search.similar else np.maximum(distances, 0)), ids


def _layout(lists: faiss.OnDiskInvertedLists) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes of lists, and where in the file their codes and ids begin, int64 `[nlist]` each."""
    entries = [lists.lists.at(number) for number in range(lists.nlist)]
    sizes = np.array([entry.size for entry in entries], dtype=np.int64)
    codes = np.array([entry.offset for entry in entries], dtype=np.int64)
    capacities = np.array([entry.capacity for entry in entries], dtype=np.int64)
    return sizes, codes, codes + capacities * lists.code_size
