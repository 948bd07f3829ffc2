"""Search of a datastore in shards by one process and by several on this machine: queries a second,
milliseconds that cores spend on one, whether the same is found, and what a rank sends, beside what
it should.

    python -m benchmarks.distributed --output distributed.json

All processes share the cores and the memory of one machine, so what is seen is what their working
together costs; a cluster adds cores and memory with every rank, and the speed of its network.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from rich.console import Console

from neighborlm.common.progress import progress_bars
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.retrieval.cluster.distributed import TOLERANCE, local_k, open_distributed
from neighborlm.retrieval.cluster.ranks import HEADER_BYTES
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import Search, is_factory
from neighborlm.retrieval.store.datastore import BLOCK_BYTES, Datastore
from neighborlm.retrieval.store.sharded_builder import new_datastore
from neighborlm.retrieval.store.shards import Kind

PLACEMENTS: tuple[Kind, ...] = ("contiguous", "round_robin")
BLOCK_ROWS = 64
"""That lie together where rows are dealt round-robin."""
CONTEXT = multiprocessing.get_context("forkserver")


def make_datastore(path: Path, keys: int, dim: int, shards: int, kind: Kind) -> Datastore:
    """Keys around one centre in a hundred keys, in shards."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(max(keys // 100, 1), dim)).astype(np.float32)
    nothing = np.empty(0, dtype=np.int64)
    like = (path, keys, dim, "fp16", 2, {"made": "up"}, nothing, shards, kind)
    builder = new_datastore(*like, block_rows=BLOCK_ROWS)
    step = BLOCK_BYTES // (4 * dim)
    for first in range(0, keys, step):
        rows = np.arange(first, min(first + step, keys))
        near = centers[rng.integers(0, len(centers), len(rows))]
        drawn = near + 0.5 * rng.normal(size=(len(rows), dim)).astype(np.float32)
        builder.write(rows, drawn, np.zeros(len(rows), dtype=np.int64))
    builder.sync()
    return builder.finish()


def build_index(store: Datastore, factory: str) -> None:
    """For each shard."""
    if not is_factory(factory):
        return
    trained = IndexBuilding(store, factory, "l2").train()
    for number in range(store.n_shards):
        IndexBuilding(store.shard(number), factory, "l2", trained=trained).run()


