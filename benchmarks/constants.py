"""Measures on this machine the constants that `neighborlm plan` computes with.

    python -m benchmarks.constants --output constants.json
    neighborlm plan --constants constants.json …

One thread and some hundred megabytes of disk, for less than a minute. Everything is measured with
what the programs themselves call. Of three runs the one that took the processor least counts, so
that other work on the machine matters little.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console

from benchmarks.measuring import environment, new_table
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.retrieval.engine.list_search import ListSearch
from neighborlm.retrieval.engine.loops import shift_halves, shift_lists
from neighborlm.retrieval.engine.parallel import product
from neighborlm.retrieval.engine.selection import k_smallest
from neighborlm.retrieval.memories.knn import Votes, knn_log_prob, neighbor_scores
from neighborlm.retrieval.search.index import make_index, read_index
from neighborlm.retrieval.search.rescoring import exact_distances
from neighborlm.retrieval.store.datastore import Datastore, DatastoreBuilder
from neighborlm.tools.plan_costs import HNSW_DISTANCES, Costs, entering, flops_of_token
from neighborlm.tools.plan_settings import Constants, Wanted

DIM, K, LISTS, SCANNED = 128, 1024, 1024, 5800
MODEL_CONTEXT = 512
"""Length of the rows on which the model's speed is measured."""
MEBIBYTE = 1 << 20


def quickest(function: Callable[[], object], runs: int = 3) -> float:
    """Seconds of one core in the quickest of some runs, after one to warm up."""
    function()
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def products() -> dict[str, float]:
    """Matrix products: of lists, of the model, and of faiss where it looks for the nearest list."""
    rng = np.random.default_rng(0)
    vectors, centroids, keys, queries = (
        rng.standard_normal((n, DIM), dtype=np.float32) for n in (16384, LISTS, 256, 64)
    )
    quantizer = faiss.IndexFlatL2(DIM)
    quantizer.add(centroids)
    assigning = quickest(lambda: quantizer.search(vectors, 1))
    graph = faiss.IndexHNSWFlat(DIM, 32)
    graph.add(vectors)
    walking = quickest(lambda: graph.search(vectors[:1000], 1))
    # Distances go to memory, as those of many lists are held.
    found = np.empty((200, len(queries), len(keys)), dtype=np.float32)
    listing = quickest(lambda: [product(queries, keys.T, out) for out in found])

    model = TransformerLM(20_000, 512, 2048, 4, 8, max_target_positions=MODEL_CONTEXT).eval()
    tokens = torch.randint(4, 20_000, (2, MODEL_CONTEXT))
    with torch.inference_mode():
        modelling = quickest(lambda: model.hidden(tokens), 2)
    flops = tokens.numel() * flops_of_token(4 * 12 * 512**2, 4, 512, MODEL_CONTEXT)
    return {
        "assign_gflops": 2e-9 * len(vectors) * LISTS * DIM / assigning,
        "list_gflops": 2e-9 * 200 * len(queries) * len(keys) * DIM / listing,
        "model_gflops": 1e-9 * flops / modelling,
        "hnsw_ns": 1e9 * walking / (1000 * HNSW_DISTANCES * DIM),
    }


