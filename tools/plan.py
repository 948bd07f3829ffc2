"""`neighborlm plan`: the bytes that a datastore and all that is made of it take on the disk and in
the memory of each host and on the network, before anything is run; and what would make them fit.

docs/scaling.md has the formulas in a table. How long each stage takes is not predicted.
"""

import math
import re
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import faiss
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from neighborlm.common.errors import InputError
from neighborlm.programs.arguments import ToolParser
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.programs.settings import NeighborSettings
from neighborlm.retrieval.memories.cache import TOP
from neighborlm.retrieval.neighbors.codec import check_codec
from neighborlm.retrieval.search.building import PART_BYTES, sample_size
from neighborlm.retrieval.search.index import INDEX_KINDS, auto_factory, make_index
from neighborlm.retrieval.store.checksums import rows_of_chunk
from neighborlm.retrieval.store.datastore import DTYPES

HEADER, MANIFEST = 128, 2048
"""Bytes in front of the array in a .npy file, and of a manifest, about."""
FAST_SCAN_BLOCK = 32
"""Vectors that fast-scan lists keep together; half of the last block of a list is empty."""
PROGRAM = 1 << 30
"""Memory of Python, torch and faiss themselves and of what a batch needs."""
QUERIES, BUFFER = 8192, 64 << 20
"""Queries that are searched at once, and memory for their distances."""
PAGE_CACHE = 0.9
"""Share of the memory that the page cache can use when all programs have theirs."""


@dataclass(frozen=True)
class Wanted:
    """What is planned.

    Args:
        tokens: tokens of the training text, each of which gives a key; such as 103e6.
        dim: width of the keys, that is of the language model.
        k: neighbours of a query, as in `--knn.k`.
        index: as in `--knn.index`: `auto`, `flat`, `torch` or a faiss factory string with inverted
            lists; try another one where memory binds.
        hosts: machines, each of which holds a shard of the datastore; more where one is too small.
        memory: of one host, such as 64GB or 60GiB.
        disk: of one host, such as 2TB.
        dtype: of the stored keys; fp32 only where half precision is known to hurt.
        vocab: size of the vocabulary; a value takes one byte up to 256 words, two up to 65,536,
            else four.
        distances: as in `--knn.distances`; `index` reads no stored keys and sends less.
        table_k: neighbours of a token in the tables of a GNN-LM; 0 for kNN-LM alone.
        codec: faiss factory string of a GNN-LM's features; by default OPQ and PQ with a byte for
            eight dimensions.
        cache: plan for `--knn.cache` too, which keeps all that is retrieved.
        queries: tokens that are evaluated, all of which such a cache keeps.
        parameters: of the language model's layers; by default those of 16 layers, as in the papers.
        output: JSON file for the plan; none by default.
    """

    tokens: float
    dim: int = 1024
    k: int = 1024
    index: str = "auto"
    hosts: int = 1
    memory: str = "64GB"
    disk: str = "2TB"
    dtype: Literal["fp16", "fp32"] = "fp16"
    vocab: int = 267744
    distances: Literal["exact", "index"] = "exact"
    table_k: int = 0
    codec: str | None = None
    cache: bool = False
    queries: float = 250e3
    parameters: float | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "dim", "k", "hosts", "vocab"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; expected at least 1")
        if self.table_k < 0 or self.queries < 0:
            raise InputError("--table_k and --queries: expected no less than 0")
        if self.k > self.tokens:
            raise InputError(f"--k is {self.k}, but there are only {self.tokens:.0f} keys")

    @property
    def keys(self) -> int:
        """In the shard of a host."""
        return math.ceil(self.tokens / self.hosts)

    @property
    def key_bytes(self) -> int:
        """Of a stored key."""
        return self.dim * DTYPES[self.dtype].itemsize

    @property
    def value_bytes(self) -> int:
        """Of the id of a token."""
        return np.min_scalar_type(self.vocab - 1).itemsize

    @property
    def row_bytes(self) -> int:
        """Of the number of a row, in a neighbour table and on the network."""
        return max(np.min_scalar_type(-math.ceil(self.tokens)).itemsize, 2)

    @property
    def factory(self) -> str:
        """The index that is built: `auto` goes by all keys and a quarter of one host's memory."""
        quarter = int(amount(self.memory, "memory") / 4)
        auto = auto_factory(math.ceil(self.tokens), self.dim, quarter)
        return auto if self.index == "auto" else self.index

    @property
    def shape(self) -> "Shape | None":
        """Of the index; None where the keys themselves are searched."""
        return None if self.factory in INDEX_KINDS else index_shape(self.dim, self.factory)


class Shape(NamedTuple):
    """What decides the size of an index.

    Attributes:
        lists: how many.
        centroids: bytes of theirs.
        code: bytes of a vector.
        fast_scan: whether lists are filled up to blocks, and stay in memory while they are built.
        exact: dtypes of stored keys to which its distances are exact.
        front: bytes of all but the lists: centroids, rotations, codebooks.
    """

    lists: int
    centroids: int
    code: int
    fast_scan: bool
    exact: tuple[str, ...]
    front: int

    def bytes_of(self, keys: int) -> float:
        """Of the index of so many keys: codes, row numbers of 8 bytes, and what is in front."""
        padding = self.lists * FAST_SCAN_BLOCK / 2 if self.fast_scan else 0
        return keys * 8 + (keys + padding) * self.code + self.front


