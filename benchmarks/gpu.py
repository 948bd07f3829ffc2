"""What an accelerator does with every stage, in one command of a few minutes.

    python -m benchmarks.gpu --output gpu.json
    python -m benchmarks.gpu --output cpu.json --accelerator cpu --made_up.width 64 --updates 20

An LM is trained on a made-up text, in fp32 and in bf16, evaluated, made a datastore of and searched
with, by faiss and by torch; a graph network is trained on top and evaluated. What is timed are the
programs themselves, by the seconds that they report, each in a process of its own. A stage that the
time does not suffice for, if it takes as long as the longest before it, is left out and named.
Prints a table and writes all as JSON.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import CONFIGS, Data, MadeUp, apart, environment, new_table, program
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all


@dataclass(frozen=True)
class Settings:
    """What is measured, and where.

    Args:
        output: JSON file.
        accelerator: of Lightning: gpu, cpu or another that is known.
        seconds: that all of it may take.
        updates: of each training.
        threads: cores of a program.
        k: neighbours of kNN-LM.
        lists: of the index that faiss searches.
        nprobe: lists that a query visits.
        data: how the corpus is read.
        made_up: the text, and the LM's size.
    """

    output: Path
    accelerator: str = "gpu"
    seconds: float = 420.0
    updates: int = 200
    threads: int = torch.get_num_threads()
    k: int = 1024
    lists: int = 1024
    nprobe: int = 32
    data: Data = field(default_factory=lambda: Data("complete", 512, 256))
    made_up: MadeUp = field(
        default_factory=lambda: MadeUp(1_000_000, 50_000, 20_000, width=512, layers=8)
    )


class Stage(NamedTuple):
    """One thing that is timed.

    Attributes:
        title: what the table calls it.
        run: its run directory.
        command: without what all have in common.
        figures: from what it says, and the tokens of the training split, to a rate and, where there
            is one, a perplexity.
    """

    title: str
    run: str
    command: tuple[object, ...]
    figures: Callable[[dict[str, Any], int], tuple[float, float | None]]


def trained(said: dict[str, Any], tokens: int) -> tuple[float, float | None]:
    """Of a training."""
    return said["tokens_per_second"], said["best_valid_ppl"]


def evaluated(section: str | None = None) -> Callable[[dict[str, Any], int], tuple[float, float]]:
    """Of an evaluation, by the section of its results."""

    def figures(said: dict[str, Any], tokens: int) -> tuple[float, float]:
        found = said[section] if section else said
        return found["tokens_per_second"], found["ppl"]

    return figures


def made(*stages: str) -> Callable[[dict[str, Any], int], tuple[float, None]]:
    """Of what made products in some stages."""
    return lambda said, tokens: (tokens / sum(said["stage_seconds"][s] for s in stages), None)


def stages(s: Settings) -> list[Stage]:
    """In the order in which they stand on each other."""
    updates = ("--trainer.max_steps", s.updates, "--trainer.val_check_interval", s.updates)
    updates += ("--trainer.log_every_n_steps", max(s.updates // 10, 1))
    train_lm = (*s.made_up.training, *updates)
    lm = (
        "evaluate.py",
        "--config",
        f"{CONFIGS}/lm.yaml",
        "--ckpt_path",
        "lm/checkpoints/last.ckpt",
    )
    knn = (*lm, "--knn.datastore", "stores/train", "--knn.k", s.k)
    faiss = ("--knn.index", f"IVF{s.lists},SQfp16", "--knn.nprobe", s.nprobe)
    mixed = ("--knnlm", "--knn.lmbda", 0.25)
    gnn = ("--config", f"{CONFIGS}/gnn_lm.yaml", "--neighbors.datastores", "stores")
    train_gnn = ("train.py", *gnn, "--model.lm_checkpoint", lm[-1], *updates)
    evaluate_gnn = ("evaluate.py", *gnn, "--ckpt_path", "gnn/checkpoints/last.ckpt")
    bf16 = ("--trainer.precision", "bf16-mixed")
    return [
        Stage("LM training", "lm", train_lm, trained),
        Stage("LM training, bf16", "lm-bf16", (*train_lm, *bf16), trained),
        Stage("LM evaluation", "lm", lm, evaluated()),
        Stage("LM evaluation, bf16", "lm", (*lm, *bf16), evaluated()),
        Stage("datastore", "lm", (*knn, "--save_datastore"), made("datastore")),
        Stage("index", "lm", (*knn, *faiss, "--build_index"), made("index_train", "index_add")),
        Stage("kNN-LM, faiss", "lm", (*knn, *faiss, *mixed), evaluated("knn")),
        Stage("kNN-LM, torch", "lm", (*knn, *mixed, "--knn.index", "torch"), evaluated("knn")),
        Stage("GNN-LM training", "gnn", train_gnn, trained),
        Stage("GNN-LM evaluation", "gnn", evaluate_gnn, evaluated("gnn")),
        Stage("GNN-LM evaluation, bf16", "gnn", (*evaluate_gnn, *bf16), evaluated("gnn")),
    ]


def measure(s: Settings, folder: Path, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each stage: its title, rate, perplexity and peak of memory; of one that the time
    did not suffice for, the title alone."""
    corpus = s.made_up.write(folder / "corpus")
    words = sum(len(line.split()) + 1 for line in (corpus / "train.txt").open())
    common = [f"--data.{name}={value}" for name, value in asdict(s.data).items()]
    common += [f"--data.corpus={corpus}", f"--data.cache_dir={folder / 'cache'}"]
    common += [f"--trainer.accelerator={s.accelerator}", "--trainer.devices=1"]
    began, longest, rows = time.monotonic(), 0.0, []
    for stage in stages(s):
        start = time.monotonic()
        if start - began + longest > s.seconds:
            report(f"{stage.title}: left out, as {s.seconds:g} seconds do not suffice")
            rows.append({"title": stage.title})
            continue
        report(stage.title)
        command = [*map(str, stage.command[:3]), *common, *map(str, stage.command[3:])]
        run_dir = folder / stage.run
        said, peak = apart(folder / "log.txt", program, command, run_dir, s.threads)
        longest = max(longest, time.monotonic() - start)
        rate, ppl = stage.figures(said, words)
        rows += [{"title": stage.title, "tokens_per_second": rate, "ppl": ppl, "peak_bytes": peak}]
    return rows


def as_table(rows: list[dict[str, Any]]) -> Table:
    """A row a stage."""
    table = new_table("on one device", "tokens (keys) / s", "perplexity", "host memory, MB")
    for row in rows:
        if "ppl" in row:
            ppl = f"{row['ppl']:.2f}" if row["ppl"] else ""
            rate, peak = f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / 1e6:,.0f}"
            table.add_row(row["title"], rate, ppl, peak)
        else:
            table.add_row(row["title"], "left out", "", "")
    return table


@exit_with_one_sentence
def main() -> None:
    """Measures what the command line says."""
    parser = ArgumentParser(description="What an accelerator does with every stage.")
    parser.add_class_arguments(Settings)
    settings = Settings(**parser.instantiate(parser.parse_args()))
    check_writable(settings.output, "--output")
    output, console = settings.output.absolute(), Console(markup=False)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        rows = measure(settings, Path(folder), console.print)
    device = torch.cuda.get_device_name() if settings.accelerator == "gpu" else settings.accelerator
    found = {"device": device, "environment": environment(settings.threads)}
    found |= {"settings": asdict(settings), "rows": rows}
    write_all({output: as_json(found)})
    console.print(as_table(rows))


if __name__ == "__main__":
    main()