def searching() -> dict[str, float]:
    """What else a search consists of."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, SCANNED), dtype=np.float32)
    sample = rng.standard_normal((LISTS * 16, DIM), dtype=np.float32)
    halves = sample.astype(np.float16).view(np.uint16).ravel()
    whole = np.array([0]), DIM, np.array([0, len(sample)]), np.ones((1, DIM), dtype=np.float32)
    results = np.empty_like(sample), np.empty_like(sample[:, 0])
    seconds = {"half": quickest(lambda: shift_halves(halves, *whole, *results))}
    quantizers = {"sq8": faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_8bit)}
    quantizers["pq"] = faiss.IndexPQ(DIM, DIM // 8, 8)
    quantizers["pq"].do_polysemous_training = False
    for name, quantizer in quantizers.items():
        quantizer.train(sample[:10_000])
        codes = quantizer.sa_encode(sample)
        seconds[name] = quickest(lambda q=quantizer, c=codes: norms(q.sa_decode(c)))
    encoding = quickest(lambda: quantizers["sq8"].sa_encode(sample))
    encoding_pq = quickest(lambda: quantizers["pq"].sa_encode(sample))

    scans = {}
    for factory in (f"IVF{LISTS // 16},SQfp16", f"IVF{LISTS // 16},RaBitQfs"):
        index = faiss.index_factory(DIM, factory)
        index.train(sample)
        index.add(sample)
        index.nprobe = 20
        for k in (1, K):
            scans[factory, k] = quickest(lambda i=index, k=k: i.search(sample[:200], k))
    scanned = 200 * len(sample) * 20 / (LISTS // 16)
    (plain, plain_k), (fast, fast_k) = (
        [seconds for (name, _), seconds in scans.items() if name.endswith(kind)]
        for kind in ("SQfp16", "RaBitQfs")
    )
    kept = 200 * entering(K, scanned / 200)
    scores = neighbor_scores(np.abs(rng.standard_normal((256, K), np.float32)), np.arange(K), "l2")
    words = rng.integers(0, 50_000, 1 << 22).astype(np.uint16)
    found = rng.integers(0, len(words), (256, K))

    def mix() -> None:
        hits = torch.from_numpy(words[found] == found[:, :1]) & ~scores.isneginf()
        knn_log_prob(scores, hits)

    return {
        "select_ns": 1e9 * quickest(lambda: k_smallest(values, K)) / values.size,
        "pq_gflops": 2e-9 * sample.size * 256 / encoding_pq,
        **{f"decode_{name}_ns": 1e9 * s / sample.size for name, s in seconds.items()},
        "encode_ns": 1e9 * encoding / sample.size,
        "scan_ns": 1e9 * plain / (scanned * DIM),
        "heap_ns": 1e9 * max(plain_k - plain, 0) / kept,
        "fast_scan_ns": 1e9 * fast / scanned,
        "fast_heap_ns": 1e9 * max(fast_k - fast, 0) / kept,
        "mix_ns": 1e9 * quickest(mix) / scores.numel(),
    }


def whole_search(folder: Path, constants: Constants) -> dict[str, float]:
    """What a search takes beyond its parts, for each candidate and for each neighbour; and what
    votes take for each candidate."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((1 << 16, DIM), dtype=np.float32)
    words = rng.integers(0, 50_000, len(keys)).astype(np.uint16)
    queries = keys[:4096]
    known = replace(constants, scatter_ns=0, vote_ns=0, sieve_ns=0, sort_ns=0)

    def vote(search: ListSearch, k: int) -> None:
        votes = Votes(words[: len(queries)], 1.0, "l2", words.__getitem__)
        search.vote(queries, k, votes, words.__getitem__)

    def beyond(lists: int, k: int, votes: bool = False) -> tuple[float, float]:
        """Nanoseconds a query, and its candidates."""
        wanted = Wanted(len(keys), DIM, k, f"IVF{lists},SQfp16", nprobe=23, cores=1)
        path = folder / wanted.index
        if not path.exists():
            index = make_index(DIM, wanted.index, "l2")
            index.train(keys[: 64 * lists])
            index.add(keys)
            faiss.write_index(index, str(path))
        index = read_index(path)  # which owns what is extracted from it
        ivf = faiss.downcast_index(faiss.try_extract_index_ivf(index))
        ivf.nprobe = wanted.nprobe
        search = ListSearch(ivf)
        candidates = search.sizes[search.nearest(queries)].sum(1).mean()
        imbalance = candidates / (len(keys) * wanted.nprobe / lists)
        costs = Costs(wanted, replace(known, imbalance=imbalance))
        if votes:
            seconds, parts = quickest(lambda: vote(search, k), 2), costs.evaluation_parts
        else:
            seconds, parts = quickest(lambda: search.search(queries, k), 2), costs.search_parts
        return 1e9 * max(seconds / len(queries) - sum(parts.values()), 0), candidates

    short, long = LISTS // 4, LISTS // 16
    few, candidates = beyond(short, 16)
    many, _ = beyond(short, K)
    voted, _ = beyond(short, K, votes=True)
    sieved, candidates_of_sieve = beyond(long, 16)
    return {
        "scatter_ns": few / candidates,
        "vote_ns": voted / candidates,
        "sieve_ns": sieved / candidates_of_sieve,
        "sort_ns": max(many - few, 0) / (K - 16),
    }


