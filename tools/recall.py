"""Which hidden state retrieves best, and what an index loses: how often a query's target is among
the values of its nearest keys.

    neighborlm recall --memory datastores/text/train --queries datastores/text/valid

Each key type needs a pair of datastores, of the training split and of another one; every pair is
searched with every metric, index and number of probes.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import groupby, product
from pathlib import Path

import faiss
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from neighborlm.common.contracts import Metric, Retriever
from neighborlm.common.errors import InputError
from neighborlm.common.progress import Report, progress_bars
from neighborlm.programs.arguments import OneSentence
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.faiss_retriever import FaissRetriever
from neighborlm.retrieval.search.index import (
    Search,
    check_index,
    is_factory,
    is_path,
    open_retriever,
    resolve,
)
from neighborlm.retrieval.search.retriever import FAISS_METRICS, FlatRetriever
from neighborlm.retrieval.store.artifact import Job, refuse_mismatch, share_out
from neighborlm.retrieval.store.datastore import Datastore

QUERIES_AT_ONCE = 2048
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Of a picture: the colour-blind tell them apart (Okabe and Ito, 2008)."""
MARKERS = "osD^vP*X"
"""Of a picture: as many as are not the colours, so that both together tell 56 searches apart."""


@dataclass(frozen=True)
class Recall:
    """How well the keys of one datastore are found by the queries of another.

    Attributes:
        memory: the datastore that is searched.
        queries: the datastore whose keys are the queries.
        key_type: of both; None where the memory does not say.
        metric: how they are compared.
        index: what searched: `flat`, a factory string or a path.
        nprobe: inverted lists that it visits; None where it has none.
        n_queries: how many there were.
        recall: by k, share of queries whose own value is among those of the k nearest.
        precision: by k, mean over the queries of the share of their k nearest that carry it, of
            those that the index finds.
        reciprocal_rank: mean of 1 / rank of the first that carries it, 0 where none of the
            largest k does.
        index_recall: by k, share of the k nearest that the index finds. Of keys at the same
            distance, which exact search too has to choose from, another choice counts as a loss.
        milliseconds: of search for a query, on all CPU threads that faiss has; reading an index
            from disk is part of it when it is searched for the first time.
    """

    memory: str
    queries: str
    key_type: str | None
    metric: Metric
    index: str
    nprobe: int | None
    n_queries: int
    recall: dict[int, float]
    precision: dict[int, float]
    reciprocal_rank: float
    index_recall: dict[int, float]
    milliseconds: float


# -- figures -------------------------------------------------------------------------------------


