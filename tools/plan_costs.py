"""The formulas of `neighborlm plan`: bytes on the disk and in the memory of a host, and
seconds of a stage and of a query. docs/scaling.md has them in a table.

Bytes are those of the files that the stages write; time is of operations, at measured rates.
"""

import math
from dataclasses import replace
from functools import cached_property

import faiss
import numpy as np

from neighborlm.common.errors import InputError
from neighborlm.retrieval.engine.list_search import KEPT_BYTES, QUERIES_A_LIST, sieve_pays
from neighborlm.retrieval.engine.sieve import Sieve
from neighborlm.retrieval.engine.visit import BUFFER_BYTES
from neighborlm.retrieval.neighbors.codec import HELD
from neighborlm.retrieval.neighbors.codec import SAMPLE as CODEC_SAMPLE
from neighborlm.retrieval.neighbors.tables import QUERIES_AT_ONCE
from neighborlm.retrieval.search.building import PART_BYTES, sample_size
from neighborlm.retrieval.search.index import NOT_BUILT, auto_factory, make_index
from neighborlm.retrieval.store.checksums import rows_of_chunk
from neighborlm.retrieval.store.datastore import BLOCK_BYTES, DTYPES
from neighborlm.tools.plan_settings import Constants, Wanted, amount

HEADER = 128
"""Bytes in front of an array in a .npy file."""
MANIFEST = 2048
"""Bytes of a manifest, about."""
HNSW_DISTANCES = 512
"""Distances that faiss computes to find a list through a graph: 16 candidates of 32 neighbours."""
KMEANS_ROUNDS, PQ_ROUNDS, OPQ_ROUNDS = 10, 13, 200
"""Passes of faiss over the sample for lists, for PQ (25, each half as long as an encoding), and for
PQ once more where OPQ rotates."""
QUANTIZER_SAMPLE = 65536
"""What faiss trains PQ on at most: 256 vectors for each of 256 centroids."""
BLOCK_OF_CODES = 32
"""Vectors that fast-scan lists keep together; half of the last block of a list is empty."""
KEPT = 2
"""Candidates that a sieve keeps for each neighbour, about."""
SHARE_FOR_CACHE = 0.9
"""Of the memory, what the page cache can use when all programs have theirs."""
WORKING_BYTES = 1 << 30
"""Memory of Python, torch and faiss themselves and of what a batch needs."""
STARTING = 0.02
"""Seconds to make a datastore's files and to mark it complete."""


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
        self.floats = isinstance(ivf, faiss.IndexIVFFlat)
        scalar = isinstance(ivf, faiss.IndexIVFScalarQuantizer)
        self.halves = scalar and ivf.sq.qtype == faiss.ScalarQuantizer.QT_fp16

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


