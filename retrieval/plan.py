"""Says before anything is run what a memory of so many keys will take: bytes on disk and in memory,
time for each stage, queries per second, and what does not fit with what would make it fit.

    python -m retrieval.plan --tokens 103e6 --dim 1024 --k 1024 --hosts 4 --memory 64GB --disk 2TB

Bytes are those of the files that the stages write; time is of operations, at the rates that
`benchmarks/constants.py` has measured. docs/scaling.md has the formulas.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from jsonargparse import ArgumentParser
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from errors import InputError, exit_with_one_sentence
from retrieval.checksums import rows_of_chunk
from retrieval.codec import HELD
from retrieval.codec import SAMPLE as CODEC_SAMPLE
from retrieval.datastore import BLOCK_BYTES, DTYPES
from retrieval.index import (
    NOT_BUILT,
    PART_BYTES,
    POINTS_PER_CENTROID,
    SAMPLE_AT_LEAST,
    auto_factory,
    make_index,
)
from retrieval.list_search import BUFFER_BYTES, QUERIES_A_LIST
from retrieval.neighbors import QUERIES_AT_ONCE

HEADER = 128
"""Bytes in front of an array in a .npy file."""
MANIFEST = 2048
"""Bytes of a manifest, about."""
MODEL_CONTEXT = 512
"""Length of the rows on which the model's speed was measured."""
HNSW_DISTANCES = 512
"""Distances that faiss computes to find a list through a graph: 16 candidates of 32 neighbours."""
KMEANS_ROUNDS, PQ_ROUNDS, OPQ_ROUNDS = 10, 13, 200
"""Passes of faiss over the sample for lists, for PQ (25, each half as long as an encoding), and for
PQ once more where OPQ rotates."""
QUANTIZER_SAMPLE = 65536
"""What faiss trains PQ on at most: 256 vectors for each of 256 centroids."""
BLOCK_OF_CODES = 32
"""Vectors that fast-scan lists keep together; half of the last block of a list is empty."""
SHARE_FOR_CACHE = 0.9
"""Of the memory, what the page cache can use when all programs have theirs."""
WORKING_BYTES = 1 << 30
"""Memory of Python, torch and faiss themselves and of what a batch needs."""
STARTING = 0.02
"""Seconds to make a datastore's files and to mark it complete."""
LONG = 7 * 86400
"""Seconds after which a stage is said to take long."""