def target_figures(
    hits: np.ndarray, found: np.ndarray, ks: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What retrieval says of the target.

    Args:
        hits: bool `[Q, K]`, neighbours that carry it, nearest first.
        found: bool `[Q, K]`, neighbours that are there.
        ks: ascending, at most K.

    Returns:
        float64: whether a hit is among the nearest k `[Q, ks]`; share of the nearest k that are
        hits `[Q, ks]`; and one over the rank of the first hit, or 0, `[Q]`.
    """
    last = np.asarray(ks) - 1
    n_hits = hits.cumsum(axis=1, dtype=np.int32)
    n_found = found.cumsum(axis=1, dtype=np.int32)
    precision = n_hits[:, last] / np.maximum(n_found[:, last], 1)
    reciprocal = np.where(n_hits[:, -1] > 0, 1 / (hits.argmax(axis=1) + 1), 0.0)
    return (n_hits[:, last] > 0).astype(np.float64), precision, reciprocal


def overlap(rows: np.ndarray, exact: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """Share of the exact k nearest that are among the k nearest found.

    Args:
        rows: int64 `[Q, K]`, -1 where missing.
        exact: int64 `[Q, K]`, none missing.
        ks: at most K.

    Returns:
        float64 `[Q, ks]`.

    >>> overlap(np.array([[5, 7, 6]]), np.array([[5, 6, 7]]), [1, 2, 3]).tolist()
    [[1.0, 0.5, 1.0]]
    """
    query = np.arange(len(rows))[:, None]
    step = int(max(rows.max(initial=0), exact.max(initial=0))) + 2  # room for -1 below row 0
    wanted, numbers = (query * step + exact).ravel(), query * step + rows
    order = np.argsort(wanted)
    at = np.minimum(np.searchsorted(wanted, numbers, sorter=order), wanted.size - 1)
    # The k at which both lists have a row: the later of its two ranks.
    rank = np.where(wanted[order[at]] == numbers, order[at] % exact.shape[1], exact.shape[1])
    rank = np.maximum(rank, np.arange(rows.shape[1]))
    return np.stack([(rank < k).sum(axis=1) / k for k in ks], axis=1)


# -- searching -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Queries of one pair of datastores, and what exact search finds for them.

    Attributes:
        memory: what they search.
        source: where they are from.
        keys: fp32 `[Q, d]`.
        targets: `[Q]`, their own values.
    """

    memory: Datastore
    source: Datastore
    keys: np.ndarray
    targets: np.ndarray

    @classmethod
    def draw(cls, memory: Datastore, source: Datastore, limit: int, seed: int) -> "Sample":
        """A random sample of the rows of `source`."""
        rows, keys = source.sample(limit, seed)
        return cls(memory, source, keys, np.asarray(source.values[rows]))

    def search(
        self, retriever: Retriever, k: int, report: Callable[[int, int], None]
    ) -> tuple[np.ndarray, float]:
        """Rows of the memory int64 `[Q, k]`, -1 where missing, and the seconds it took."""
        parts, seconds = [], 0.0
        report(0, len(self.keys))
        for first in range(0, len(self.keys), QUERIES_AT_ONCE):
            block = self.keys[first : first + QUERIES_AT_ONCE]
            start = time.perf_counter()
            parts.append(retriever.search(block, k).rows)
            seconds += time.perf_counter() - start
            report(first + len(block), len(self.keys))
        return np.concatenate(parts), seconds

    def figures(
        self, rows: np.ndarray, exact: np.ndarray, ks: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
        """Means of `target_figures` and `overlap` over the queries: recall `[ks]`, precision
        `[ks]`, reciprocal rank, and recall of the index `[ks]`."""
        sums = [np.zeros(len(ks)), np.zeros(len(ks)), 0.0, np.zeros(len(ks))]
        for first in range(0, len(rows), QUERIES_AT_ONCE):
            block = slice(first, first + QUERIES_AT_ONCE)
            found = rows[block] >= 0
            # A missing neighbour's row is the last one here, but it is no hit.
            hits = (self.memory.values[rows[block]] == self.targets[block, None]) & found
            parts = (*target_figures(hits, found, ks), overlap(rows[block], exact[block], ks))
            sums = [total + part.sum(axis=0) for total, part in zip(sums, parts, strict=True)]
        recall, precision, reciprocal, index_recall = (total / len(rows) for total in sums)
        return recall, precision, float(reciprocal), index_recall


def measure(
    memory: Datastore,
    queries: Datastore,
    indexes: Sequence[str],
    nprobes: Sequence[int],
    metrics: Sequence[Metric],
    ks: Sequence[int],
    limit: int = 2000,
    seed: int = 1,
    report: Report = lambda *_: None,
) -> Iterator[Recall]:
    """Searches a pair of datastores in every way; builds the indexes that are missing.

    Args:
        memory: of the training split.
        queries: of another split.
        indexes: `flat`, `auto`, faiss factory strings or paths.
        nprobes: inverted lists to visit, for indexes that have them.
        metrics: how to compare.
        ks: numbers of neighbours.
        limit: queries, a random sample.
        seed: of that.
        report: called with a stage, how much of it is done, and how much there is.

    Yields:
        a result for each metric, index and, where that has lists, nprobe.

    Raises:
        InputError: the two do not belong together, have too few keys, or an index cannot be
            built or opened.
    """
    check_pair(memory, queries, max(ks))
    ks = sorted(set(ks))
    sample = Sample.draw(memory, queries, limit, seed)
    names = dict.fromkeys(resolve(memory, index) for index in indexes)
    for metric in metrics:
        stage = f"{metric}, searching"
        flat = FlatRetriever(memory, metric)
        exact, flat_seconds = sample.search(flat, ks[-1], partial(report, f"{stage} flat"))
        for name in names:
            ensure_index(memory, name, metric, report)
            for nprobe in nprobes:
                retriever = open_retriever(memory, Search(name, metric, nprobe))
                probed = has_lists(retriever)
                rows, seconds = exact, flat_seconds
                if name != "flat":
                    searching = f"{stage} {name}" + (f", nprobe {nprobe}" if probed else "")
                    rows, seconds = sample.search(retriever, ks[-1], partial(report, searching))
                recall, precision, reciprocal, index_recall = sample.figures(rows, exact, ks)
                yield Recall(
                    str(memory.path),
                    str(queries.path),
                    memory.manifest["made_from"].get("key_type"),
                    metric,
                    name,
                    nprobe if probed else None,
                    len(rows),
                    dict(zip(ks, recall.tolist(), strict=True)),
                    dict(zip(ks, precision.tolist(), strict=True)),
                    reciprocal,
                    dict(zip(ks, index_recall.tolist(), strict=True)),
                    1000 * seconds / len(rows),
                )
                if not probed:
                    break


def check_pair(memory: Datastore, queries: Datastore, k: int) -> None:
    """Refuses queries of another width, model, dictionary or key type than the memory, or of its
    own text, and a memory of fewer than k keys."""
    refuse_mismatch(queries.path, {"dim": queries.dim}, {"dim": memory.dim})
    theirs, ours = memory.manifest["made_from"], queries.manifest["made_from"]
    both = ours.keys() & theirs.keys() & {"model", "dictionary", "key_type"}
    refuse_mismatch(queries.path, ours, {field: theirs[field] for field in sorted(both)})
    same_text = "corpus" in ours and ours["corpus"] == theirs.get("corpus")
    if same_text or queries.fingerprint == memory.fingerprint:
        raise InputError(
            f"--queries {queries.path}: holds the same text as --memory {memory.path}, so that "
            "every token would find its own key; expected another split"
        )
    if queries.n_keys == 0:
        raise InputError(f"--queries {queries.path}: has no keys; expected some")
    if k > memory.n_keys:
        raise InputError(f"--ks {k}: --memory {memory.path} has only {memory.n_keys:,} keys")


def check_search(memory: Datastore, name: str, metric: Metric) -> None:
    """Refuses a factory string that faiss does not know, and a file that does not fit."""
    check_index(name, memory.dim, metric, memory.n_keys)
    if is_path(name):
        open_retriever(memory, Search(name, metric, nprobe=1))


def ensure_index(memory: Datastore, name: str, metric: Metric, report: Report) -> None:
    """Builds the index of a factory string, unless it is there, whatever seed made it."""
    if not is_factory(name):
        return
    building = IndexBuilding(memory, name, metric)

    def build() -> None:
        building.run(lambda stage, *done: report(f"{metric}, {name}, {stage}", *done))

    share_out([Job(building.artifact.lock(), building.path.is_file, build)])


def has_lists(retriever: Retriever) -> bool:
    """Whether nprobe means something to it."""
    return (
        isinstance(retriever, FaissRetriever)
        and faiss.try_extract_index_ivf(retriever.index) is not None
    )


# -- the program ---------------------------------------------------------------------------------


def as_table(results: Sequence[Recall]) -> Table:
    """Results of one pair of datastores: a line for each combination and k."""
    pair = f"{results[0].memory}, searched by {results[0].queries}"
    caption = "1/rank: of the first hit; kept: of the exact k nearest; ms: a query"
    table = Table("search", title=pair, caption=caption, box=SIMPLE, pad_edge=False)
    for name in ("k", "recall", "precision", "1/rank", "kept", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        for k, recall in result.recall.items():
            first = k == min(result.recall)
            table.add_row(
                name_of(result) if first else "",
                str(k),
                f"{recall:.4f}",
                f"{result.precision[k]:.4f}",
                f"{result.reciprocal_rank:.4f}" if first else "",
                f"{result.index_recall[k]:.4f}",
                f"{result.milliseconds:.3g}" if first else "",
            )
        table.add_section()
    return table


def name_of(result: Recall) -> str:
    """How the search was made."""
    probed = "" if result.nprobe is None else f" nprobe {result.nprobe}"
    return f"{result.metric} {result.index}{probed}"


def plot(results: Sequence[Recall], path: Path) -> None:
    """A picture of two panels: recall over k, and what an index loses for its speed."""
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(15, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    ks = list(results[0].recall)
    for i, result in enumerate(results):
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        label = f"{result.memory}: {name_of(result)}"
        left.plot(ks, list(result.recall.values()), markersize=5, label=label, **style)
        right.plot([result.milliseconds], [result.index_recall[ks[-1]]], markersize=8, **style)
    left.set(xscale="log", xlabel="k", ylabel="recall of the target")
    left.set_xticks(ks, [str(k) for k in ks])
    left.minorticks_off()
    right.set(xscale="log", xlabel="milliseconds a query", ylabel=f"share of the exact {ks[-1]}")
    right.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, format="png")


def parsed(args: list[str] | None) -> Namespace:
    """The command line, and all about it that can be wrong before anything is opened."""
    parser = OneSentence(
        "neighborlm recall",
        description="How often a query's target is among the values of its nearest keys: compares "
        "key types, each a pair of datastores, and what indexes lose. An index that is missing is "
        "built.",
    )
    add = parser.add_argument
    add(
        "--memory",
        type=Path,
        action="append",
        required=True,
        help="datastore of the training split, which is searched; may be given several times, with "
        "as many --queries",
    )
    add(
        "--queries",
        type=Path,
        action="append",
        required=True,
        help="datastore of another split, of the same model and key type; its keys are the queries",
    )
    add(
        "--indexes",
        nargs="+",
        default=["flat"],
        help="what searches: flat, torch, auto, faiss factory strings or paths (default: flat, "
        "which is exact); name others to see what they lose",
    )
    add(
        "--nprobes",
        nargs="+",
        type=int,
        default=[32],
        help="inverted lists to visit, one search each; more find more and take longer "
        "(default: 32)",
    )
    add(
        "--metrics",
        nargs="+",
        default=["l2"],
        choices=list(FAISS_METRICS),
        help="how keys are compared (default: l2); several to compare them",
    )
    add(
        "--ks",
        nargs="+",
        type=int,
        default=[1, 8, 32, 128, 1024],
        help="numbers of neighbours to report for (default: 1 8 32 128 1024)",
    )
    add(
        "--limit",
        type=int,
        default=2000,
        help="queries of each pair, a random sample; more for finer differences (default: 2000)",
    )
    add("--seed", type=int, default=1, help="of the sample of queries (default: 1)")
    add("--output", type=Path, help="JSON file for the results (default: none)")
    add("--plot", type=Path, help="PNG file for a picture (default: none); needs matplotlib")
    options = parser.parse_args(args)
    if len(options.memory) != len(options.queries):
        raise InputError(
            f"--queries was given {len(options.queries)} times and --memory {len(options.memory)}; "
            "expected one for each"
        )
    for name in ("nprobes", "ks", "limit"):
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise InputError(f"--{name} is {value}; expected at least 1")
    if options.plot is not None and find_spec("matplotlib") is None:
        raise InputError(
            "--plot needs matplotlib, which is not installed; expected it from "
            'pip install -c constraints.txt -e ".[plot]"'
        )
    return options


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    options = parsed(args)
    check_writable(options.output, "--output")
    check_writable(options.plot, "--plot")
    pairs = [
        (Datastore.open(memory), Datastore.open(queries))
        for memory, queries in zip(options.memory, options.queries, strict=True)
    ]
    for memory, queries in pairs:
        check_pair(memory, queries, max(options.ks))
        for index, metric in product(options.indexes, options.metrics):
            check_search(memory, resolve(memory, index), metric)
    results: list[Recall] = []
    for memory, queries in pairs:
        with progress_bars(str(memory.path), transient=True) as report:
            results += measure(
                memory,
                queries,
                options.indexes,
                options.nprobes,
                options.metrics,
                options.ks,
                options.limit,
                options.seed,
                report,
            )
    for _, of_pair in groupby(results, key=lambda result: (result.memory, result.queries)):
        Console(markup=False).print(as_table(list(of_pair)))
    if options.output is not None:
        write_all({options.output: as_json([asdict(result) for result in results])})
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(results, options.plot)
