"""Compares indexes by what they cost and what they change: training, adding, bytes a key, search
time, recall of the exact neighbours, and the perplexity of the mixture with and without distances
from the stored keys.

    python -m benchmarks.indexes --memory DATASTORE --queries DATASTORE --scores scores.npz \\
        --sizes '[10000,200000]' --output indexes.json --plot_to indexes.png

The queries are a datastore of another split, and the scores what `evaluate.py --token_scores` wrote
of it; without them there are no perplexities. A size takes the first keys of the memory.

A second table compares the ways of searching the same lists of the same index: the engine, which
counts votes or gives neighbours, `faiss.Index.search`, and `faiss.contrib.big_batch_search`, which
also takes many queries a list.
"""

import io
import math
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import torch
from faiss.contrib.big_batch_search import big_batch_search
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

from neighborlm.common.contracts import Neighbors, NProbe, Retriever
from neighborlm.common.errors import InputError
from neighborlm.common.progress import Report, progress_bars
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.retrieval.memories.mixers import mixture
from neighborlm.retrieval.search import Search, open_retriever
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.faiss_retriever import FaissRetriever
from neighborlm.retrieval.search.index import auto_factory
from neighborlm.retrieval.search.rescoring import exact_distances
from neighborlm.retrieval.search.retriever import votes_of, with_values
from neighborlm.retrieval.store.datastore import Datastore, DatastoreBuilder

FACTORIES = (
    "IVF{lists},SQfp16",
    "IVF{lists},SQ8",
    "IVF64,PQ{eighth}",
    "OPQ{eighth}_{dim},IVF{lists},PQ{eighth}",
    "IVF{lists},PQ{half}x4fsr",
    "RR{dim},IVF{lists},RaBitQfs",
    "RR{dim},IVF{lists},RaBitQfs4",
)
"""Compared with `flat`; lists, dim, and parts of dim are filled in."""
AT_ONCE, EVALUATED_AT_ONCE = 4096, 10240
"""Queries of a search, and of one where ways of searching are compared: as many as evaluation takes
at most."""
LMBDA = 0.25


@dataclass
class Questions:
    """Queries fp32 `[Q, d]`, and for each its target and, where that is known, the LM's
    log-probability of it."""

    queries: np.ndarray
    targets: np.ndarray
    lm_log_prob: Tensor | None

    @classmethod
    def read(cls, queries: Datastore, scores: Path | None, limit: int, seed: int) -> "Questions":
        """A random sample of the scored tokens, or of all.

        Raises:
            InputError: the scores are of another text than the queries.
        """
        if scores is None:
            rows, keys = queries.sample(limit, seed)
            return cls(keys, queries.values[rows], None)
        table = np.load(scores)
        rows = np.random.default_rng(seed).permutation(len(table["position"]))[:limit]
        rows.sort()
        position = table["position"][rows]
        if (position >= len(queries)).any() or (
            queries.values[position] != table["target"][rows]
        ).any():
            raise InputError(
                f"--scores {scores}: are of another text than --queries {queries.path}; expected "
                "the --token_scores of an evaluation of the split whose keys these are"
            )
        keys, targets = queries.read(position), queries.values[position]
        return cls(keys, targets, torch.from_numpy(table["lm_log_prob"][rows]))


@dataclass
class Answers:
    """What a search gave, and milliseconds a query."""

    found: Neighbors
    milliseconds: float


def answer(retriever: Retriever, questions: Questions, k: int) -> Answers:
    """Searches for all queries, in the batches that evaluation takes, after a warm-up."""
    retriever.search(questions.queries[:AT_ONCE], k)
    start = time.perf_counter()
    parts = [
        retriever.search(questions.queries[first : first + AT_ONCE], k)
        for first in range(0, len(questions.queries), AT_ONCE)
    ]
    seconds = time.perf_counter() - start
    found = Neighbors(*(np.concatenate([part[i] for part in parts]) for i in range(2)))
    return Answers(found, 1000 * seconds / len(questions.queries))


