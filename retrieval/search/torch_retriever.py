"""Exact search by matrix products on any device of torch: for GPUs without a faiss that supports
them, and wherever reading every key is cheaper than building an index.

Blocks of keys are multiplied with all queries, and only each query's k nearest keys so far are
kept. No array grows with the number of keys, unless the keys stay on the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from neighborlm.common.contracts import Metric, Neighbors
from neighborlm.common.interrupts import thread_pool
from neighborlm.retrieval.engine import k_smallest, sort_rows
from neighborlm.retrieval.search.retriever import BaseRetriever, missing_distance, normalized
from neighborlm.retrieval.store.datastore import BLOCK_BYTES, Datastore

MARGIN_BYTES = 4 << 30
"""Memory of a GPU that keys must leave free for the model and for the search's other arrays."""
SAMPLE = 1024
"""Keys from which the mean of all is estimated."""


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of the blocks that a search works on.

    Attributes:
        buffer_bytes: bytes of the distances of a block.
        keys: smallest number of keys in a block; on a CPU the number itself, so that distances stay
            in the caches.
        key_bytes: largest number of bytes of a block's keys in fp32.
        group: largest number of queries that a thread of the CPU works on at a time.
    """

    buffer_bytes: int = 256 << 20
    keys: int = 8192
    key_bytes: int = BLOCK_BYTES
    group: int = 128


class TorchRetriever(BaseRetriever):
    """Exact search on one device.

    Squared distances are computed as |q|^2 - 2 q.k + |k|^2 after the mean of some keys was
    subtracted from queries and keys: cancellation then depends on the spread of the keys, not on
    their distance from the origin. The error is a few units in the last place of |q|^2 + |k|^2 in
    fp32, so the distances count as `exact`.

    Args:
        datastore: where to search.
        metric: how keys are compared.
        device: where to compute; `cuda` is the calling thread's current GPU.
        resident_bytes: keys that take at most so many bytes, in the datastore's own type, stay on
            the device after the first search; larger ones are copied block by block in each search.
            By default a GPU's free memory at the first search, less a margin, and nothing on a CPU,
            where the page cache holds the keys.
        sizes: sizes of the blocks to work on.
    """

    name = "torch"

    def __init__(
        self,
        datastore: Datastore,
        metric: Metric,
        device: str | torch.device = "cpu",
        resident_bytes: int | None = None,
        sizes: BlockSizes | None = None,
    ) -> None:
        self.datastore = datastore
        self.metric = metric
        self.exact = True
        self.device = torch.device(device)
        self.sizes = sizes or BlockSizes()
        self.keys = DeviceKeys(datastore, self.device, resident_bytes)
        self.blas = ThreadpoolController().select(user_api="blas")

    @torch.inference_mode()
    def search(self, queries: np.ndarray, k: int, ordered: bool = True) -> Neighbors:
        """See `contracts.Retriever.search`; in any case ordered. Queries that are not finite find
        nothing."""
        queries = normalized(queries, self.metric)
        distances = np.full((len(queries), k), missing_distance(self.metric), dtype=np.float32)
        numbers = np.full((len(queries), k), -1, dtype=np.int64)
        found = min(k, self.datastore.n_keys)
        finite = np.flatnonzero(np.isfinite(queries).all(axis=1))
        step = max(self.sizes.buffer_bytes // (4 * max(self.sizes.keys, 4 * found)), 1)
        for first in range(0, len(finite) if found else 0, step):
            part = finite[first : first + step]
            distances[part, :found], numbers[part, :found] = self._nearest(queries[part], found)
        return self.checked(Neighbors(distances, self.datastore.rows_of(numbers)))

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances fp32 and numbers of the keys int64 `[Q, k]`, nearest first."""
        moved = torch.from_numpy(queries).to(self.device)
        if self.metric == "l2":
            moved = moved - self.keys.center
        scaled = moved * (-2 if self.metric == "l2" else -1)
        sizes = self.sizes
        if self.device.type == "cpu":
            nearest, block_keys = CPUNearest(scaled, k, sizes.group), sizes.keys
        else:
            nearest, block_keys = DeviceNearest(scaled, k), sizes.buffer_bytes // (4 * len(queries))
        block_keys = max(min(block_keys, sizes.key_bytes // (4 * self.datastore.dim)), 1)
        with self.blas.limit(limits=1):
            for first, keys in self.keys.blocks(block_keys):
                terms = torch.zeros(len(keys), device=self.device)
                if self.metric == "l2":
                    keys = keys - self.keys.center
                    terms = (keys * keys).sum(1)
                elif self.metric == "cosine":
                    lengths = torch.linalg.vector_norm(keys, dim=1, keepdim=True)
                    keys = keys / lengths.clamp_min(torch.finfo(torch.float32).tiny)
                nearest.add(keys, terms, first)
            values, numbers = nearest.result()
        if self.metric != "l2":
            return -values, numbers
        values += (moved * moved).sum(1, keepdim=True).cpu().numpy()
        return np.maximum(values, 0), numbers


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiplies fp32 numbers in full precision, not rounded to ten bits (TF32).

    The setting belongs to the process: while a product is started here, the model's products in
    other threads are also computed in full precision, which takes longer.
    """
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class DeviceKeys:
    """The keys of a datastore on a device, block by block; masked rows are left out.

    Args:
        datastore: whose keys.
        device: where they are needed.
        resident_bytes: see `TorchRetriever`.
    """

    def __init__(
        self, datastore: Datastore, device: torch.device, resident_bytes: int | None
    ) -> None:
        self.datastore = datastore
        self.device = device
        self.resident_bytes = resident_bytes
        self.resident: Tensor | None = None
        self.dtype = torch.from_numpy(np.empty(0, datastore.keys.dtype)).dtype
        # For each masked row, how many keys come before it.
        self.skipped = datastore.masked - np.arange(len(datastore.masked))

    @cached_property
    def center(self) -> Tensor:
        """The mean of some keys, fp32 `[d]`; 0 where that is not finite."""
        _, sample = self.datastore.sample(SAMPLE, seed=1)
        center = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
        return torch.from_numpy(np.nan_to_num(center, posinf=0, neginf=0)).to(self.device)

    @cached_property
    def fits(self) -> bool:
        """Whether all keys may stay on the device."""
        budget = self.resident_bytes
        if budget is None and self.device.type == "cuda":
            budget = torch.cuda.mem_get_info(self.device)[0] - MARGIN_BYTES
        return self.datastore.n_keys * self.datastore.dim * self.dtype.itemsize <= (budget or 0)

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """All keys in order: the number of a block's first key, and the keys fp32 `[n, d]`.

        A block is overwritten once the next one is asked for.

        Args:
            size: keys in a block.
        """
        if self.fits and self.resident is None:
            shape = self.datastore.n_keys, self.datastore.dim
            resident = torch.empty(shape, dtype=self.dtype, device=self.device)
            for first, block in self._streamed(size):
                resident[first : first + len(block)] = block
            self.resident = resident
        if self.resident is not None:
            parts = enumerate(self.resident.split(size))
            yield from ((number * size, block.float()) for number, block in parts)
        else:
            yield from ((first, block.float()) for first, block in self._streamed(size))

    def _streamed(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Blocks of keys in their own type, copied to the device.

        On a GPU the copies have a stream of their own and two buffers: while one block is worked
        on, the next is read from the file and copied.
        """
        firsts = range(0, self.datastore.n_keys, size)
        shape = min(size, self.datastore.n_keys), self.datastore.dim
        if self.device.type != "cuda":
            staging = torch.empty(shape, dtype=self.dtype)
            for first in firsts:
                yield first, self._read(first, staging).to(self.device)
            return
        working = torch.cuda.current_stream(self.device)
        copying = torch.cuda.Stream(self.device)
        copying.wait_stream(working)
        places = cycle([CopyPlace(shape, self.dtype, self.device) for _ in range(2)])
        for first, place in zip(firsts, places, strict=False):
            place.copied.synchronize()
            staged = self._read(first, place.staging)
            block = place.keys[: len(staged)]
            with torch.cuda.stream(copying):
                copying.wait_event(place.used)
                block.copy_(staged, non_blocking=True)
                place.copied.record(copying)
            working.wait_event(place.copied)
            yield first, block
            place.used.record(working)

    def _read(self, first: int, out: Tensor) -> Tensor:
        """Reads keys from number `first` on into `out`; returns the part of `out` that they
        fill."""
        last = min(first + len(out), self.datastore.n_keys)
        out = out[: last - first]
        keys = self.datastore.keys
        if len(self.skipped) == 0:
            np.copyto(out.numpy(), keys[first:last])
        else:
            numbers = np.arange(first, last)
            np.copyto(out.numpy(), keys[numbers + self.skipped.searchsorted(numbers, "right")])
        return out


class CopyPlace:
    """A block of keys on its way to a GPU.

    Attributes:
        staging: pinned memory, so that the copy runs by itself.
        keys: the block on the GPU.
        copied: recorded when the keys have been copied.
        used: recorded when they may be overwritten.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.staging = torch.empty(shape, dtype=dtype, pin_memory=True)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.copied = torch.cuda.Event()
        self.used = torch.cuda.Event()


class DeviceNearest:
    """Finds, for each query, the k keys with the smallest sum of their product with the query and a
    term of the key, among keys that come block by block; by torch.topk.

    Args:
        queries: fp32 `[Q, d]`.
        k: no more than there are keys in all blocks.
    """

    def __init__(self, queries: Tensor, k: int) -> None:
        self.queries = queries
        self.k = k
        self.values = torch.full((len(queries), k), torch.inf, device=queries.device)
        self.numbers = torch.full((len(queries), k), -1, device=queries.device)

    def add(self, keys: Tensor, terms: Tensor, first: int) -> None:
        """Looks at a block of keys.

        Args:
            keys: fp32 `[n, d]`, numbered from `first` on.
            terms: fp32 `[n]`.
        """
        with full_precision():
            values = torch.addmm(terms, self.queries, keys.T)
        self.keep(values, first)

    def keep(self, values: Tensor, first: int) -> None:
        """Keeps the smallest of the values fp32 `[Q, n]` of a block and those kept so far."""
        values, numbers = values.topk(min(self.k, values.shape[1]), largest=False, sorted=False)
        values = torch.cat([self.values, values], dim=1)
        numbers = torch.cat([self.numbers, numbers + first], dim=1)
        self.values, places = values.topk(self.k, largest=False, sorted=False)
        self.numbers = numbers.gather(1, places)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest values in ascending order fp32, and numbers of their keys int64 `[Q, k]`."""
        values, places = self.values.sort(dim=1)
        return values.cpu().numpy(), self.numbers.gather(1, places).cpu().numpy()


class CPUNearest:
    """Does what `DeviceNearest` does on a CPU, where torch.topk is slow: as many threads as torch
    would use each work on a group of queries.

    Args:
        queries: fp32 `[Q, d]`.
        k: no more than there are keys in all blocks.
        at_once: largest number of queries that a thread works on at a time.
    """

    def __init__(self, queries: Tensor, k: int, at_once: int) -> None:
        threads = torch.get_num_threads()
        group = min(-(-len(queries) // threads), at_once)
        self.groups = [GroupNearest(part.numpy(), k) for part in queries.split(group)]
        self.pool = thread_pool(threads)

    def add(self, keys: Tensor, terms: Tensor, first: int) -> None:
        """See `DeviceNearest.add`."""
        block = keys.numpy(), terms.numpy(), first
        list(self.pool.map(lambda group: group.add(*block), self.groups))

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """See `DeviceNearest.result`."""
        values, numbers = zip(*self.pool.map(GroupNearest.result, self.groups), strict=True)
        return np.concatenate(values), np.concatenate(numbers)


class GroupNearest:
    """Does what `DeviceNearest` does for a few queries in one thread.

    Values below a query's bound are kept until there are 2 k of them; then only the k smallest
    stay, and the largest of these is the new bound.

    Args:
        queries: fp32 `[Q, d]`.
        k: no more than there are keys in all blocks.
    """

    def __init__(self, queries: np.ndarray, k: int) -> None:
        self.queries = queries
        self.k = k
        self.values = np.full((len(queries), 2 * k), np.inf, dtype=np.float32)
        self.numbers = np.full((len(queries), 2 * k), -1, dtype=np.int64)
        self.counts = np.zeros(len(queries), dtype=np.int64)
        self.bounds = np.full((len(queries), 1), np.inf, dtype=np.float32)

    def add(self, keys: np.ndarray, terms: np.ndarray, first: int) -> None:
        """See `DeviceNearest.add`."""
        values = self.queries @ keys.T
        values += terms
        self.keep(values, first)

    def keep(self, values: np.ndarray, first: int) -> None:
        """See `DeviceNearest.keep`."""
        rows, width = values.shape
        starts = np.arange(0, rows * width, width)
        chosen = np.flatnonzero(values < self.bounds)
        counts = np.diff(np.searchsorted(chosen, np.append(starts, rows * width)))
        if counts.max() > self.k:  # the first block, or keys in the order of their distances
            chosen = (k_smallest(values, self.k) + starts[:, None]).ravel()
            counts = np.full(rows, self.k)
            kth = np.take(values, chosen).reshape(rows, self.k).max(axis=1, keepdims=True)
            self.bounds = np.minimum(self.bounds, kth)
        if (self.counts + counts).max() > 2 * self.k:
            self._keep_smallest()
        shifts = np.arange(rows) * 2 * self.k + self.counts - (np.cumsum(counts) - counts)
        places = np.arange(len(chosen)) + np.repeat(shifts, counts)
        np.put(self.values, places, np.take(values, chosen))
        np.put(self.numbers, places, chosen + np.repeat(first - starts, counts))
        self.counts += counts

    def _keep_smallest(self) -> None:
        smallest = k_smallest(self.values, self.k)
        self.values[:, : self.k] = np.take_along_axis(self.values, smallest, axis=1)
        self.numbers[:, : self.k] = np.take_along_axis(self.numbers, smallest, axis=1)
        self.values[:, self.k :] = np.inf
        self.counts = np.minimum(self.counts, self.k)
        kth = self.values[:, : self.k].max(axis=1, keepdims=True)
        self.bounds = np.minimum(self.bounds, kth)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """See `DeviceNearest.result`."""
        self._keep_smallest()
        values, places = sort_rows(np.ascontiguousarray(self.values[:, : self.k]))
        return values, np.take(self.numbers[:, : self.k], places)