def work(send: Connection, rank: int, ranks: int, threads: int, where: Path, task: dict) -> None:
    """One rank: searches for its part of the queries, and sends what it found."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    if ranks > 1:
        meeting = f"file://{where}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    store = Datastore.open(task["store"])
    retriever = open_distributed(store, Search(task["index"], "l2", task["nprobe"]), rescore=True)
    mine = np.load(task["queries"])[rank::ranks]
    batches = np.array_split(mine, -(-len(mine) // task["at_once"]))
    for part in (batches[:1], batches):  # the first to warm up
        retriever.begin_pass()
        if ranks > 1:
            dist.barrier()
        start, busy = time.perf_counter(), time.process_time()
        found = [retriever.search(batch, task["k"]).rows for batch in part]
        retriever.end_pass()
        spent = time.perf_counter() - start, time.process_time() - busy
    counts = retriever.statistics["seconds_searching"], retriever.local.exact
    send.send((np.concatenate(found), spent, *counts, retriever.communication))


def measure(ranks: int, threads: int, task: dict, folder: Path) -> tuple[np.ndarray, list]:
    """Rows found for all queries; and of each rank the seconds on the clock and on a core, those of
    searching its shards, whether that gives exact distances, and its communication."""
    CONTEXT.set_forkserver_preload(["neighborlm.retrieval.cluster.distributed"])
    where = folder / f"meeting-{time.monotonic_ns()}"
    ends, processes = [], []
    for rank in range(ranks):
        receive, send = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=work, args=(send, rank, ranks, threads, where, task))
        process.start()
        send.close()
        ends.append(receive)
        processes.append(process)
    found = [end.recv() for end in ends]
    for process in processes:
        process.join()
    rows = np.empty((sum(len(part[0]) for part in found), task["k"]), dtype=np.int64)
    for rank, (part, *_) in enumerate(found):
        rows[rank::ranks] = part
    return rows, [rest for _, *rest in found]


def expected_bytes(
    store: Datastore, queries: int, ranks: int, rounds: int, k: int, exact: bool
) -> float:
    """What a rank sends if all have equally many shards and queries: to each other one a header in
    every step and its queries, and of theirs what it was asked for.

    Args:
        store: what is searched.
        queries: of all ranks.
        ranks: how many there are.
        rounds: of searches; in the last one none has queries.
        k: neighbours a query.
        exact: whether there is but one distance of each.
    """
    if store.manifest["placement"] == "round_robin":
        k = local_k(k, 1 / ranks, TOLERANCE / ranks)
    value = store.values.dtype.itemsize
    neighbor = np.min_scalar_type(-len(store)).itemsize + value + (4 if exact else 8)
    each = HEADER_BYTES * (2 * rounds - 1) + queries / ranks * (4 * store.dim + k * neighbor)
    return (ranks - 1) * each


def compare(task: dict, ranks: list[int], threads: int, folder: Path, report) -> list[dict]:
    """One row a number of ranks; the first is what the others are compared with."""
    rows: list[dict] = []
    first = np.empty(0)
    store = Datastore.open(task["store"])
    for done, count in enumerate(ranks):
        report(store.manifest["placement"], done, len(ranks))
        found, of_ranks = measure(count, threads, task, folder)
        first = found if not rows else first
        same = [np.isin(ours, theirs).mean() for ours, theirs in zip(found, first, strict=True)]
        seconds = max(spent[0] for spent, *_ in of_ranks)
        searching = sum(part for _, part, *_ in of_ranks) / count
        communication = [said for *_, said in of_ranks if said]
        rounds = communication[0]["rounds"] if communication else 0
        expected = expected_bytes(store, len(found), count, rounds, task["k"], of_ranks[0][2])
        rows.append(
            {
                "placement": store.manifest["placement"],
                "ranks": count,
                "queries_per_second": len(found) / seconds,
                "core_ms_per_query": 1000 * sum(spent[1] for spent, *_ in of_ranks) / len(found),
                "share_searching": searching / seconds,
                "same_neighbors": float(np.mean(same)),
                "rounds": rounds,
                "asked_again": sum(said["asked_again"] for said in communication),
                "bytes_sent": [said["bytes_sent"] for said in communication],
                "bytes_expected": expected,
            }
        )
    report(store.manifest["placement"], len(ranks), len(ranks))
    return rows


def show(rows: list[dict], title: str) -> None:
    """Prints the table."""
    from benchmarks.measuring import new_table  # imports Lightning, which no rank needs

    columns = ("queries/s", "core ms", "searching", "same", "MB sent", "expected")
    table = new_table(title, *columns)
    for row in rows:
        table.add_row(
            f"{row['placement']}, {row['ranks']}",
            f"{row['queries_per_second']:,.0f}",
            f"{row['core_ms_per_query']:.2f}",
            f"{row['share_searching']:.0%}",
            f"{row['same_neighbors']:.3%}",
            f"{np.mean(row['bytes_sent'] or [0]) / 1e6:.2f}",
            f"{row['bytes_expected'] / 1e6:.2f}",
        )
    Console(markup=False).print(table)


@exit_with_one_sentence
def run(
    output: Path,
    ranks: list[int] = [1, 2, 4],  # noqa: B006
    shards: int = 4,
    keys: int = 200_000,
    dim: int = 64,
    queries: int = 4096,
    k: int = 256,
    at_once: int = 2048,
    index: str = "flat",
    nprobe: int = 16,
    threads: int = 1,
    work_dir: Path | None = None,
) -> None:
    """Measures, prints a table and writes it as JSON.

    Args:
        output: JSON file.
        ranks: numbers of processes.
        shards: of the datastore.
        keys: made up.
        dim: their width.
        queries: of all ranks together.
        k: neighbours a query.
        at_once: queries of a rank in a round, at most.
        index: see --knn.index of evaluate.py.
        nprobe: inverted lists to visit, where the index has any.
        threads: of a process.
        work_dir: where datastores are made.
    """
    from benchmarks.measuring import environment  # see `show`

    check_writable(output, "--output")
    rows: list[dict[str, Any]] = []
    about = {"keys": keys, "dim": dim, "k": k, "shards": shards, "queries": queries}
    about |= {"index": index, "nprobe": nprobe, "at_once": at_once}
    with TemporaryDirectory(dir=work_dir) as folder, progress_bars("search", True) as report:
        for kind in PLACEMENTS:
            store = make_datastore(Path(folder) / kind, keys, dim, shards, kind)
            build_index(store, index)
            drawn = np.random.default_rng(1).choice(keys, queries, replace=False)
            noise = np.random.default_rng(2).normal(size=(queries, dim))
            np.save(Path(folder) / "queries.npy", np.float32(store.keys[drawn] + 0.3 * noise))
            task = {"store": store.path, "queries": Path(folder) / "queries.npy", "k": k}
            task |= {"index": index, "nprobe": nprobe, "at_once": at_once}
            rows += compare(task, ranks, threads, Path(folder), report)
    show(rows, f"{keys:,} keys of width {dim}, {shards} shards, {index}, k = {k}; by ranks")
    figures = {**environment(threads), **about, "rows": rows}
    write_all({output: as_json(figures)})


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