@lru_cache
def index_shape(dim: int, factory: str) -> Shape:
    """The shape of an index, read from an empty one.

    Raises:
        InputError: faiss does not know the factory string, or it has no inverted lists.
    """
    index = make_index(dim, factory, "l2")
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        raise InputError(f"--index is {factory}; expected auto, flat, torch or inverted lists")
    ivf = faiss.downcast_index(ivf)
    rotations = index.chain.size() if isinstance(index, faiss.IndexPreTransform) else 0
    graph = isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexHNSW)
    codebook = ivf.pq.ksub * ivf.d if hasattr(ivf, "pq") else 0
    front = 4 * (ivf.nlist * ivf.d + rotations * dim * ivf.d + codebook) + 1024
    front += ivf.nlist * (24 + 272 * graph)  # 64 links in the graph of HNSW32
    halves = not rotations and re.search(r",SQfp16$", factory)
    exact = ("fp16",) * bool(halves) + ("fp16", "fp32") * isinstance(ivf, faiss.IndexIVFFlat)
    fast_scan = isinstance(ivf, faiss.IndexIVFFastScan)
    return Shape(ivf.nlist, 4 * ivf.nlist * ivf.d, ivf.code_size, fast_scan, exact, front)


# -- formulas ------------------------------------------------------------------------------------


