"""What `neighborlm plan` says beside what the code takes: bytes, and the seconds of one
core in each stage.

    python -m benchmarks.plan --output plan.json

Keys are made up, around a few hundred centres. Seconds are those that the processor worked, so that
other work on the machine matters little and nothing waits for the disk.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console

from benchmarks.measuring import environment, new_table
from neighborlm.common.progress import progress_bars
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.retrieval.neighbors.codec import build_codes, codec_files, codes_path
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import index_path, open_retriever
from neighborlm.retrieval.search.rescoring import exact_distances
from neighborlm.retrieval.store.datastore import Datastore, DatastoreBuilder
from neighborlm.tools.plan_costs import Costs
from neighborlm.tools.plan_settings import Constants, Wanted

DIM, CENTRES, QUERIES = 64, 300, 8192
SIZES = ((20_000, "IVF256,SQfp16"), (160_000, "IVF1024,SQfp16"))
OTHERS = ("IVF1024,SQ8", "RR64,IVF1024,RaBitQfs")
"""At the larger size."""
TABLE_K, CODEC = 32, "OPQ8_64,PQ8"
AT_ONCE = 1 << 13


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor, and what comes of it."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """Keys fp32 `[count, DIM]`."""
    centres = np.random.default_rng(0).standard_normal((CENTRES, DIM), np.float32)
    return centres[rng.integers(0, CENTRES, count)] + 0.5 * rng.standard_normal(
        (count, DIM), np.float32
    )


def make_datastore(path: Path, rows: int) -> tuple[float, Datastore]:
    """Seconds of writing it, and a datastore."""
    rng = np.random.default_rng(1)
    nothing = np.empty(0, np.int64)
    seconds, builder = timed(
        lambda: DatastoreBuilder(path, rows, DIM, "fp16", 50_000, {"made": "up"}, nothing)
    )
    for first in range(0, rows, AT_ONCE):
        here = np.arange(first, min(first + AT_ONCE, rows))
        keys = drawn(rng, len(here))
        seconds += timed(lambda here=here, keys=keys: builder.write(here, keys, here % 50_000))[0]
    seconds += timed(builder.sync)[0]
    return seconds + timed(builder.finish)[0], Datastore.open(path)


def size(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def measured(store: Datastore, wanted: Wanted, report) -> dict[str, float]:
    """Seconds of the stages, those of a search of one query; bytes of what was made."""
    building, _ = timed(IndexBuilding(store, wanted.index, "l2").run)
    retriever = open_retriever(store, wanted.index, "l2", wanted.nprobe)
    queries = drawn(np.random.default_rng(2), QUERIES)
    retriever.search(queries, wanted.k, ordered=False)
    searching, (_, rows) = timed(lambda: retriever.search(queries, wanted.k, ordered=False))
    found = {
        "index": building,
        "search": searching / QUERIES,
        "bytes": size(index_path(store, wanted.index, "l2")),
    }
    if not retriever.exact:
        exact_distances(queries, rows, store, "l2")
        again, _ = timed(lambda: exact_distances(queries, rows, store, "l2"))
        return found | {"stored keys": again / QUERIES}
    own, _ = timed(lambda: retriever.search(queries, TABLE_K))
    coding, _ = timed(lambda: build_codes(store, CODEC, report=report))
    codes = sum(map(size, {codes_path(store.path, CODEC), *codec_files(store, CODEC)}))
    return found | {"table": own / QUERIES, "codes": coding, "bytes": found["bytes"] + codes}


def planned(costs: Costs) -> dict[str, float]:
    """The same of a plan."""
    parts = dict(costs.search_parts)
    found = {"stored keys": parts.pop("stored keys", 0), "search": sum(parts.values())}
    stages = costs.seconds
    found["index"] = stages["index training"] + stages["index adding"]
    found |= {"table": stages["neighbour table"] / costs.keys, "codes": stages["codes"]}
    return found


def compare(rows: int, factories: list[str], constants: Constants, folder: Path, report) -> list:
    """A line for each index of a datastore of so many rows."""
    writing, store = make_datastore(folder / str(rows), rows)
    bytes_of_store = size(store.path)
    lines = []
    for factory in factories:
        wanted = Wanted(rows, DIM, 1024, factory, cores=1, table_k=TABLE_K, codec=CODEC)
        costs = Costs(replace(wanted, tokens_per_second=1e12, vocab=50_000), constants)
        took = measured(store, wanted, report) | {"datastore": writing}
        took["bytes"] += bytes_of_store
        both = "codes" in took
        left_out = 0 if both else costs.bytes["codes"]
        says = planned(costs) | {
            "datastore": costs.seconds["datastore"],
            "bytes": sum(costs.bytes.values()) - costs.bytes["neighbour table"] - left_out,
        }
        lines.append(
            {
                "keys": rows,
                "index": factory,
                "measured": took,
                "planned": {name: says[name] for name in took},
                "ratio": {name: says[name] / took[name] for name in took},
            }
        )
    return lines


@exit_with_one_sentence
def run(output: Path, constants: Path | None = None, work_dir: Path | None = None) -> None:
    """Measures, prints a table of ratios and writes all as JSON.

    Args:
        output: JSON file.
        constants: JSON of benchmarks/constants.py.
        work_dir: where datastores are made; by default where temporary files lie.
    """
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    known = Constants.read(constants) if constants else Constants()
    (few, small), (many, large) = SIZES
    with TemporaryDirectory(dir=work_dir) as folder, progress_bars("codes", True) as report:
        lines = compare(few, [small], known, Path(folder), report)
        lines += compare(many, [large, *OTHERS], known, Path(folder), report)
    table = new_table(
        "planned / measured", *(f"{line['keys']:,} keys\n{line['index']}" for line in lines)
    )
    for stage in ("bytes", "datastore", "index", "search", "stored keys", "table", "codes"):
        ratios = [line["ratio"].get(stage) for line in lines]
        table.add_row(stage, *("" if ratio is None else f"{ratio:.3g}" for ratio in ratios))
    Console().print(table)
    output.write_text(json.dumps({**environment(1), "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