def perplexity(
    memory: Datastore, questions: Questions, answers: Answers, exact: bool
) -> float | None:
    """Of the mixture at temperature 1, with the answers' distances or those to the stored keys;
    None where the LM's part is not known."""
    if questions.lm_log_prob is None:
        return None
    total = 0.0
    for first in range(0, len(questions.queries), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        rows, distances = answers.found.rows[part], answers.found.distances[part]
        if exact:
            distances = exact_distances(questions.queries[part], rows, memory, "l2")
        found = with_values(Neighbors(distances, rows), memory)
        votes = votes_of(found, questions.targets[part], 1.0, "l2")
        log_probs = [questions.lm_log_prob[part], torch.from_numpy(votes.log_probs)]
        total -= mixture(log_probs, [1 - LMBDA, LMBDA]).double().sum().item()
    return math.exp(total / len(questions.queries))


def kept(answers: Answers, exact: Answers) -> float:
    """Share of the exact k nearest that were found."""
    pairs = zip(answers.found.rows, exact.found.rows, strict=True)
    found = sum(np.isin(ours, theirs).sum() for ours, theirs in pairs)
    return float(found / np.count_nonzero(exact.found.rows >= 0))


def ways(retriever: Retriever, questions: Questions, k: int, repeat: int) -> dict[str, float]:
    """Milliseconds a query of each way of searching the same lists of an index; none where the
    engine cannot read it. The median of some rounds, in which each way has its turn."""
    if not isinstance(retriever, FaissRetriever) or retriever.lists is None:
        return {}
    queries, targets = questions.queries[:EVALUATED_AT_ONCE], questions.targets
    ivf = retriever.lists.ivf  # its nprobe is set
    if ivf.this != retriever.index.this or not retriever.lists.pays(len(queries)):
        return {}
    targets = targets[: len(queries)].astype(np.int64)

    def big_batch() -> None:
        with redirect_stdout(io.StringIO()):  # it prints at every level; least at this one
            big_batch_search(ivf, queries, k, verbose=1)

    each: dict[str, Callable[[], object]] = {
        "votes": lambda: retriever.vote(queries, k, targets, 1.0),
        "neighbours in any order": lambda: retriever.search(queries, k, ordered=False),
        "neighbours, nearest first": lambda: retriever.search(queries, k),
        "faiss.Index.search": lambda: ivf.search(queries, k),
        "big_batch_search": big_batch,
    }
    retriever.prepare()
    seconds: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(repeat):
        for name, search in each.items():
            start = time.perf_counter()
            search()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * float(np.median(of)) / len(queries) for name, of in seconds.items()}


def first_keys(memory: Datastore, size: int, folder: Path) -> Datastore:
    """A datastore of the first rows of another."""
    values = np.asarray(memory.values[:size])
    vocab_size = int(values.max()) + 1
    dtype, nothing = memory.manifest["dtype"], np.empty(0, np.int64)
    builder = DatastoreBuilder(folder, size, memory.dim, dtype, vocab_size, {"of": size}, nothing)
    for first in range(0, size, 1 << 16):
        rows = np.arange(first, min(first + (1 << 16), size))
        builder.write(rows, memory.read(rows), values[rows])
    builder.sync()
    return builder.finish()