def norms(decoded: np.ndarray) -> None:
    """Moves what was decoded to the middle and takes its squared lengths, as a search does."""
    bounds, shifts = np.array([0, len(decoded)]), np.ones((1, decoded.shape[1]), dtype=np.float32)
    shift_lists(decoded, bounds, shifts, np.empty_like(decoded), np.empty_like(decoded[:, 0]))


def storing(folder: Path, size: int) -> dict[str, float]:
    """Writing a datastore and reading keys of it again, and the disk.

    Args:
        size: of the files, in bytes.
    """
    rng = np.random.default_rng(0)
    dim, rows = 1024, size // 2048
    keys = rng.standard_normal((4096, dim), dtype=np.float32)
    builder = DatastoreBuilder(
        folder / "store", rows, dim, "fp16", 50_000, {}, np.empty(0, np.int64)
    )
    start = time.process_time()
    for first in range(0, rows, len(keys)):
        here = np.arange(first, min(first + len(keys), rows))
        builder.write(here, keys[: len(here)], here % 50_000)
    builder.sync()
    builder.finish()
    writing = time.process_time() - start

    store = Datastore.open(folder / "store")
    found = rng.integers(0, rows, (16, K))
    rescoring = quickest(lambda: exact_distances(keys[:16], found, store, "l2"))

    path, block = folder / "file", rng.bytes(16 * MEBIBYTE)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    disk_writing = time.perf_counter() - start
    size = path.stat().st_size
    with open(path, "rb", buffering=0) as file:
        forget(file.fileno())
        start = time.perf_counter()
        while file.read(len(block)):
            pass
        reading = time.perf_counter() - start
        forget(file.fileno())
        places = rng.integers(0, size // 4096, 2000) * 4096
        start = time.perf_counter()
        for place in places.tolist():
            os.pread(file.fileno(), 4096, place)
        jumping = time.perf_counter() - start
    return {
        "write_gbytes": 1e-9 * rows * dim * 2 / writing,
        "rescore_ns": 1e9 * rescoring / (found.size * dim),
        "disk_write_gbytes": 1e-9 * size / disk_writing,
        "disk_read_gbytes": 1e-9 * size / reading,
        "random_reads": len(places) / jumping,
    }


def forget(descriptor: int) -> None:
    """Has the page cache drop a file."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@exit_with_one_sentence
def run(output: Path, work_dir: Path | None = None, megabytes: int = 256) -> None:
    """Measures, prints a table and writes it as JSON.

    Args:
        output: JSON file.
        work_dir: on the disk that is measured; by default where temporary files lie.
        megabytes: of the files that are written there.
    """
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    with TemporaryDirectory(dir=work_dir) as folder:
        measured = storing(Path(folder), megabytes * MEBIBYTE) | products() | searching()
        measured |= whole_search(Path(folder), replace(Constants(), **measured))
    constants = asdict(Constants()) | measured
    table = new_table("constants of one core", "here", "default")
    for name, default in asdict(Constants()).items():
        table.add_row(name, f"{constants[name]:.3g}", f"{default:.3g}")
    Console().print(table)
    output.write_text(json.dumps({**environment(1), "constants": constants}, indent=1) + "\n")


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
