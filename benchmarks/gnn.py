"""Times the graph network of GNN-LM: making the graph, forward, and forward with backward, by the
fast computation and by message passing, in tokens a second, with the largest resident memory.

    python -m benchmarks.gnn --output gnn.json

Neighbours are random rows, runs of consecutive ones as retrieval finds them; each measurement has
a process of its own.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from neighborlm.datamodules.graphs import NeighborMemory, hetero_graph
from neighborlm.models.hgt import HGT
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all

ROWS = 1 << 20
SHAPES = ((128, 32), (256, 128))
"""Tokens of a block, and neighbours of each."""
LAYERS, CONTEXT = 3, 2


def made_up_neighbors(tokens: int, k: int, follow: float, seed: int = 0) -> np.ndarray:
    """Datastore rows int64 `[T, k]`: each neighbour is, with probability `follow`, the row after
    the one that the token before had there, and a random row otherwise."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, ROWS, (tokens, k))
    follows = rng.random((tokens, k)) < follow
    follows[0] = False
    began = np.maximum.accumulate(np.where(follows, 0, np.arange(tokens)[:, None]), axis=0)
    return np.minimum(rows[began, np.arange(k)] + np.arange(tokens)[:, None] - began, ROWS - 1)


class Stopwatch:
    """Times a function: one run to warm up, then several.

    Args:
        tokens: that each run works on.
        repeat: how many runs count.
    """

    def __init__(self, tokens: int, repeat: int) -> None:
        self.tokens = tokens
        self.repeat = repeat

    def rate(self, function) -> dict[str, float]:
        """Tokens a second: the median of all runs, the slowest and the fastest."""
        function()
        seconds = []
        for _ in range(self.repeat):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return {
            "median": self.tokens / statistics.median(seconds),
            "slowest": self.tokens / max(seconds),
            "fastest": self.tokens / min(seconds),
        }


def measure(
    width: int, tokens: int, k: int, path: str, follow: float, repeat: int, threads: int
) -> dict:
    """One shape by one computation, `fast` or `messages`.

    Returns:
        rates of each stage in tokens a second, the peak of resident memory in bytes, and the share
        of distinct neighbours.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = HGT(width, width, LAYERS, heads=8)
    features = np.random.default_rng(1).standard_normal((ROWS, width), dtype=np.float32)
    features = features.astype(np.float16)
    neighbors = made_up_neighbors(tokens, k, follow)
    memory = NeighborMemory(neighbors, features, CONTEXT, CONTEXT, LAYERS)
    positions = np.arange(tokens)[None]
    x = torch.randn(1, tokens, width)
    watch = Stopwatch(tokens, repeat)
    fast = path == "fast"

    def graph():
        if fast:
            return memory.neighborhood(positions)
        made = hetero_graph(neighbors, ROWS, CONTEXT, CONTEXT)
        made["neighbor"].x = torch.from_numpy(features[made["neighbor"].row.numpy()])
        return made

    made = graph()

    def forward() -> torch.Tensor:
        if fast:
            return network.fast(x, made.features.float(), made)
        nodes = {"token": x[0], "neighbor": made["neighbor"].x.float()}
        return network(nodes, made.edge_index_dict)[-1]["token"]

    def backward() -> None:
        network.zero_grad()
        forward().square().mean().backward()

    result = {"graph": watch.rate(graph)}
    with torch.inference_mode():
        result["forward"] = watch.rate(forward)
    result["forward and backward"] = watch.rate(backward)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["distinct"] = len(np.unique(neighbors)) / neighbors.size
    return result


def measure_if_it_fits(**settings) -> dict:
    """See `measure`; nothing where this machine's memory is not enough."""
    all_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (all_memory, all_memory))
    try:
        return measure(**settings)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        return {}


def in_own_process(**settings) -> dict:
    """Measures in a fresh process, so that its peak of memory is its own."""
    code = "import json, benchmarks.gnn as b; "
    code += f"print(json.dumps(b.measure_if_it_fits(**{settings!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@exit_with_one_sentence
def run(
    output: Path,
    widths: list[int] = [128, 1024],  # noqa: B006
    follow: float = 0.5,
    repeat: int = 3,
    threads: int = os.cpu_count() or 1,
    paths: list[str] = ["fast", "messages"],  # noqa: B006
) -> None:
    """Measures all shapes, prints a table and writes it as JSON.

    Args:
        output: JSON file.
        widths: of the states.
        follow: how often a token's neighbour follows the one of the token before; 0 makes nearly
            all neighbours distinct.
        repeat: runs that count, after one that does not.
        threads: of torch.
        paths: which computations.
    """
    check_writable(output, "--output")
    table = Table(title=f"3 layers, context 2, {threads} threads, tokens per second")
    for column in ("width", "n", "k", "distinct", "", "graph", "forward", "+ backward", "peak GB"):
        table.add_column(column)
    rows = []
    for width in widths:
        for tokens, k in SHAPES:
            for path in paths:
                settings = {"width": width, "tokens": tokens, "k": k, "path": path}
                settings |= {"follow": follow, "repeat": repeat, "threads": threads}
                found = in_own_process(**settings)
                rows.append(settings | found)
                shape = [str(number) for number in (width, tokens, k)]
                if not found:
                    table.add_row(*shape, "", path, "too large", "for this", "machine")
                    continue
                rates = [found[s]["median"] for s in ("graph", "forward", "forward and backward")]
                table.add_row(
                    *shape,
                    f"{found['distinct']:.0%}",
                    path,
                    *(f"{rate:,.0f}" for rate in rates),
                    f"{found['peak_bytes'] / 1e9:.1f}",
                )
    write_all({output: as_json({"torch": torch.__version__, "rows": rows})})
    Console(markup=False).print(table)


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
