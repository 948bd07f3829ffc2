"""Times train.py beside the same training in a bare loop of torch: the same batches, model,
optimiser, schedule and clipping, and no Lightning.

    python -m benchmarks.training --output training.json [--variants default compile bf16]

By default on a made-up text. Each run is a process of its own, ours and bare by turns; the first
updates of each do not count. Variants other than these three leave out a part of what train.py does
besides, to find what it costs. Prints a table and writes all as JSON.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from torch import nn

from benchmarks.measuring import (
    Data,
    MadeUp,
    StepClock,
    apart,
    environment,
    new_table,
    program,
    summary,
)
from neighborlm.datamodules.lm import LMBatch, LMDataModule
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all

VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "compile": ("--model.compile", "true"),
    "bf16": ("--trainer.precision", "bf16-mixed"),
    "no-clipping": ("--trainer.gradient_clip_val", "null"),
    "no-bar": ("--trainer.enable_progress_bar", "false"),
    "no-logging": ("--trainer.log_every_n_steps", "1000000"),
    "no-bar-no-logging": (
        *("--trainer.enable_progress_bar", "false"),
        *("--trainer.log_every_n_steps", "1000000"),
    ),
}
ALSO_BARE = ("default", "compile", "bf16", "no-clipping")


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Args:
        output: JSON file.
        corpus: folder of text or data-bin; by default a text is made up.
        repeat: runs that count, after one to warm up.
        threads: of torch.
        work_dir: an empty or missing folder to make all in; by default a temporary one.
        updates: of each run that count.
        first: updates of each run that do not.
        max_tokens: of a batch.
        data: how the corpus is read.
        made_up: the text, where none is given, and the LM.
        variants: which to measure.
    """

    output: Path
    corpus: str | None = None
    repeat: int = 3
    threads: int = os.cpu_count() or 1
    work_dir: Path | None = None
    updates: int = 60
    first: int = 20
    max_tokens: int = 2048
    data: Data = field(default_factory=Data)
    made_up: MadeUp = field(default_factory=MadeUp)
    variants: tuple[str, ...] = ("default",)


def by_lightning(command: list[str], run_dir: Path, threads: int, first: int) -> dict[str, Any]:
    """Runs train.py; tokens, seconds, and how many of these passed between updates, where the
    loader works."""
    program([*command, "--trainer.callbacks+=benchmarks.measuring.StepClock"], run_dir, threads)
    return counted(StepClock.steps, first)


def counted(steps: list[tuple[float, float, int]], first: int) -> dict[str, Any]:
    """What the updates after the first come to."""
    start, kept = steps[first - 1][1], steps[first:]
    seconds = kept[-1][1] - start
    between = seconds - sum(end - began for began, end, _ in kept)
    tokens = sum(tokens for *_, tokens in kept)
    return {"tokens": tokens, "seconds": seconds, "seconds_of": {"between updates": between}}


def bare(config: Path, threads: int, first: int) -> dict[str, Any]:
    """Trains as a resolved config.yaml of train.py says."""
    torch.set_num_threads(threads)
    said = yaml.safe_load(config.read_text())
    pl.seed_everything(said["seed_everything"])
    data = LMDataModule(**said["data"])
    model = TransformerLM(**{**said["model"], "vocab_size": data.vocab_size})
    data.max_target_positions = model.max_target_positions
    made = model.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    clip = said["trainer"]["gradient_clip_val"]
    bf16 = said["trainer"]["precision"] == "bf16-mixed"
    model.train()
    steps = []
    batches = endless(data)
    for _ in range(said["trainer"]["max_steps"]):
        batch = next(batches)
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = -model.training_log_probs(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        steps.append((began, time.perf_counter(), int(batch.scored.sum())))
    return counted(steps, first)


def endless(data: LMDataModule) -> Iterator[LMBatch]:
    """The training batches, epoch after epoch."""
    loader = data.train_dataloader()
    while True:
        yield from loader


def measure(settings: Settings, folder: Path, report=print) -> list[dict]:
    """One entry a variant and way."""
    s = settings
    corpus = s.corpus or str(s.made_up.write(folder / "corpus"))
    data = {**asdict(s.data), "corpus": corpus, "cache_dir": str(folder / "cache")}
    command = [*s.made_up.training, "--data.max_tokens", str(s.max_tokens)]
    command += [f"--data.{name}={value}" for name, value in data.items()]
    command += ["--trainer.max_steps", str(s.first + s.updates)]
    rows = []
    for variant in s.variants:
        runs: dict[str, list] = {"train.py": [], "bare": []}
        for run in range(1 + s.repeat):
            report(f"{variant}, run {run}")
            run_dir = folder / f"{variant}-{run}"
            log = folder / f"{variant}.log"
            flags = [*command, *VARIANTS[variant]]
            runs["train.py"].append(apart(log, by_lightning, flags, run_dir, s.threads, s.first))
            if variant in ALSO_BARE:
                config = run_dir / "config.yaml"
                runs["bare"].append(apart(log, bare, config, s.threads, s.first))
        for way, found in runs.items():
            if found:
                done, peaks = zip(*found[1:], strict=True)
                rows.append({"variant": variant, "way": way, **summary(list(done), list(peaks))})
    return rows


def parsed() -> Settings:
    """The command line."""
    parser = ArgumentParser(description="Times train.py beside a bare loop of torch.")
    parser.add_class_arguments(Settings, skip={"variants"})
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=["default"], help="what to measure"
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
        rows = measure(settings, folder.resolve(), console.print)
    of_bare = {row["variant"]: row["tokens_per_second"] for row in rows if row["way"] == "bare"}
    table = new_table(
        f"training, tokens per second: median of {settings.repeat} runs; slowest to fastest",
        *("", "", "of bare", "between", "MB"),
    )
    for row in rows:
        known = of_bare.get(row["variant"], of_bare.get("default"))
        row["of_bare"] = row["tokens_per_second"] / known if known else None
        table.add_row(
            f"{row['variant']}, {row['way']}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['slowest']:,.0f} – {row['fastest']:,.0f}",
            f"{row['of_bare']:.1%}" if known else "",
            f"{row['share_of_seconds']['between updates']:.1%}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
        )
    found = {"environment": environment(settings.threads), "settings": asdict(settings)}
    write_all({settings.output: as_json({**found, "rows": rows})})
    console.print(table)


if __name__ == "__main__":
    main()
