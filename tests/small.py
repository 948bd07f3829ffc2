"""A corpus and a model small enough for tests that run the programs, and what these have logged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

ROOT = Path(__file__).parent.parent

SMALL = (
    *("--config", str(ROOT / "configs/text/lm.yaml")),
    *("--data.tokens_per_sample", "24", "--data.context_window", "12"),
    *("--data.max_tokens", "96", "--data.threshold", "0"),
    *("--model.width", "16", "--model.ffn_width", "32", "--model.layers", "2"),
    *("--model.heads", "2", "--model.adaptive_input_cutoffs", "[12,24]"),
    *("--model.adaptive_softmax_cutoffs", "[12,24]", "--model.dropout", "0"),
    *("--model.softmax_dropout", "0", "--trainer.enable_progress_bar", "false"),
    *("--model.lr", "0.02", "--model.warmup_updates", "5"),
)
"""Flags that make the shipped config for any text small."""


def write_corpus(folder: Path, seed: int = 0, lines: tuple[int, int, int] = (120, 30, 30)) -> Path:
    """A text with some structure: words of a ring that follow one another more often than not."""
    rng = np.random.default_rng(seed)
    words = np.array([f"w{i}" for i in range(40)])
    folder.mkdir(parents=True)
    for split, n_lines in zip(("train", "valid", "test"), lines, strict=True):
        text = []
        for _ in range(n_lines):
            length = rng.integers(0, 18)
            steps = np.where(rng.random(length) < 0.8, 1, rng.integers(0, 40, length))
            text.append(" ".join(words[np.cumsum(steps) % 40]))
        (folder / f"{split}.txt").write_text("\n".join(text) + "\n")
    return folder


def scalars(folder) -> dict[str, list]:
    """All scalars logged below a folder."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def logged_by(results: dict[str, Any], folder: Path) -> Path:
    """Where an evaluation has logged that a folder was the working directory of."""
    record = folder / results["record"]
    return record.parent.parent / "evaluate" / record.stem


def hyperparameters(folder) -> tuple[dict[str, Any], set[str]]:
    """Settings that were logged below a folder, and the names of the figures that belong to
    them."""
    found = EventAccumulator(str(folder)).Reload().summary_metadata
    settings, figures = {}, set()
    for tag in ("_hparams_/experiment", "_hparams_/session_start_info"):
        data = HParamsPluginData.FromString(found[tag].plugin_data.content)
        figures |= {metric.name.tag for metric in data.experiment.metric_infos}
        for name, value in data.session_start_info.hparams.items():
            settings[name] = getattr(value, value.WhichOneof("kind"))
    return settings, figures


def without_digests(path: Path, **fields: Any) -> dict[str, Any]:
    """Makes a manifest one of an earlier version, which had no digests, with other values of some
    fields; returns it."""
    manifest = json.loads(path.read_text()) | fields
    for name in ("digest", "files", "checksums"):
        manifest.pop(name, None)
    path.write_text(json.dumps(manifest))
    return manifest
