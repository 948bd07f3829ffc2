"""The best temperature and lmbda for each k, from a cache of what one pass of retrieval found.

    neighborlm sweep --cache DIR [--k 8 64 1024] [--temperature 1 10] [--lmbda 0.1 0.25]

`--output` writes the whole grid (`k`, `temperature`, `lmbda`, and `losses` in nats per token,
nested in that order), and the best point of all and of each k.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from neighborlm.common.errors import InputError
from neighborlm.common.progress import progress_bars
from neighborlm.programs.arguments import OneSentence
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.retrieval.memories.cache import RetrievalCache, Retrieved
from neighborlm.retrieval.memories.tuning import octave_of, spread, sweep


def best_points(losses: np.ndarray, grid: dict[str, list]) -> list[dict[str, float]]:
    """The best point for each k: its k, temperature, lmbda, loss and ppl."""
    points = []
    for k, table in zip(grid["k"], losses, strict=True):
        row, column = np.unravel_index(table.argmin(), table.shape)
        point = {"k": k, "temperature": grid["temperature"][row], "lmbda": grid["lmbda"][column]}
        points.append({**point, **perplexity(float(table[row, column]))})
    return points


def perplexity(loss: float) -> dict[str, float]:
    """A loss in nats per token, and its exponential."""
    return {"loss": loss, "ppl": math.exp(loss) if loss < 700 else math.inf}


def as_table(results: dict[str, Any]) -> Table:
    """The best pair for each k."""
    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("k", "temperature", "lmbda", "perplexity", "nats / token"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in results["best_of_k"]:
        table.add_row(
            str(point["k"]),
            f"{point['temperature']:.4g}",
            f"{point['lmbda']:g}",
            f"{point['ppl']:.2f}",
            f"{point['loss']:.4f}",
            style="bold" if point == results["best"] else None,
        )
    return table


def parsed(args: list[str] | None) -> Namespace:
    """The command line, and all about it that can be wrong before the cache is opened."""
    parser = OneSentence(
        "neighborlm sweep",
        description="The perplexity of kNN-LM for all combinations of k, temperature and lmbda, "
        "from a cache of what one pass of evaluate.py --knnlm --knn.cache DIR retrieved. Neither "
        "model nor datastore is needed. Prints the best pair for each k.",
    )
    add = parser.add_argument
    add(
        "--cache",
        type=Path,
        required=True,
        help="folder to read: DIR/<split> of --knn.cache DIR",
    )
    add(
        "--k",
        nargs="+",
        type=int,
        help="numbers of neighbours, at most the cache's k (default: powers of two up to that)",
    )
    add(
        "--temperature",
        nargs="+",
        type=float,
        help="what scores are divided by (default: half octaves around the spread of the scores); "
        "name others where the best is the first or the last of these",
    )
    add(
        "--lmbda",
        nargs="+",
        type=float,
        default=(np.arange(19) / 20).tolist(),
        help="weights of p_kNN (default: 0 to 0.9 in steps of 0.05); finer ones around the best",
    )
    add("--output", type=Path, help="JSON file for the whole grid (default: none)")
    options = parser.parse_args(args)
    accepted = {
        "k": (lambda k: k >= 1, "numbers of at least 1"),
        "temperature": (lambda t: 0 < t < math.inf, "finite numbers, more than 0"),
        "lmbda": (lambda lmbda: 0 <= lmbda <= 1, "numbers from 0 to 1"),
    }
    for name, (accepts, expected) in accepted.items():
        for value in getattr(options, name) or []:
            if not accepts(value):
                raise InputError(f"--{name} is {value}; expected {expected}")
    return options


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    options = parsed(args)
    check_writable(options.output, "--output")
    cache = RetrievalCache.open(options.cache)
    if cache.n_scored == 0:
        raise InputError(f"{cache.path}: holds no scored token; expected some")
    ks = options.k or [*(2**i for i in range((cache.k - 1).bit_length())), cache.k]
    cache = cache.nearest(max(ks))
    grid = {"k": ks, "temperature": options.temperature, "lmbda": options.lmbda}
    with progress_bars(str(options.cache), transient=True) as report:

        def blocks(stage: str) -> Iterator[Retrieved]:
            for number, block in enumerate(cache, start=1):
                yield block
                report(stage, number, len(cache))

        if grid["temperature"] is None:
            total, count = spread(blocks("reading"))
            octave = octave_of(total.item() / count)
            grid["temperature"] = (2.0 ** np.arange(octave - 5, octave + 3.5, 0.5)).tolist()
        grid = {name: sorted(set(values)) for name, values in grid.items()}
        losses = sweep(blocks("weighing"), *grid.values())
    points = best_points(losses, grid)
    results = {
        "cache": str(options.cache),
        "tokens": cache.n_scored,
        "lm": perplexity(-float(np.nanmean(cache.lm_log_prob, dtype=np.float64))),
        "best": min(points, key=lambda point: point["loss"]),
        "best_of_k": points,
        **grid,
        "losses": losses.tolist(),
    }
    alone, best = results["lm"]["ppl"], results["best"]["ppl"]
    print(f"{cache.path}: perplexity {alone:.2f} of {cache.n_scored:,} tokens, {best:.2f} at best")
    Console(markup=False).print(as_table(results))
    if options.output is not None:
        write_all({options.output: as_json(results)})