class Costs:
    """What the memory that is wanted takes, of one host of those that take part.

    Args:
        wanted: see `Wanted`.
        constants: see `Constants`.

    Raises:
        InputError: a value cannot be right.
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
        self.row_bytes = max(np.min_scalar_type(-self.keys).itemsize, 2)  # of a row's number
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

    @property
    def parameters(self) -> float:
        """Of the LM's layers."""
        w = self.wanted
        return w.parameters or 12 * w.layers * w.dim**2

    @property
    def training_sample(self) -> int:
        """Keys that the index is trained on."""
        return sample_size(self.shape.lists, self.keys)

    @property
    def in_parts(self) -> bool:
        """Whether the index is built in parts that are then merged."""
        shape = self.shape
        return bool(shape and not shape.fast_scan and shape.bytes(self.rows) > PART_BYTES)

    @property
    def rescores(self) -> bool:
        """Whether distances (l2) are computed again, from the stored keys of what was found."""
        shape = self.shape
        if self.wanted.distances == "index":
            return False
        if shape is None:
            return self.factory == "flat"  # see FlatRetriever
        as_they_are = shape.halves and self.wanted.dtype == "fp16" and not shape.transforms
        return not (shape.floats or as_they_are)

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
            found["neighbour table"] = HEADER + MANIFEST + rows * w.table_k * self.row_bytes
            found["codes"] = HEADER + MANIFEST + rows * self.code_bytes + pq
        if w.cache:
            row = 4 + self.value_bytes + w.k * (4 + self.value_bytes)
            found["cache"] = 4 * HEADER + MANIFEST + math.ceil(w.queries) * row
        return found

    @cached_property
    def disk_needs(self) -> dict[str, float]:
        """Bytes on the disk: what stays, and what is there at the most."""
        stays = sum(self.bytes.values())
        later = sum(self.bytes.get(name, 0) for name in ("neighbour table", "codes", "cache"))
        index = self.bytes["index"]
        dumping = stays - later - index + self.rows  # with a mark for each row that is written
        merging = stays - later + (index if self.in_parts else 0)
        return {"stays": stays, "at the most": max(stays, merging, dumping)}

    @cached_property
    def memory_needs(self) -> dict[str, float]:
        """Memory by stage; of a mapped index what should stay in the page cache."""
        w, shape = self.wanted, self.shape
        model = 4 * (self.parameters + w.vocab * w.dim / 4) + WORKING_BYTES
        batch = QUERIES_AT_ONCE * (w.dim * 4 + w.k * 24)
        if shape is None:
            return {"datastore": model, "search": model + batch + 2 * BLOCK_BYTES}
        index, front = shape.bytes(self.rows), shape.bytes_in_front
        sample = self.training_sample * (4 * w.dim + self.key_bytes)
        adding = index if shape.fast_scan else min(PART_BYTES, index)
        decoded = 0 if shape.fast_scan else shape.lists * shape.dim_of_lists * 4 + BUFFER_BYTES
        return {
            "datastore": model,
            "index training": sample + front + WORKING_BYTES,
            "index adding": adding + front + WORKING_BYTES,
            "search": model + batch + decoded + index / SHARE_FOR_CACHE,
        }

    @property
    def network_bytes(self) -> float:
        """What goes into a host for a query of any host, and as much out of it: vectors of others'
        queries, and for its own at most k distances, rows and values from each of the others, with
        distances to stored keys beside them. A share 1 / hosts of all queries is its own."""
        w = self.wanted
        answer = w.k * (4 + self.row_bytes + self.value_bytes + 4 * self.rescores)
        return (w.hosts - 1) / w.hosts * (4 * w.dim + answer)

    # -- time of the stages -----------------------------------------------------------------------

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of each stage, in the order in which they are run."""
        found = {"datastore": self._dumping_seconds}
        if self.shape is not None:
            found["index training"] = self._training_seconds
            found["index adding"] = self._adding_seconds
        if self.wanted.table_k:
            found["neighbour table"] = self._table_seconds
            found["codes"] = self._codes_seconds
        found["evaluation"] = self.wanted.queries / self.queries_per_second
        return found

    @cached_property
    def lm_seconds(self) -> float:
        """Of a host for a token, what is read again as context included."""
        w = self.wanted
        overlap = w.tokens_per_sample / (w.tokens_per_sample - w.context_window)
        if w.tokens_per_second:
            return overlap / w.tokens_per_second
        flops = flops_of_token(self.parameters, w.layers, w.dim, w.tokens_per_sample)
        return overlap * flops / (1e9 * self.constants.model_gflops * w.cores)

    @property
    def _dumping_seconds(self) -> float:
        """The LM reads; keys are written beside it."""
        c = self.constants
        written = self.rows * self.key_bytes / 1e9 / min(c.write_gbytes, c.disk_write_gbytes)
        return STARTING + max(self.rows * self.lm_seconds, written)

    @property
    def _reading_seconds(self) -> float:
        """All keys of a host once, where the page cache does not hold them."""
        keys = self.rows * self.key_bytes
        return keys / (1e9 * self.constants.disk_read_gbytes) if keys > self.memory else 0

    @property
    def _training_seconds(self) -> float:
        """k-means for the lists, the quantiser of PQ, reading the sample."""
        w, c, shape, sample = self.wanted, self.constants, self.shape, self.training_sample
        kmeans = KMEANS_ROUNDS * sample * shape.lists * shape.dim_of_lists * 2
        rounds = PQ_ROUNDS + OPQ_ROUNDS * shape.optimized
        assigned = rounds * min(sample, QUANTIZER_SAMPLE)
        quantizer = assigned * shape.centroids_of_pq * shape.dim_of_lists * 2
        reads = sample if self.keys * self.key_bytes > self.memory else 0
        computing = (kmeans / c.assign_gflops + quantizer / c.pq_gflops) / (1e9 * w.cores)
        return computing + reads / c.random_reads

    @property
    def _adding_seconds(self) -> float:
        """Finding the list of each key, encoding it, reading keys and writing the index."""
        w, c, shape = self.wanted, self.constants, self.shape
        encoding = 1e-9 * shape.dim * c.encode_ns
        if shape.centroids_of_pq:
            encoding = 1e-9 * 2 * shape.centroids_of_pq * shape.dim_of_lists / c.pq_gflops
        computing = self.rows * (encoding + self._choosing_seconds) / w.cores
        written = (3 if self.in_parts else 1) * shape.bytes(self.rows)
        return computing + self._reading_seconds + written / (1e9 * c.disk_write_gbytes)

    @property
    def _table_seconds(self) -> float:
        """A host searches all shards for its own tokens, by the index's own distances, and looks
        for the lists in each shard anew."""
        w = self.wanted
        own = {"k": w.table_k, "hosts": 1, "index": self.factory, "distances": "index"}
        whole = Costs(replace(w, **own), self.constants).search_parts
        return self.rows * (sum(whole.values()) + (w.hosts - 1) * whole.get("lists", 0))

    @property
    def _codes_seconds(self) -> float:
        """One host trains a codec on a sample of all keys; each encodes its own."""
        w, c = self.wanted, self.constants
        optimized = self.codec.startswith("OPQ")
        sample = min(CODEC_SAMPLE + HELD, self.keys)
        rounds = PQ_ROUNDS + OPQ_ROUNDS * optimized
        assigning = (rounds * sample + self.rows) * 256 * w.dim * 2 / c.pq_gflops
        rotating = self.rows * w.dim**2 * 2 * optimized / c.list_gflops
        return (assigning + rotating) / (1e9 * w.cores) + self._reading_seconds

    # -- time of a search -------------------------------------------------------------------------

    @property
    def queries_per_second(self) -> float:
        """Of all hosts together, model and mixture included."""
        w, c = self.wanted, self.constants
        mixing = 0 if self.votes else 1e-9 * w.k * c.mix_ns / w.cores
        return 1 / (self.search_seconds + (self.lm_seconds + mixing) / w.hosts)

    @property
    def votes(self) -> bool:
        """Whether an evaluation weighs all that is visited in its place, and need not put the
        neighbours of a query together (`Visit.vote`)."""
        w = self.wanted
        asked_for = self.rescores or w.cache or w.hosts > 1
        in_lists = self.shape is not None and self.shares_lists
        return in_lists and not asked_for and not sieve_pays(self.candidates, w.k)

    @property
    def search_seconds(self) -> float:
        """Of a query, the slowest of computing and sending."""
        return max(sum(self.evaluation_parts.values()), self.network_bytes / self.network)

    @cached_property
    def evaluation_parts(self) -> dict[str, float]:
        """Seconds of one host for one query of an evaluation, on all its cores and its disk."""
        if not self.votes:
            return self.search_parts
        voting = 1e-9 * self.candidates * self.constants.vote_ns / self.wanted.cores
        others = {name: s for name, s in self.search_parts.items() if name != "select"}
        return others | {"vote": voting}

    @cached_property
    def search_parts(self) -> dict[str, float]:
        """The same of a search that says which the neighbours are."""
        w, c = self.wanted, self.constants
        computing = self._search_of_keys() if self.shape is None else self._search_of_lists()
        if self.rescores:
            computing["stored keys"] = 1e-9 * w.k * w.dim * c.rescore_ns
        found = {name: seconds / w.cores for name, seconds in computing.items()}
        return found | {"disk": self._disk_seconds}

    def _search_of_keys(self) -> dict[str, float]:
        """Of one core, where every key is read."""
        return {"products": 2 * self.rows * self.wanted.dim / (1e9 * self.constants.assign_gflops)}

    def _search_of_lists(self) -> dict[str, float]:
        """Of one core, in inverted lists."""
        w, c, shape = self.wanted, self.constants, self.shape
        candidates = self.candidates
        entered = entering(w.k, candidates)
        found = {"lists": self._choosing_seconds}
        if shape.fast_scan:
            scan = candidates * c.fast_scan_ns * w.dim / 128
            return found | {"scan": 1e-9 * (scan + entered * c.fast_heap_ns)}
        if not self.shares_lists:
            scan = candidates * shape.dim_of_lists * c.scan_ns
            return found | {"scan": 1e-9 * (scan + entered * c.heap_ns)}
        decoded = self.rows * self.touched * shape.dim_of_lists / self.sharing
        kept, select = candidates, w.k * c.sort_ns
        if sieve_pays(candidates, w.k):
            kept, select = KEPT * w.k, select + candidates * c.sieve_ns
        select += kept * (c.scatter_ns + c.select_ns)
        return found | {
            "decode": 1e-9 * decoded * self._decode_ns,
            "products": 2 * candidates * shape.dim_of_lists / (1e9 * c.list_gflops),
            "select": 1e-9 * select,
        }

    @property
    def _decode_ns(self) -> float:
        """Of one core, per value of a list."""
        c, shape = self.constants, self.shape
        if shape.centroids_of_pq:
            return c.decode_pq_ns
        return c.decode_half_ns if shape.halves or shape.floats else c.decode_sq8_ns

    @property
    def probes(self) -> int:
        """Lists that a query visits."""
        return min(self.wanted.nprobe, self.shape.lists)

    @property
    def candidates(self) -> float:
        """Vectors in the lists that a query visits."""
        return self.constants.imbalance * self.rows * self.probes / self.shape.lists

    @property
    def sharing(self) -> float:
        """Queries of a batch that share what is decoded: whose distances are held at a time."""
        k, candidates = self.wanted.k, self.candidates
        held = BUFFER_BYTES / (4 * max(candidates, k))
        if sieve_pays(candidates, k):
            held = KEPT_BYTES / Sieve(None, k, int(candidates), False).bytes_a_query
        return min(max(held, 1), QUERIES_AT_ONCE)

    @property
    def touched(self) -> float:
        """Share of all lists that they visit, if these were any; queries that lie near one another
        visit fewer."""
        return -math.expm1(-self.sharing * self.probes / self.shape.lists)

    @property
    def shares_lists(self) -> bool:
        """Whether so many queries visit a list that it is decoded once for all (`ListSearch`)."""
        visits = QUERIES_AT_ONCE * self.probes
        return not self.shape.fast_scan and visits >= QUERIES_A_LIST * self.shape.lists

    @property
    def _choosing_seconds(self) -> float:
        """Of one core, to find the lists of a vector, which is rotated before."""
        c, shape = self.constants, self.shape
        rotating = 1e-9 * shape.transforms * 2 * shape.dim * shape.dim_of_lists / c.list_gflops
        if shape.graph:
            return rotating + 1e-9 * HNSW_DISTANCES * shape.dim_of_lists * c.hnsw_ns
        return rotating + 1e-9 * shape.lists * shape.dim_of_lists * 2 / c.assign_gflops

    @property
    def _disk_seconds(self) -> float:
        """For a query, reading what the page cache does not hold: keys or lists in order for a
        batch, and stored keys at random."""
        w, c, shape = self.wanted, self.constants, self.shape
        keys = self.rows * self.key_bytes
        in_order = 1e9 * c.disk_read_gbytes
        if shape is None:
            return max(0.0, keys - self.memory) / (in_order * QUERIES_AT_ONCE)
        index = shape.bytes(self.rows)
        others = self.memory_needs["search"] - index / SHARE_FOR_CACHE
        cache = max(SHARE_FOR_CACHE * (self.memory - others), 1)
        seconds = max(0.0, index - cache) * self.touched / (in_order * self.sharing)
        if not self.rescores:
            return seconds
        missing = max(0.0, 1 - max(cache - index, 0) / keys)
        distinct = self.rows * -math.expm1(-QUERIES_AT_ONCE * w.k / self.rows) / QUERIES_AT_ONCE
        reads = distinct * max(self.key_bytes / 4096, 1)
        return seconds + missing * reads / c.random_reads


def flops_of_token(parameters: float, layers: int, width: int, context: int) -> float:
    """Floating-point operations of a transformer for one token of rows of a length.

    Args:
        parameters: of its layers.
    """
    return 2 * parameters + 2 * layers * width * context


def entering(k: int, candidates: float) -> float:
    """How many of some candidates in no order are among the k nearest of those before them."""
    return min(k, candidates) * (1 + math.log(max(candidates / k, 1)))
