"""What the benchmarks of the programs share: a made-up text, runs in processes of their own, what
several runs come to, and what machine it was."""

import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import faiss
import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from rich import box
from rich.table import Table

from neighborlm.datamodules.blocks import BreakMode
from neighborlm.programs import evaluate, train

CONFIGS = Path(__file__).parent.parent / "configs" / "text"


@dataclass(frozen=True)
class Data:
    """How a corpus is read; see --data.* of the programs.

    Args:
        break_mode: where rows end.
        tokens_per_sample: length of a row, its left context included.
        context_window: of an evaluated row.
        threshold: rarer words become <unk>.
        drop_long_lines: leave out what is longer than the model reads.
    """

    break_mode: BreakMode = "complete"
    tokens_per_sample: int = 256
    context_window: int = 170
    threshold: int = 0
    drop_long_lines: bool = False


@dataclass(frozen=True)
class MadeUp:
    """A text and an LM for it, where none are given.

    Args:
        train_tokens: of the training split.
        test_tokens: of either other split.
        words: that the text may have.
        width: of the LM.
        layers: of the LM.
        updates: of the LM that evaluations take.
    """

    train_tokens: int = 217_000
    test_tokens: int = 16_000
    words: int = 20_000
    width: int = 128
    layers: int = 4
    updates: int = 20

    def write(self, folder: Path, seed: int = 0) -> Path:
        """Writes the text: lines of 0 to 110 words, as frequent as Zipf says, every other word one
        of four that may follow the one before it."""
        rng = np.random.default_rng(seed)
        frequency = 1 / np.arange(3, self.words + 3)
        frequency /= frequency.sum()
        following = rng.choice(self.words, (self.words, 4), p=frequency)
        names = np.array([f"w{i}" for i in range(self.words)])
        folder.mkdir(parents=True)
        for split in ("train", "valid", "test"):
            tokens = self.train_tokens if split == "train" else self.test_tokens
            lengths = rng.integers(0, 111, tokens // 56)
            text = rng.choice(self.words, (len(lengths), 110), p=frequency)
            follows = rng.random(text.shape) < 0.5
            which = rng.integers(0, 4, text.shape)
            for place in range(1, 110):
                likely = following[text[:, place - 1], which[:, place]]
                text[:, place] = np.where(follows[:, place], likely, text[:, place])
            lines = [" ".join(names[line[:n]]) for line, n in zip(text, lengths, strict=True)]
            (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
        return folder

    @property
    def training(self) -> list[str]:
        """The command of train.py for the LM, but for the corpus and the number of updates."""
        flags = {"width": self.width, "ffn_width": 4 * self.width, "layers": self.layers}
        flags |= {f"adaptive_{side}_cutoffs": [2000, 6000] for side in ("input", "softmax")}
        command = ["train.py", "--config", f"{CONFIGS}/lm.yaml"]
        return command + [f"--model.{name}={value}" for name, value in flags.items()]


class StepClock(Callback):
    """When each update began and ended, and how many tokens it had."""

    steps: list[tuple[float, float, int]] = []  # noqa: RUF012  read after the run, by the class

    def on_train_batch_start(self, *_) -> None:
        """Begins an update."""
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx
    ) -> None:
        """Ends it."""
        self.steps.append((self.began, time.perf_counter(), int(batch.scored.sum())))


def in_child(send: Connection, log: Path, function: Callable, args: tuple) -> None:
    """Sends what a function gives, and this process's peak of resident memory; what it prints goes
    to a file."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    found = function(*args)
    send.send((found, getrusage(RUSAGE_SELF).ru_maxrss * 1024))


def apart(log: Path, function: Callable, *args) -> tuple[dict, int]:
    """What a function gives in a fresh process, and that process's peak of memory in bytes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.measuring", "torch_geometric.data"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=in_child, args=(send, log, function, args))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise RuntimeError(f"a run failed; {log} ends with:\n{log.read_text()[-2000:]}") from None
    finally:
        process.join()


def program(command: list[str], run_dir: Path, threads: int) -> dict[str, Any]:
    """Runs train.py or evaluate.py; what it says in training.json (nothing after fewer updates than
    it logs at) or results.json."""
    sys.argv = [*command, "--trainer.default_root_dir", str(run_dir), "--threads", str(threads)]
    if command[0] == "train.py":
        train.main()
        said = run_dir / "training.json"
        return json.loads(said.read_text()) if said.is_file() else {}
    cli = evaluate.EvaluateCLI()
    subject = evaluate.subject_of(cli)
    if cli.config.save_datastore or cli.config.build_index:
        return {"stage_seconds": evaluate.make_stages(cli, subject, "train")}
    evaluated = evaluate.evaluate_subject(cli, subject)
    return evaluated.results | {"stage_seconds": evaluated.seconds}


def summary(runs: list[dict], peaks: list[int]) -> dict:
    """What several runs come to.

    Args:
        runs: each with `tokens`, `seconds`, what these were spent on (`seconds_of`) and perhaps the
            mean `loss` of the tokens in nats.
        peaks: resident memory of each.
    """
    rates = [run["tokens"] / run["seconds"] for run in runs]
    scored = [run for run in runs if run.get("loss") is not None]
    loss = sum(run["loss"] * run["tokens"] for run in scored)
    return {
        "tokens_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "peak_bytes": max(peaks),
        "ppl": math.exp(loss / sum(run["tokens"] for run in scored)) if scored else None,
        "share_of_seconds": {
            what: statistics.median(run["seconds_of"].get(what, 0) / run["seconds"] for run in runs)
            for what in runs[0]["seconds_of"]
        },
        "runs": runs,
    }


def new_table(title: str, *columns: str) -> Table:
    """A table with a column for titles and further ones for numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def environment(threads: int) -> dict[str, Any]:
    """Versions, processor, threads and vector instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, np, faiss, pl)},
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "simd": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "faiss": faiss.get_compile_options().strip(),
        },
    }
