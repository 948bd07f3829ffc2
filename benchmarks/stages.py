"""Times every stage from a trained LM to an evaluated GNN-LM, beside the same done plainly.

    python -m benchmarks.stages --output stages.json
    python -m benchmarks.stages --output stages.json --corpus DIR --ckpt_path CKPT --only lm knn

By default on a made-up text with a model that was hardly trained: nothing is downloaded. What is
timed are the programs themselves, by the seconds that they report; benchmarks/plain.py says what
is plain. Each run is a process of its own, forked from one that has imported everything, and so
has its own peak of memory. Prints tables and writes all as JSON.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import faiss
import torch
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from benchmarks import plain
from benchmarks.measuring import (
    CONFIGS,
    Data,
    MadeUp,
    apart,
    environment,
    new_table,
    program,
    summary,
)
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all

LM = ("evaluate.py", "--config", f"{CONFIGS}/lm.yaml", "--ckpt_path", "{lm}")
KNN = (*LM, "--knn.datastore", "{stores}/train", "--knn.k", "{k}")
PQ = (*KNN, "--knn.index", "{index}", "--knn.nprobe", "{nprobe}")
GNN = ("--config", f"{CONFIGS}/gnn_lm.yaml", "--neighbors.datastores", "{stores}")
TRAIN_GNN = ("train.py", *GNN, "--model.lm_checkpoint", "{lm}", "--trainer.max_steps")
SHORT = ("--trainer.limit_test_batches", "2")
"""To warm up where nothing is made."""
ONE_UPDATE = ("1", "--trainer.log_every_n_steps", "1", "--data.max_tokens", "256")


@dataclass(frozen=True)
class Stage:
    """One thing that is timed.

    Attributes:
        title: what tables call it.
        command: what is run, with places for what differs.
        plain: the stage of benchmarks/plain.py that it is compared with.
        after: the stage whose products it works on.
        makes: whether it adds to them, so that each run needs them without what it adds.
    """

    title: str
    command: tuple[str, ...]
    plain: str
    after: str | None = None
    makes: bool = False


STAGES = {
    "lm": Stage("LM evaluation", LM, "lm"),
    "datastore": Stage("datastore", (*KNN, "--save_datastore"), "datastore", makes=True),
    "index-auto": Stage("auto index", (*KNN, "--build_index"), "index", "datastore", True),
    "index": Stage("{index}", (*PQ, "--build_index"), "index", "index-auto", True),
    "knn-auto": Stage("kNN-LM, auto", (*KNN, "--knnlm"), "knn", "index"),
    "knn": Stage("kNN-LM, {index}", (*PQ, "--knnlm"), "knn", "index"),
    "knn-inexact": Stage(
        "… its own distances",
        (*PQ, "--knnlm", "--knn.distances", "index"),
        "knn-inexact",
        "index",
    ),
    "tuning": Stage("tuning, auto", (*KNN, "--knnlm", "--knn.lmbda", "auto"), "knn", "index"),
    "tables": Stage("neighbour tables", (*TRAIN_GNN, *ONE_UPDATE), "tables", "index", True),
    "gnn-training": Stage(
        "GNN-LM training", (*TRAIN_GNN, "{updates}"), "gnn-training", "tables", True
    ),
    "gnn": Stage(
        "GNN-LM evaluation", ("evaluate.py", *GNN, "--ckpt_path", "{gnn}"), "gnn", "gnn-training"
    ),
}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Args:
        output: JSON file.
        corpus: folder of text or data-bin; by default a text is made up.
        ckpt_path: trained LM; by default one is made by a few updates.
        only: the stages to measure.
        repeat: runs that count, after one to warm up.
        threads: of our programs; the plain stages have one.
        work_dir: an empty or missing folder to make all in; by default a temporary one.
        without_plain: leave out the plain stages.
        split: to evaluate; tuning takes valid.
        data: how the corpus is read.
        made_up: what is measured where no corpus or no model is given.
        index: the papers' kind, `IVF<lists>,PQ<bytes>`, with few enough lists for few keys.
        nprobe: lists of `index` to visit.
        k: neighbours of kNN-LM.
        lmbda: weight of p_kNN.
        grid: values of lmbda that plain tuning evaluates.
        updates: of the GNN-LM, a multiple of 20.
    """

    output: Path
    corpus: str | None = None
    ckpt_path: str | None = None
    only: tuple[str, ...] = tuple(STAGES)
    repeat: int = 3
    threads: int = os.cpu_count() or 1
    work_dir: Path | None = None
    without_plain: bool = False
    split: str = "test"
    data: Data = field(default_factory=Data)
    made_up: MadeUp = field(default_factory=MadeUp)
    index: str = "IVF64,PQ16"
    nprobe: int = 32
    k: int = 1024
    lmbda: float = 0.25
    grid: int = 10
    updates: int = 20