def on_disk(w: Wanted) -> dict[str, float]:
    """Bytes of each product on the disk of a host."""
    chunks = -(-w.keys // rows_of_chunk(w.key_bytes))
    found = {
        "keys": HEADER + w.keys * w.key_bytes,
        "values": HEADER + w.keys * w.value_bytes,
        "checksums and manifest": HEADER + chunks * 16 + MANIFEST,
        "index": w.shape.bytes_of(w.keys) + MANIFEST if w.shape else 0,
    }
    if w.table_k:
        codec = NeighborSettings(codec=w.codec).codec_for(w.dim)
        check_codec(codec, w.dim)
        code = faiss.index_factory(w.dim, codec).sa_code_size()
        codebook = 4 * 256 * w.dim + 4 * w.dim**2 * codec.startswith("OPQ")
        found["neighbour table"] = HEADER + MANIFEST + w.keys * w.table_k * w.row_bytes
        found["codes"] = HEADER + MANIFEST + w.keys * code + codebook
    if w.cache:
        of_neighbor = 4 + w.value_bytes + np.min_scalar_type(-math.ceil(w.tokens)).itemsize
        row = 8 + w.value_bytes + w.k * of_neighbor + TOP * (4 + w.value_bytes)
        found["cache"] = 8 * HEADER + MANIFEST + math.ceil(w.queries) * row
    return found


def most_on_disk(w: Wanted) -> float:
    """Bytes on the disk of a host at any time: an index whose lists are merged from parts is there
    twice, and a datastore that is being written has a mark for each row."""
    products = on_disk(w)
    datastore = products["keys"] + products["values"] + products["checksums and manifest"]
    in_parts = w.shape and not w.shape.fast_scan and w.shape.bytes_of(w.keys) > PART_BYTES
    merging = datastore + 2 * products["index"] if in_parts else 0
    return max(sum(products.values()), merging, datastore + w.keys)


def in_memory(w: Wanted) -> dict[str, float]:
    """Bytes of memory of a host in each stage; of a mapped index what should stay in the page
    cache."""
    model = PROGRAM + 4 * ((w.parameters or 12 * 16 * w.dim**2) + w.vocab * w.dim / 4)
    search = model + QUERIES * (4 * w.dim + 24 * w.k)
    shape = w.shape
    if shape is None:
        return {"datastore": model, "search": search + 2 * BUFFER}
    index = shape.bytes_of(w.keys)
    sample = sample_size(shape.lists, math.ceil(w.tokens)) * (4 * w.dim + w.key_bytes)
    added = index if shape.fast_scan else min(index, PART_BYTES)
    decoded = 0 if shape.fast_scan else shape.centroids + BUFFER
    return {
        "datastore": model,
        "index training": PROGRAM + shape.front + sample,
        "index adding": PROGRAM + shape.front + added,
        "search": search + decoded + index / PAGE_CACHE,
    }


def sent(w: Wanted) -> float:
    """Bytes that a query costs each host, inwards and as many outwards: the vectors of the others'
    queries, and for its own at most k distances, rows and values from each of the others, with
    distances to stored keys beside them. A share 1 / hosts of all queries is its own."""
    of_keys = w.factory == "torch" or (w.shape is not None and w.dtype in w.shape.exact)
    again = 0 if of_keys or w.distances == "index" else 4
    return (w.hosts - 1) / w.hosts * (4 * w.dim + w.k * (4 + w.row_bytes + w.value_bytes + again))


# -- what does not fit -----------------------------------------------------------------------------


def shortages(w: Wanted) -> dict[str, tuple[float, float]]:
    """Bytes that are needed and that there are, where there are too few."""
    needs = {"disk": (most_on_disk(w), amount(w.disk, "disk"))}
    for stage, needed in in_memory(w).items():
        needs[f"memory for {stage}"] = needed, amount(w.memory, "memory")
    return {what: (needed, there) for what, (needed, there) in needs.items() if needed > there}


def advice(w: Wanted) -> list[dict[str, Any]]:
    """Each shortage with the changes that would end it alone, the smallest of each kind."""
    factory, kinds = w.factory, [("dtype", ["fp16"])]
    if w.shape:
        lists = w.shape.lists
        smaller = [f"IVF{lists},SQ8", f"RR{w.dim},IVF{lists},RaBitQfs"]
        fewer = [lists >> shift for shift in range(1, 6) if lists >> shift >= 1024]
        kinds += [("index", [x]) for x in smaller]
        kinds.append(("index", [re.sub(r"IVF\d+", f"IVF{n}", factory) for n in fewer]))
    kinds.append(("table_k", [w.table_k // part for part in (2, 4, 8) if w.table_k // part]))
    kinds.append(("hosts", [w.hosts * n for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)]))
    found = []
    for what, (needed, there) in shortages(w).items():
        changes = []
        for flag, values in kinds:
            # Of another number of hosts `auto` does not choose anew.
            others = ((x, replace(w, **{"index": factory, flag: x})) for x in values)
            ends = next((x for x, other in others if what not in shortages(other)), None)
            changes += [] if ends is None else [f"--{flag} {ends}"]
        found.append({"what": what, "needed": needed, "there": there, "change": changes})
    return found


# -- the command -----------------------------------------------------------------------------------

UNITS = {"": 1} | {name: 1000**power for power, name in enumerate("KMGTP", start=1)}
UNITS |= {f"{name}i": 1024**power for power, name in enumerate("KMGTP", start=1)}


def amount(text: str, flag: str) -> float:
    """A number of bytes.

    Raises:
        InputError: it is none.

    >>> amount("64GB", "memory"), amount("1.5 GiB", "memory")
    (64000000000.0, 1610612736.0)
    """
    match = re.fullmatch(r"([0-9.e+]+) *([KMGTP]?i?)B?", text.strip())
    try:
        return float(match[1]) * UNITS[match[2]]
    except (TypeError, ValueError, KeyError):
        raise InputError(f"--{flag} is {text!r}; expected such as 64GB") from None


def size_of(number: float) -> str:
    """Bytes for people.

    >>> size_of(211e9), size_of(128)
    ('211 GB', '128 B')
    """
    power = min(max(int(math.log10(max(number, 1))) // 3, 0), 5)
    return f"{number / 1000**power:.3g} {' kMGTP'[power].strip()}B"


def show(w: Wanted, console: Console) -> None:
    """Prints the figures as tables, then what does not fit."""
    hosts = f"{w.hosts} hosts with {w.keys:,} keys each" if w.hosts > 1 else "1 host"
    keys = f"{math.ceil(w.tokens):,} keys of {w.dim} {w.dtype}"
    console.print(f"{keys}, index {w.factory}, {hosts}")
    totals = {"stays": sum(on_disk(w).values()), "at the most": most_on_disk(w)}
    groups = {
        f"disk of a host, of {size_of(amount(w.disk, 'disk'))}": on_disk(w) | totals,
        f"memory of a host, of {size_of(amount(w.memory, 'memory'))}": in_memory(w),
        "network": {"in and out, for a query": sent(w)},
    }
    for title, lines in groups.items():
        table = Table(box=SIMPLE, show_header=False, title=title, title_justify="left")
        table.add_column(no_wrap=True, min_width=24)
        table.add_column(justify="right", no_wrap=True)
        for name, number in lines.items():
            table.add_row(name, size_of(number))
        console.print(table)
    short = advice(w)
    console.print("What does not fit:" if short else "Everything fits.")
    for s in short:
        change = " or ".join(s["change"]) or "no single change ends it; several together may"
        console.print(f"  {s['what']}: {size_of(s['needed'])} of {size_of(s['there'])}; {change}")


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Prints the plan, and writes it as JSON with `--output`."""
    parser = ToolParser(
        prog="neighborlm plan",
        description="The bytes that a datastore and all that is made of it take on the disk and in "
        "the memory of each host and on the network, before anything is run; and what would make "
        "them fit where they do not. docs/scaling.md has the formulas.",
    )
    parser.add_class_arguments(Wanted)
    w = Wanted(**parser.parse_args(args).as_dict())
    check_writable(w.output, "--output")
    show(w, Console(highlight=False, markup=False))
    if w.output:
        figures = {
            "wanted": asdict(w),
            "index": w.factory,
            "keys_per_host": w.keys,
            "bytes_per_host": on_disk(w),
            "most_on_disk": most_on_disk(w),
            "memory_per_host": in_memory(w),
            "network_bytes_per_query": sent(w),
            "does_not_fit": advice(w),
        }
        write_all({w.output: as_json(figures)})