def filled_in(factory: str, n_keys: int, dim: int) -> str:
    """A factory string for keys of a width, with as many lists as `auto` would take."""
    lists = 2 ** round(math.log2(2 * math.sqrt(n_keys)))
    return factory.format(lists=lists, dim=dim, half=dim // 2, eighth=dim // 8)


def compare(
    memory: Datastore,
    questions: Questions,
    factories: list[str],
    nprobes: list[NProbe],
    k: int,
    repeat: int,
    report: Report,
) -> list[dict]:
    """One row an index and nprobe; `flat` is the first."""
    exact = answer(open_retriever(memory, Search("flat")), questions, k)
    about = {"keys": memory.n_keys, "dim": memory.dim, "k": k, "queries": len(questions.queries)}
    ppl = perplexity(memory, questions, exact, exact=True)
    rows = [
        {**about, "index": "flat", "ms": exact.milliseconds, "recall": 1.0, "ppl": ppl}
        | {"ppl_index_distances": perplexity(memory, questions, exact, exact=False)}
    ]
    for done, template in enumerate(factories):
        report("indexes", done, len(factories))
        factory = filled_in(template, memory.n_keys, memory.dim)
        building = IndexBuilding(memory, factory, "l2")
        path = building.run()
        files = path.parent.glob(f"{path.name}*")  # lists of a large one lie in their own
        built = {
            "index": factory,
            "train_seconds": building.seconds["train"],
            "add_per_second": memory.n_keys / building.seconds["add"],
            "bytes_a_key": sum(file.stat().st_size for file in files) / memory.n_keys,
        }
        for nprobe in nprobes:
            retriever = open_retriever(memory, Search(factory, "l2", nprobe))
            found = answer(retriever, questions, k)
            rows.append(
                {
                    **about,
                    **built,
                    "nprobe": nprobe,
                    "ms": found.milliseconds,
                    "recall": kept(found, exact),
                    "ppl": perplexity(memory, questions, found, exact=True),
                    "ppl_index_distances": perplexity(memory, questions, found, exact=False),
                    "ways": ways(retriever, questions, k, repeat) if nprobe != "auto" else {},
                }
            )
        path.unlink()
    return rows


def as_table(rows: list[dict]) -> Table:
    """Rows of one size."""
    about = rows[0]
    title = "{keys:,} keys of width {dim}, k = {k}, {queries} queries".format(**about)
    table = Table(title=title)
    columns = ("index", "nprobe", "train s", "add k/s", "bytes a key", "ms a query", "recall")
    for column in (*columns, "ppl", "change", "without stored keys"):
        table.add_column(column, justify="left" if column == "index" else "right")
    exact = about["ppl"]
    for row in rows:
        built = ("", "", "", "")
        if "nprobe" in row:
            rate = row["add_per_second"] / 1000
            built = (f"{row['nprobe']}", f"{row['train_seconds']:.1f}", f"{rate:.0f}")
            built += (f"{row['bytes_a_key']:.0f}",)
        changed = ("", "", "")
        if exact is not None:
            changed = (f"{row['ppl']:.2f}", f"{row['ppl'] / exact - 1:+.2%}")
            changed += (f"{row['ppl_index_distances'] / exact - 1:+.2%}",)
        figures = (f"{row['ms']:.3f}", f"{row['recall']:.3f}")
        table.add_row(row["index"], *built, *figures, *changed)
    return table


def as_table_of_ways(rows: list[dict]) -> Table:
    """Of those rows that have been searched in several ways."""
    table = Table(title="the same lists, milliseconds a query")
    rows = [row for row in rows if row.get("ways")]
    for column in ("index", "nprobe", *(rows[0]["ways"] if rows else ())):
        table.add_column(column, justify="left" if column == "index" else "right")
    for row in rows:
        milliseconds = (f"{value:.4f}" for value in row["ways"].values())
        table.add_row(row["index"], str(row["nprobe"]), *milliseconds)
    return table


def plot(rows: list[dict], path: Path) -> None:
    """Perplexity over queries a second, a panel a size, a line an index, a star its `auto`."""
    from matplotlib.figure import Figure  # an extra
    from matplotlib.ticker import LogLocator, NullLocator

    sizes = sorted({row["keys"] for row in rows})
    figure = Figure(figsize=(6 * len(sizes), 5), layout="constrained")
    for panel, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        of_size = [row for row in rows if row["keys"] == size]
        for index in dict.fromkeys(row["index"] for row in of_size):
            of_index = [row for row in of_size if row["index"] == index]
            auto = [row for row in of_index if row.get("nprobe") == "auto"]
            fixed = [row for row in of_index if row not in auto]
            color = None
            for points, marker, label in ((fixed, "o-", index), (auto, "*", None)):
                rates = [1000 / row["ms"] for row in points]
                perplexities = [row["ppl"] for row in points]
                (line,) = panel.plot(rates, perplexities, marker, color=color, label=label)
                color = line.get_color()
        panel.set(xscale="log", xlabel="queries a second", ylabel="perplexity of the mixture")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.set_title(f"{size:,} keys")
        panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.savefig(path, format="png")


@exit_with_one_sentence
def run(
    memory: Path,
    queries: Path,
    output: Path,
    scores: Path | None = None,
    sizes: list[int] = [10_000, 200_000],  # noqa: B006
    factories: list[str] = list(FACTORIES),  # noqa: B006
    nprobes: list[NProbe] = [8, 16, 32, 64, "auto"],  # noqa: B006
    k: int = 1024,
    limit: int = 4096,
    repeat: int = 3,
    seed: int = 1,
    plot_to: Path | None = None,
    work_dir: Path | None = None,
) -> None:
    """Measures, prints a table a size and writes all of them as JSON.

    Args:
        memory: datastore to search.
        queries: datastore of another split.
        output: JSON file.
        scores: the .npz file of that split's `--token_scores`.
        sizes: numbers of keys; those that the memory does not have are left out.
        factories: faiss strings, in which {lists}, {dim}, {half} and {eighth} of it are filled in.
        nprobes: inverted lists to visit, or `auto`.
        k: neighbours a query.
        limit: queries, a random sample.
        repeat: how often each way of searching is timed.
        seed: of that sample.
        plot_to: PNG file; needs the scores.
        work_dir: where datastores and indexes are made; needs room for the largest size.
    """
    if plot_to is not None and scores is None:
        raise InputError(f"--plot_to {plot_to} shows perplexities; expected --scores with it")
    check_writable(output, "--output")
    check_writable(plot_to, "--plot_to")
    whole = Datastore.open(memory)
    questions = Questions.read(Datastore.open(queries), scores, limit, seed)
    rows: list[dict] = []
    console = Console(width=max(Console(markup=False).width, 120), markup=False)  # a file has 80
    with TemporaryDirectory(dir=work_dir) as folder, progress_bars("indexes") as report:
        for size in sizes:
            if size > whole.n_keys:
                continue
            part = first_keys(whole, size, Path(folder) / str(size))
            found = compare(part, questions, factories, nprobes, min(k, size), repeat, report)
            console.print(as_table(found), as_table_of_ways(found))
            rows += found
            shutil.rmtree(part.path)
    about = {"faiss": faiss.__version__, "threads": faiss.omp_get_max_threads()}
    about |= {"compiled_for": faiss.get_compile_options(), "auto": {}}
    about["auto"] = {size: auto_factory(size, whole.dim) for size in sizes}
    write_all({output: as_json({**about, "rows": rows})})
    if plot_to is not None:
        plot(rows, plot_to)


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