class Workplace:
    """A corpus, a model, and what the stages make of them.

    Args:
        settings: see `Settings`.
        folder: where all of it lies.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = s = settings
        self.folder = folder
        corpus = s.corpus or str(s.made_up.write(folder / "corpus"))
        self.data = {**asdict(s.data), "corpus": corpus, "cache_dir": str(folder / "cache")}
        data = LMDataModule(**self.data)
        rows = {n: data.rows(n, s.data.context_window) for n in {"train", "valid", s.split}}
        self.tokens = {n: int((r.ends - r.starts).sum()) for n, r in rows.items()}
        self.vocab_size = data.vocab_size
        self.places = asdict(s) | {
            "lm": Path(s.ckpt_path) if s.ckpt_path else self.make_lm(),
            "gnn": folder / "runs" / "gnn-training-0" / "checkpoints" / "last.ckpt",
        }

    def make_lm(self) -> Path:
        """A hardly trained LM, by train.py."""
        made_up = self.settings.made_up
        command = [*made_up.training, "--trainer.max_steps", str(made_up.updates)]
        self.run_program("lm-training", 0, command)
        return self.folder / "runs" / "lm-training-0" / "checkpoints" / "last.ckpt"

    def run_program(self, name: str, run: int, command: list[str]) -> tuple[dict, int]:
        """Runs a program on this corpus; what it says, and its peak of memory."""
        s = self.settings
        flags = [f"--data.{name}={value}" for name, value in self.data.items()]
        if command[0] == "evaluate.py":
            flags += ["--split", s.split]
        if "--knnlm" in command:
            flags += ["--knn.lmbda", str(s.lmbda)]
        command = [*command[:3], *flags, *command[3:]]  # what the stage sets comes last
        run_dir = self.folder / "runs" / f"{name}-{run}"
        return apart(self.folder / f"{name}.log", program, command, run_dir, s.threads)

    def stores(self, name: str, run: int = 0) -> Path:
        """The folder of datastores that a run of a stage reads, or makes something in."""
        stage = STAGES[name]
        if not stage.makes:
            return self.stores(stage.after) if stage.after else self.folder
        folder = self.folder / "stores" / f"{name}-{run}"
        if stage.after and not folder.exists():
            shutil.copytree(self.stores(stage.after), folder, copy_function=os.link)
        return folder

    def ours(self, name: str, runs: int) -> tuple[list[dict], list[int]]:
        """Runs of a stage by our programs: what each said, and its peak of memory. Of products
        those of the first run stay."""
        said, peaks = [], []
        for run in range(runs):
            stores = self.stores(name, run)
            parts = (*STAGES[name].command, *(SHORT if run == 0 and not STAGES[name].makes else ()))
            command = [part.format(**self.places, stores=stores) for part in parts]
            found, peak = self.run_program(name, run, command)
            said.append(found)
            peaks.append(peak)
            if run and STAGES[name].makes:
                shutil.rmtree(stores)
        return said, peaks

    def plain(self, name: str) -> tuple[list[dict[str, dict]], list[int]]:
        """The parts of a plain stage: what each did, and its peak of memory."""
        s = self.settings
        setup = plain.Setup(
            data=self.data,
            split=s.split,
            lm=self.places["lm"],
            gnn=self.places["gnn"],
            stores=self.stores(name),
            scratch=self.folder,
            index=s.index,
            nprobe=s.nprobe,
            k=s.k,
            lmbda=s.lmbda,
            neighbors=yaml.safe_load((CONFIGS / "gnn_lm.yaml").read_text())["neighbors"],
            tokens=self.tokens[s.split] // s.repeat,
            parts=s.repeat,
        )
        log = self.folder / f"{name}-plain.log"
        parts = range(s.repeat)
        runs = [apart(log, plainly, STAGES[name].plain, setup, part) for part in parts]
        return [found for found, _ in runs], [peak for _, peak in runs]

    def needed(self) -> list[str]:
        """The stages to run: those asked for and those that they stand on."""
        names = set(self.settings.only)
        for name in reversed(STAGES):
            if name in names and STAGES[name].after:
                names.add(STAGES[name].after)
        return [name for name in STAGES if name in names]

    def measure(self, report: Callable[[str], None]) -> list[dict]:
        """One entry a row of the tables."""
        s, rows, plainly_done = self.settings, [], {}
        for name in self.needed():
            stage = STAGES[name]
            title = stage.title.format(**self.places)
            report(f"{name}: {title}")
            if name not in s.only:
                self.ours(name, 1)
                continue
            said, peaks = self.ours(name, 1 + s.repeat)
            runs = [figures(name, run, self.tokens) for run in said[1:]]
            if not s.without_plain and stage.plain not in plainly_done and runs[0]:
                report("  … plainly")
                plainly_done[stage.plain] = self.plain(name)
            for part in runs[0]:
                row = {"stage": name, "title": " ".join(filter(None, (title, part)))}
                row["ours"] = summary([run[part] for run in runs], peaks[1:])
                if stage.plain in plainly_done:
                    done, plain_peaks = plainly_done[stage.plain]
                    theirs = summary([run[part] for run in done], plain_peaks)
                    if name == "tuning":  # a pass for each value of lmbda
                        for rate in ("tokens_per_second", "slowest", "fastest"):
                            theirs[rate] /= s.grid
                    row["plain"] = theirs
                    row["ratio"] = row["ours"]["tokens_per_second"] / theirs["tokens_per_second"]
                rows.append(row)
        return rows


def plainly(name: str, setup: plain.Setup, part: int) -> dict[str, dict]:
    """Runs a plain stage with one thread."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    return plain.STAGES[name](setup, part)