@dataclass(frozen=True)
class Constants:
    """Rates of one core and of one disk.

    Measured by benchmarks/constants.py on one core of an AMD EPYC (Zen 3, AVX2) with a virtual
    disk, other work beside it, in fp32 and at width 128, unless said otherwise. That program's JSON
    replaces them.

    Args:
        list_gflops: products of some queries with a list (`Visit._distances`).
        assign_gflops: faiss looking for the nearest of 1024 centroids, as in training and adding.
        pq_gflops: faiss looking for the nearest of 256 centroids of PQ.
        model_gflops: the LM without softmax, width 512 (it was 13 at width 128).
        hnsw_ns: per value of 512 distances, where a graph finds the list.
        select_ns: per candidate, choosing 1024 of 5800 (`k_smallest`).
        scatter_ns: per candidate, bringing distances from lists to queries.
        sort_ns: per neighbour, all else that `ListSearch` does: sorting, looking up ids.
        decode_half_ns: per value of a list, from half precision, and its part of the length.
        decode_sq8_ns: the same from 8 bits.
        decode_pq_ns: the same from PQ.
        encode_ns: per value, to 8 bits.
        scan_ns: per value, where faiss visits the lists of one query after another.
        heap_ns: per candidate that enters the heap of the k nearest, there.
        fast_scan_ns: per candidate, in lists of one-bit codes.
        fast_heap_ns: per candidate that enters the heap, there.
        rescore_ns: per value, distances to stored keys that are in the page cache, width 1024.
        mix_ns: per neighbour, its value and its part of p_kNN.
        imbalance: how much longer the lists visited are than the mean list; 5,755 candidates for
            an expected 5,086 in IVF1024 on keys of an LM.
        write_gbytes: of keys a second into a datastore, rounded, checked and with checksums.
        disk_write_gbytes: per second.
        disk_read_gbytes: per second, in order.
        random_reads: of 4 KiB a second by one thread.
    """

    list_gflops: float = 50.0
    assign_gflops: float = 50.0
    pq_gflops: float = 14.0
    model_gflops: float = 50.0
    hnsw_ns: float = 0.8
    select_ns: float = 2.7
    scatter_ns: float = 12.0
    sort_ns: float = 40.0
    decode_half_ns: float = 0.6
    decode_sq8_ns: float = 0.45
    decode_pq_ns: float = 0.8
    encode_ns: float = 2.0
    scan_ns: float = 0.15
    heap_ns: float = 130.0
    fast_scan_ns: float = 11.0
    fast_heap_ns: float = 150.0
    rescore_ns: float = 3.5
    mix_ns: float = 28.0
    imbalance: float = 1.13
    write_gbytes: float = 0.3
    disk_write_gbytes: float = 0.3
    disk_read_gbytes: float = 0.8
    random_reads: float = 6000.0

    @classmethod
    def read(cls, path: Path) -> "Constants":
        """From what benchmarks/constants.py has written; those that it lacks are the default's.

        Raises:
            InputError: not such a file.
        """
        try:
            found = json.loads(path.read_text())["constants"]
            return cls(**{name: float(value) for name, value in found.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"--constants {path}: {error}; expected what benchmarks/constants.py writes"
            ) from None


@dataclass(frozen=True)
class Wanted:
    """What is planned.

    Args:
        tokens: of the text, each of which gives a key.
        dim: width of the keys.
        k: neighbours of a query.
        index: `auto`, `flat`, `torch`, or a faiss factory string with inverted lists.
        hosts: that hold a shard each; with one, nothing is sent.
        memory: of a host.
        disk: of a host.
        queries: tokens to evaluate.
        nprobe: inverted lists to visit.
        dtype: of the stored keys.
        vocab: size of the vocabulary.
        cores: of a host (default: those of this machine).
        network: between hosts, in bits a second.
        distances: to the stored keys (`exact`), or those of the index.
        table_k: neighbours of a token in the tables of a GNN-LM; 0 for kNN-LM alone.
        codec: of a GNN-LM's features; by default OPQ and PQ with a byte for eight dimensions.
        cache: whether what is retrieved is kept (`--knn.cache`).
        tokens_per_sample: length of the LM's rows, context included.
        context_window: how many of those only give context.
        layers: of the LM, where its speed is told by its size.
        parameters: of the LM's layers; by default 12 layers dim^2.
        tokens_per_second: that the LM reads on one host, context included; by default what the
            cores compute.
        constants: JSON of benchmarks/constants.py.
        output: JSON file for the plan.
    """

    tokens: float
    dim: int = 1024
    k: int = 1024
    index: str = "auto"
    hosts: int = 1
    memory: str = "64GB"
    disk: str = "2TB"
    queries: float = 250e3
    nprobe: int = 32
    dtype: Literal["fp16", "fp32"] = "fp16"
    vocab: int = 267744
    cores: int = os.cpu_count() or 1
    network: str = "10Gbit"
    distances: Literal["exact", "index"] = "exact"
    table_k: int = 0
    codec: str | None = None
    cache: bool = False
    tokens_per_sample: int = 3072
    context_window: int = 1536
    layers: int = 16
    parameters: float | None = None
    tokens_per_second: float | None = None
    constants: Path | None = None
    output: Path | None = None

    def check(self) -> None:
        """Raises InputError where a value cannot be right."""
        for name in ("tokens", "dim", "k", "hosts", "nprobe", "vocab", "cores", "layers"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; expected at least 1")
        if self.table_k < 0 or self.queries < 0:
            raise InputError("--table_k and --queries: expected no less than 0")
        if self.k > self.tokens:
            raise InputError(f"--k is {self.k}, but there are only {self.tokens:.0f} keys")
        if not 0 <= self.context_window < self.tokens_per_sample:
            raise InputError(
                f"--context_window is {self.context_window}; expected less than the "
                f"{self.tokens_per_sample} of --tokens_per_sample"
            )


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
UNITS |= {f"{name}i": 1 << 10 * power for power, name in enumerate("KMGTP", start=1)}


def amount(text: str, flag: str, unit: str = "B") -> float:
    """A number of bytes or bits.

    Raises:
        InputError: it is none.

    >>> amount("64GB", "memory"), amount("1.5GiB", "memory"), amount("10Gbit", "network", "bit")
    (64000000000.0, 1610612736.0, 10000000000.0)
    """
    match = re.fullmatch(rf"([0-9.e+]+) *([KMGTP]?i?)({unit})?(/s)?", text.strip())
    try:
        return float(match[1]) * UNITS[match[2]]
    except (TypeError, ValueError, KeyError):
        raise InputError(f"--{flag} is {text!r}; expected such as 64G{unit}") from None


class IndexShape:
    """What an index of some type takes, told by an empty one.

    Args:
        dim: width of the keys.
        factory: of faiss, with inverted lists.

    Raises:
        InputError: faiss does not know it, or it has no lists.
    """

    def __init__(self, dim: int, factory: str) -> None:
        index = make_index(dim, factory, "l2")
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is None:
            raise InputError(f"--index is {factory}; expected auto, flat, torch or inverted lists")
        ivf = faiss.downcast_index(ivf)
        self.dim = dim
        self.dim_of_lists: int = ivf.d
        self.lists: int = ivf.nlist
        self.code_size: int = ivf.code_size
        self.fast_scan = isinstance(ivf, faiss.IndexIVFFastScan)
        self.graph = isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexHNSW)
        self.transforms = index.chain.size() if isinstance(index, faiss.IndexPreTransform) else 0
        self.optimized = "OPQ" in factory
        self.centroids_of_pq: int = ivf.pq.ksub if hasattr(ivf, "pq") else 0
        half = isinstance(ivf, faiss.IndexIVFScalarQuantizer)
        self.half = half and ivf.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        self.exact = isinstance(ivf, faiss.IndexIVFFlat)

    def bytes(self, keys: float) -> float:
        """Of the file or files."""
        padding = self.lists * BLOCK_OF_CODES / 2 if self.fast_scan else 0
        lists = keys * 8 + (keys + padding) * self.code_size
        return lists + self.bytes_in_front

    @property
    def bytes_in_front(self) -> float:
        """What is no list: centroids, rotations, quantiser."""
        links = 64 * 4 + 16 if self.graph else 0
        pq = self.centroids_of_pq * self.dim_of_lists * 4
        rotation = self.transforms * 4 * self.dim * self.dim_of_lists
        return self.lists * (self.dim_of_lists * 4 + links + 24) + rotation + pq + 1024

    @property
    def sample(self) -> int:
        """Keys that it is trained on, if there are so many."""
        return max(self.lists * POINTS_PER_CENTROID, SAMPLE_AT_LEAST)


class Plan:
    """The figures of what is wanted, for one host of those that take part.

    Args:
        wanted: see `Wanted`.
        constants: see `Constants`.
    """

    def __init__(self, wanted: Wanted, constants: Constants) -> None:
        wanted.check()
        self.wanted = w = wanted
        self.constants = constants
        self.keys = math.ceil(w.tokens)
        self.rows = -(-self.keys // w.hosts)
        self.memory = amount(w.memory, "memory")
        self.disk = amount(w.disk, "disk")
        self.network = amount(w.network, "network", "bit") / 8
        self.key_bytes = w.dim * DTYPES[w.dtype].itemsize
        self.value_bytes = np.min_scalar_type(w.vocab - 1).itemsize
        self.row_bytes = np.min_scalar_type(-self.keys).itemsize
        # As the program that builds the index decides: by all keys, and a quarter of one memory.
        auto = auto_factory(self.keys, w.dim, int(self.memory / 4))
        self.factory = auto if w.index == "auto" else w.index
        self.codec = w.codec or f"OPQ{max(w.dim // 8, 1)}_{w.dim},PQ{max(w.dim // 8, 1)}"

    @cached_property
    def shape(self) -> IndexShape | None:
        """Of the index; None where keys themselves are searched."""
        return None if self.factory in NOT_BUILT else IndexShape(self.wanted.dim, self.factory)

    @cached_property
    def code_bytes(self) -> int:
        """Of a row's features."""
        return faiss.index_factory(self.wanted.dim, self.codec).sa_code_size()

    # -- bytes ------------------------------------------------------------------------------------

    @cached_property
    def bytes(self) -> dict[str, float]:
        """Of each product on the disk of a host."""
        w, rows = self.wanted, self.rows
        chunks = -(-rows // rows_of_chunk(self.key_bytes))
        found = {
            "keys": HEADER + rows * self.key_bytes,
            "values": HEADER + rows * self.value_bytes,
            "checksums and manifest": HEADER + chunks * 16 + MANIFEST,
            "index": self.shape.bytes(rows) + MANIFEST if self.shape else 0,
        }
        if w.table_k:
            pq = 256 * 4 * w.dim + 4 * w.dim**2 * self.codec.startswith("OPQ")
            found["neighbour table"] = HEADER + MANIFEST + rows * w.table_k * self.signed_row_bytes
            found["codes"] = HEADER + MANIFEST + rows * self.code_bytes + pq
        if w.cache:
            row = 4 + self.value_bytes + w.k * (4 + self.value_bytes)
            found["cache"] = 4 * HEADER + MANIFEST + math.ceil(w.queries) * row
        return found

    @property
    def signed_row_bytes(self) -> int:
        """Of a row's number in a table."""
        return next(n for n in (2, 4, 8) if self.keys - 1 < 1 << 8 * n - 1)

    @cached_property
    def room(self) -> dict[str, float]:
        """Of the disk: what stays, and what is there at the most."""
        stays = sum(self.bytes.values())
        parts = self.bytes["index"] if self.in_parts else 0
        last = sum(self.bytes.get(name, 0) for name in ("neighbour table", "codes", "cache"))
        keys = stays - self.bytes["index"] - last
        return {"stays": stays, "at the most": max(stays, stays - last + parts, keys + self.rows)}

    @property
    def in_parts(self) -> bool:
        """Whether the index is built in parts that are then merged."""
        shape = self.shape
        return bool(shape and not shape.fast_scan and shape.bytes(self.rows) > PART_BYTES)

    @cached_property
    def needs(self) -> dict[str, float]:
        """Memory of a host, by stage; of a mapped index what should stay in the page cache."""
        w, shape = self.wanted, self.shape
        model = 4 * (self.parameters + w.vocab * w.dim / 4) + WORKING_BYTES
        batch = QUERIES_AT_ONCE * (w.dim * 4 + w.k * 24)
        found = {"datastore": model}
        if shape is None:
            found["search"] = model + batch + 2 * BLOCK_BYTES
            return found
        sample = min(shape.sample, self.keys) * w.dim * (4 + DTYPES[w.dtype].itemsize)
        lists = min(PART_BYTES, shape.bytes(self.rows))
        found["index training"] = sample + shape.bytes_in_front + WORKING_BYTES
        found["index adding"] = shape.bytes_in_front + WORKING_BYTES
        found["index adding"] += shape.bytes(self.rows) if shape.fast_scan else lists
        copy = 0 if shape.fast_scan else shape.lists * shape.dim_of_lists * 4 + BUFFER_BYTES
        found["search"] = model + batch + copy + shape.bytes(self.rows) / SHARE_FOR_CACHE
        return found

    @property
    def parameters(self) -> float:
        """Of the LM's layers."""
        w = self.wanted
        return w.parameters or 12 * w.layers * w.dim**2

    # -- time -------------------------------------------------------------------------------------

    @cached_property
    def lm_seconds(self) -> float:
        """Of a host for a token, what is read again as context included."""
        w = self.wanted
        overlap = w.tokens_per_sample / (w.tokens_per_sample - w.context_window)
        if w.tokens_per_second:
            return overlap / w.tokens_per_second
        flops = flops_of_token(self.parameters, w.layers, w.dim, w.tokens_per_sample)
        return overlap * flops / (1e9 * self.constants.model_gflops * w.cores)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of each stage, in the order in which they are run."""
        w, c, shape = self.wanted, self.constants, self.shape
        keys = self.rows * self.key_bytes
        cores = 1e9 * w.cores
        written = keys / 1e9 / min(c.write_gbytes, c.disk_write_gbytes)
        found = {"datastore": STARTING + max(self.rows * self.lm_seconds, written)}
        reading = keys / (1e9 * c.disk_read_gbytes) if keys > self.memory else 0
        if shape is not None:
            sample = min(shape.sample, self.keys)
            kmeans = KMEANS_ROUNDS * sample * shape.lists * shape.dim_of_lists * 2
            in_file = sample / c.random_reads if self.keys * self.key_bytes > self.memory else 0
            trained = kmeans / (cores * c.assign_gflops)
            trained += self._quantizer_flops(shape, sample) / (cores * c.pq_gflops)
            found["index training"] = trained + in_file
            writes = (3 if self.in_parts else 1) * shape.bytes(self.rows)
            adding = self.rows * self._add_seconds(shape) / w.cores
            found["index adding"] = adding + reading + writes / (1e9 * c.disk_write_gbytes)
        if w.table_k:
            # One host searches for every token, by the index's own distances, and encodes all.
            own = {"k": w.table_k, "hosts": 1, "index": self.factory, "distances": "index"}
            alone = Plan(replace(w, **own), c)
            found["neighbour table"] = self.keys * alone.search_seconds
            sample = min(CODEC_SAMPLE + HELD, self.keys)
            optimized = self.codec.startswith("OPQ")
            rounds = PQ_ROUNDS + OPQ_ROUNDS * optimized
            flops = (rounds * sample + self.keys) * 256 * w.dim * 2
            rotating = 2 * self.keys * w.dim**2 * optimized / (cores * c.list_gflops)
            found["codes"] = flops / (cores * c.pq_gflops) + rotating + w.hosts * reading
        found["evaluation"] = w.queries / self.queries_per_second
        return found

    def _quantizer_flops(self, shape: IndexShape, sample: int) -> float:
        rounds = PQ_ROUNDS + OPQ_ROUNDS * shape.optimized
        sample = min(sample, QUANTIZER_SAMPLE)
        return rounds * sample * shape.centroids_of_pq * shape.dim_of_lists * 2

    def _coarse_seconds(self, shape: IndexShape) -> float:
        """Of one core, to find the lists of a vector."""
        c = self.constants
        if shape.graph:
            return 1e-9 * HNSW_DISTANCES * shape.dim_of_lists * c.hnsw_ns
        return shape.lists * shape.dim_of_lists * 2 / (1e9 * c.assign_gflops)

    def _rotation_seconds(self, shape: IndexShape) -> float:
        flops = shape.transforms * 2 * shape.dim * shape.dim_of_lists
        return flops / (1e9 * self.constants.list_gflops)

    def _add_seconds(self, shape: IndexShape) -> float:
        """Of one core, for a key."""
        c = self.constants
        encoding = 1e-9 * shape.dim * c.encode_ns
        if shape.centroids_of_pq:
            flops = 2 * shape.centroids_of_pq * shape.dim_of_lists
            encoding = flops / (1e9 * c.pq_gflops)
        return encoding + self._coarse_seconds(shape) + self._rotation_seconds(shape)

    @cached_property
    def search_parts(self) -> dict[str, float]:
        """Seconds of one host for one query of a batch, on all its cores and its disk."""
        w, c, shape = self.wanted, self.constants, self.shape
        batch = QUERIES_AT_ONCE
        if shape is None:
            flops = 2 * self.rows * w.dim / (1e9 * c.assign_gflops)
            missing = max(0.0, 1 - self.memory / (self.rows * self.key_bytes))
            read = missing * self.rows * self.key_bytes / batch / (1e9 * c.disk_read_gbytes)
            return {"products": flops / w.cores, "disk": read}
        probes = min(w.nprobe, shape.lists)
        scanned = c.imbalance * self.rows * probes / shape.lists
        kept = entering(w.k, scanned)
        found = {"lists": self._coarse_seconds(shape) + self._rotation_seconds(shape)}
        touched = 1 - math.exp(-batch * probes / shape.lists)  # share of all lists, in a batch
        if shape.fast_scan:
            scan = scanned * c.fast_scan_ns * w.dim / 128
            found["scan"] = 1e-9 * (scan + kept * c.fast_heap_ns)
        elif batch * probes >= QUERIES_A_LIST * shape.lists:
            decode = c.decode_half_ns if shape.half or shape.exact else c.decode_sq8_ns
            decode = c.decode_pq_ns if shape.centroids_of_pq else decode
            found["decode"] = 1e-9 * self.rows * touched * shape.dim_of_lists * decode / batch
            found["products"] = 2 * scanned * shape.dim_of_lists / (1e9 * c.list_gflops)
            found["select"] = scanned * (c.scatter_ns + c.select_ns) + w.k * c.sort_ns
            found["select"] *= 1e-9
        else:
            scan = scanned * shape.dim_of_lists * c.scan_ns
            found["scan"] = 1e-9 * (scan + kept * c.heap_ns)
        found = {name: seconds / w.cores for name, seconds in found.items()}
        if not self.exact:  # read by one thread
            found["stored keys"] = 1e-9 * w.k * w.dim * c.rescore_ns
        return found | {"disk": self._disk_seconds(shape, touched)}

    @property
    def exact(self) -> bool:
        """Whether no stored keys are read for distances."""
        halves = self.shape.half and self.wanted.dtype == "fp16" and not self.shape.transforms
        return self.wanted.distances == "index" or self.shape.exact or halves

    def _disk_seconds(self, shape: IndexShape, touched: float) -> float:
        """For a query, reading what the page cache does not hold."""
        w, c = self.wanted, self.constants
        index = shape.bytes(self.rows)
        others = self.needs["search"] - index / SHARE_FOR_CACHE
        room = max(SHARE_FOR_CACHE * (self.memory - others), 1)
        missing = max(0.0, 1 - room / index)
        seconds = missing * touched * index / QUERIES_AT_ONCE / (1e9 * c.disk_read_gbytes)
        if self.exact:
            return seconds
        keys = self.rows * self.key_bytes
        missing = max(0.0, 1 - max(room - index, 0) / keys)
        distinct = self.rows * -math.expm1(-QUERIES_AT_ONCE * w.k / self.rows) / QUERIES_AT_ONCE
        reads = distinct * max(self.key_bytes / 4096, 1)
        return seconds + missing * reads / c.random_reads

    @property
    def search_seconds(self) -> float:
        """Of a query, the slowest of computing and sending."""
        sending = self.network_bytes / self.network
        return max(sum(self.search_parts.values()), sending)

    @property
    def network_bytes(self) -> float:
        """What goes into a host for a query of any host, and as much out of it: vectors of others'
        queries, and for its own at most k distances and rows from each of the others, with those to
        stored keys beside them. A share 1 / hosts of all queries is its own."""
        w = self.wanted
        rescored = 4 * (self.shape is not None and not self.exact)
        found = w.k * (4 + self.row_bytes + rescored)
        return (w.hosts - 1) / w.hosts * (4 * w.dim + found)

    @property
    def queries_per_second(self) -> float:
        """Of all hosts together, model and mixture included."""
        w, c = self.wanted, self.constants
        own = (self.lm_seconds + 1e-9 * w.k * c.mix_ns / w.cores) / w.hosts
        return 1 / (self.search_seconds + own)

    # -- what does not fit ------------------------------------------------------------------------

    @cached_property
    def shortages(self) -> dict[str, tuple[float, float]]:
        """What is needed and what there is, where that is less: of the disk, of memory by stage,
        and of time."""
        found = {}
        if self.room["at the most"] > self.disk:
            found["disk"] = self.room["at the most"], self.disk
        for stage, needed in self.needs.items():
            if needed > self.memory:
                found[f"memory for {stage}"] = needed, self.memory
        return found

    def changes(self) -> Iterator[tuple[str, "Plan"]]:
        """What could be done otherwise, a thing at a time."""
        w, lists = self.wanted, self.shape.lists if self.shape else 0
        changed: dict[str, dict[str, Any]] = {}
        if w.dtype == "fp32":
            changed["--dtype fp16"] = {"dtype": "fp16"}
        for factory in (f"IVF{lists},SQ8", f"RR{w.dim},IVF{lists},RaBitQfs") if lists else ():
            if factory != self.factory:
                changed[f"--index {factory}"] = {"index": factory}
        for fewer in (lists >> shift for shift in range(1, 6) if lists >> shift >= 1024):
            factory = re.sub(r"IVF\d+", f"IVF{fewer}", self.factory)
            changed[f"--index {factory}"] = {"index": factory}
        for k in (w.table_k // 2, w.table_k // 4, w.table_k // 8):
            if k:
                changed[f"--table_k {k}"] = {"table_k": k}
        for hosts in (w.hosts * factor for factor in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)):
            changed[f"--hosts {hosts}"] = {"hosts": hosts}
        for flags, change in changed.items():
            yield flags, Plan(replace(w, **{"index": self.factory, **change}), self.constants)

    def advice(self) -> list[dict[str, Any]]:
        """Each shortage with the changes that would end it, the smallest of each kind."""
        found = []
        options = list(self.changes()) if self.shortages else []
        for what, (needed, there) in self.shortages.items():
            kinds: dict[str, str] = {}
            for flags, plan in options:
                if what not in plan.shortages and needed > plan._need(what):
                    kind = flags.split(",")[-1] if "--index" in flags else flags.split()[0]
                    kinds.setdefault(kind, flags)
            found.append(
                {"what": what, "needed": needed, "there": there, "change": list(kinds.values())}
            )
        return found

    def _need(self, what: str) -> float:
        if what == "disk":
            return self.room["at the most"]
        return self.needs.get(what.removeprefix("memory for "), 0)

    def notes(self) -> list[str]:
        """What takes long, and what would shorten it."""
        w, shape, found = self.wanted, self.shape, []
        long = [stage for stage, seconds in self.seconds.items() if seconds > LONG]
        if "datastore" in long:
            found.append(
                "the datastore takes long: more hosts, or a GPU in each (--tokens_per_second)"
            )
        if {"index training", "index adding"} & set(long) and shape and not shape.graph:
            graph = re.sub(r"IVF(\d+)", r"IVF\1_HNSW32", self.factory)
            found.append(f"the index takes long: --index {graph} to add, faiss on GPUs to train")
        if "neighbour table" in long or "codes" in long:
            found.append("tables and codes take long: one host makes them")
        if self.search_parts["disk"] > sum(self.search_parts.values()) / 2:
            found.append(
                "searches wait for the disk: --distances index, more hosts, or more memory"
            )
        visits = QUERIES_AT_ONCE * w.nprobe
        if shape and not shape.fast_scan and visits < QUERIES_A_LIST * shape.lists:
            found.append("so few queries share a list that faiss visits them one by one")
        return found

    def described(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "wanted": vars(self.wanted),
            "index": self.factory,
            "keys_per_host": self.rows,
            "bytes_per_host": self.bytes,
            "disk_per_host": self.room,
            "memory_per_host": self.needs,
            "seconds": self.seconds,
            "search_seconds_per_query": self.search_parts,
            "queries_per_second": self.queries_per_second,
            "network_bytes_per_query": self.network_bytes,
            "does_not_fit": self.advice(),
            "notes": self.notes(),
            "constants": asdict(self.constants),
        }


def flops_of_token(parameters: float, layers: int, width: int, context: int) -> float:
    """Floating-point operations of a transformer for one token of rows of a length.

    Args:
        parameters: of its layers.
    """
    return 2 * parameters + 2 * layers * width * context


def entering(k: int, candidates: float) -> float:
    """How many of some candidates in no order are among the k nearest of those before them."""
    return min(k, candidates) * (1 + math.log(max(candidates / k, 1)))


def size_of(number: float) -> str:
    """Bytes for people.

    >>> size_of(211e9), size_of(128)
    ('211 GB', '128 B')
    """
    power = min(max(int(math.log10(max(number, 1))) // 3, 0), 5)
    return f"{number / 1000**power:.3g} {' kMGTP'[power].strip()}B"


def time_of(seconds: float) -> str:
    """Seconds for people.

    >>> time_of(5400), time_of(0.00013)
    ('1.5 h', '130 us')
    """
    units = {86400 * 2: (86400, "days"), 3600: (3600, "h"), 60: (60, "min"), 1: (1, "s")}
    units |= {1e-3: (1e-3, "ms"), 0: (1e-6, "us")}
    scale, unit = next(value for limit, value in units.items() if seconds >= limit)
    return f"{seconds / scale:.3g} {unit}"


def show(plan: Plan, console: Console) -> None:
    """Prints the plan as tables."""
    w = plan.wanted
    console.print(
        f"{plan.keys:,} keys of {w.dim} {w.dtype}, index {plan.factory}, {w.hosts} "
        f"host{'s' if w.hosts > 1 else ''} with {plan.rows:,} keys each"
    )
    groups = {
        "on the disk of a host": {k: size_of(v) for k, v in plan.bytes.items() if v},
        f"… of {size_of(plan.disk)}": {k: size_of(v) for k, v in plan.room.items()},
        f"memory of a host, of {size_of(plan.memory)}": {
            k: size_of(v) for k, v in plan.needs.items()
        },
        "time": {k: time_of(v) for k, v in plan.seconds.items()},
        "a query in a search": {k: time_of(v) for k, v in plan.search_parts.items() if v},
        "all hosts together": {
            "queries per second": f"{plan.queries_per_second:,.0f}",
            "network per query": size_of(plan.network_bytes),
        },
    }
    for title, lines in groups.items():
        table = Table(box=SIMPLE, show_header=False, title=title, title_justify="left")
        table.add_column(no_wrap=True, min_width=24)
        table.add_column(justify="right", no_wrap=True)
        for line in lines.items():
            table.add_row(*line)
        console.print(table)
    advice = plan.advice()
    console.print("Everything fits." if not advice else "What does not fit:")
    for short in advice:
        change = " or ".join(short["change"]) or "no single change ends it; several together may"
        console.print(
            f"  {short['what']}: {size_of(short['needed'])} of {size_of(short['there'])}; {change}"
        )
    for note in plan.notes():
        console.print(f"  {note}")


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Prints the plan, and writes it as JSON where that is wanted."""
    parser = ArgumentParser(prog="python -m retrieval.plan", description=__doc__)
    parser.add_class_arguments(Wanted)
    wanted: Wanted = Wanted(**parser.parse_args(args).as_dict())
    constants = Constants.read(wanted.constants) if wanted.constants else Constants()
    plan = Plan(wanted, constants)
    show(plan, Console(highlight=False))
    if wanted.output:
        wanted.output.write_text(json.dumps(plan.described(), indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
