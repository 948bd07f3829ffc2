"""What `neighborlm plan` goes by: the memory that is wanted, and the machine's rates."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neighborlm.common.errors import InputError


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
        nprobe: inverted lists to visit; `--knn.nprobe auto` visits 10 to 20 on average.
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


@dataclass(frozen=True)
class Constants:
    """Rates of one core and of one disk.

    Measured by benchmarks/constants.py on one core of an AMD EPYC (Zen 4, AVX-512) with a virtual
    disk, in fp32 and at width 128, unless said otherwise. That program's JSON replaces them.

    Args:
        list_gflops: products of some queries with a list (`Visit._measure`).
        assign_gflops: faiss looking for the nearest of 1024 centroids, as in training and adding.
        pq_gflops: faiss looking for the nearest of 256 centroids of PQ.
        model_gflops: the LM without softmax, width 512.
        hnsw_ns: per value of 512 distances, where a graph finds the list.
        select_ns: per candidate, choosing 1024 of 5800 (`k_smallest`).
        scatter_ns: per candidate, bringing distances from lists to queries.
        vote_ns: per candidate, finding how far the 1024 nearest are and weighing those, where
            nobody asks which they are.
        sieve_ns: per candidate, dropping all but the nearest where there are many (lists of 1024);
            nothing where products of bytes spare more of `list_gflops` than that takes.
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
        mix_ns: per neighbour, its value and its part of p_kNN, where it is put together.
        imbalance: how much longer the lists visited are than the mean list; 5,755 candidates for
            an expected 5,086 in IVF1024 on keys of an LM.
        write_gbytes: of keys a second into a datastore, rounded, checked and with checksums.
        disk_write_gbytes: per second.
        disk_read_gbytes: per second, in order.
        random_reads: of 4 KiB a second by one thread.
    """

    list_gflops: float = 80.0
    assign_gflops: float = 85.0
    pq_gflops: float = 23.0
    model_gflops: float = 82.0
    hnsw_ns: float = 0.4
    select_ns: float = 0.93
    scatter_ns: float = 1.4
    vote_ns: float = 2.2
    sieve_ns: float = 0.0
    sort_ns: float = 17.0
    decode_half_ns: float = 0.24
    decode_sq8_ns: float = 0.32
    decode_pq_ns: float = 0.58
    encode_ns: float = 1.3
    scan_ns: float = 0.077
    heap_ns: float = 98.0
    fast_scan_ns: float = 7.7
    fast_heap_ns: float = 93.0
    rescore_ns: float = 0.57
    mix_ns: float = 10.0
    imbalance: float = 1.13
    write_gbytes: float = 0.5
    disk_write_gbytes: float = 0.4
    disk_read_gbytes: float = 1.7
    random_reads: float = 17000.0

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