def figures(name: str, said: dict[str, Any], tokens: dict[str, int]) -> dict[str, dict]:
    """What one run of a stage comes to, by what it is called beside the title; see
    `measuring.summary`."""
    seconds = said["stage_seconds"]

    def one(count: int, seconds: float, loss: float | None = None, **of: float) -> dict:
        return {"tokens": count, "seconds": seconds, "loss": loss, "seconds_of": of}

    match name:
        case "lm":
            return {"": one(said["tokens"], said["seconds"], said["loss"])}
        case "datastore":
            return {"": one(tokens["train"], seconds["datastore"])}
        case "index-auto" | "index":
            parts = {"training": "index_train", "adding": "index_add"}
            made = {part: key for part, key in parts.items() if key in seconds}  # none of flat
            return {part: one(tokens["train"], seconds[key]) for part, key in made.items()}
        case "tuning":
            return {"": one(tokens["valid"], seconds["tuning"], said["knn"]["loss"])}
        case "tables":
            return {"": one(tokens["train"], seconds["neighbors_train"])}
        case "gnn-training":
            return {"": one(said["tokens_per_second"], 1.0)}
        case "gnn":
            return {"": one(said["tokens"], said["gnn"]["seconds"], said["gnn"]["loss"])}
    knn = said["knn"]
    of = {"model": said["seconds"], **knn.get("seconds_of", {})}
    return {"": one(knn["tokens"], knn["seconds"], knn["loss"], **of)}


def as_tables(rows: list[dict], repeat: int) -> list[Table]:
    """Rates; memory and perplexities; what seconds were spent on."""
    kinds = ("model", "search", "rescore", "mix", "wait")
    rates = new_table(
        f"tokens (index: keys) per second, median of {repeat} runs; slowest to fastest of ours",
        *("ours", "", "plain", "ratio"),
    )
    others = new_table(
        "peak of resident memory in MB, and perplexity", *("ours", "plain", "ours", "plain")
    )
    shares = new_table("share of a pass; ours searches while the model computes", *kinds)
    for row in rows:
        ours, theirs = row["ours"], row.get("plain")
        both = [ours, *([theirs] if theirs else [])]
        rates.add_row(
            row["title"],
            f"{ours['tokens_per_second']:,.0f}",
            f"{ours['slowest']:,.0f} – {ours['fastest']:,.0f}",
            *([f"{theirs['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}"] if theirs else []),
        )
        memory = [f"{of['peak_bytes'] / 1e6:,.0f}" for of in both]
        ppl = [f"{of['ppl']:.2f}" if of["ppl"] else "" for of in both]
        others.add_row(row["title"], *memory, *([] if theirs else [""]), *ppl)
        for title, of in zip((row["title"], "… plain"), both, strict=False):
            of = of["share_of_seconds"]
            if row["stage"].startswith("knn") and of:
                shares.add_row(title, *(f"{of[kind]:.0%}" if kind in of else "" for kind in kinds))
    return [table for table in (rates, others, shares) if table.row_count]


def parsed() -> Settings:
    """The command line."""
    parser = ArgumentParser(description="Times every stage beside the same done plainly.")
    parser.add_class_arguments(Settings, skip={"only"})
    parser.add_argument(
        "--only", nargs="+", choices=list(STAGES), default=list(STAGES), help="stages to measure"
    )
    return Settings(**parser.instantiate(parser.parse_args()))


@exit_with_one_sentence
def main() -> None:
    """Measures what the command line says."""
    settings = parsed()
    check_writable(settings.output, "--output")
    console = Console(markup=False)
    with ExitStack() as stack:
        folder = settings.work_dir
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        workplace = Workplace(settings, folder.resolve())
        rows = workplace.measure(console.print)
    found = {
        "environment": environment(settings.threads),
        "settings": asdict(settings),
        "tokens": workplace.tokens,
        "vocabulary": workplace.vocab_size,
        "rows": rows,
    }
    write_all({settings.output: as_json(found)})
    for table in as_tables(rows, settings.repeat):
        console.print(table)


if __name__ == "__main__":
    main()
