"""The record of an evaluation: a file of its own, `evaluations/<name>.json` in the run directory,
that holds the results and all that they depend on, so that no evaluation takes another's place.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytorch_lightning as pl
import torch


def code() -> dict[str, str | None]:
    """The version of this code and its commit, `-dirty` behind it where files differ from it; None
    of code that is no checkout."""
    return {"neighborlm": import_module("neighborlm").__version__, "commit": _commit()}


@dataclass(frozen=True)
class Record:
    """What is known of an evaluation before it begins.

    Attributes:
        directory: of the run.
        split: that is evaluated.
        arch: what kind of model, see `ARCHITECTURES`.
        memories: that are mixed with it.
        settings: all of them, JSON-able, by section.
        mixer: that weighs the memories.
        time: when it began.
        code: what computed it.
    """

    directory: Path
    split: str
    arch: str
    memories: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    mixer: str = "constant"
    time: datetime = field(default_factory=lambda: datetime.now().astimezone())
    code: Mapping[str, str | None] = field(default_factory=code)

    @property
    def name(self) -> str:
        """What tells it from others: split, model, memories and time, to the millisecond, as
        several commands may begin at once.

        >>> time = datetime(2026, 1, 31, 9, 5, 2, 250_000)
        >>> Record(Path("runs/mine"), "test", "lm", ["knn", "ngram"], time=time).name
        'test-lm-knn+ngram-20260131-090502-250'
        """
        mixer = () if self.mixer == "constant" else (self.mixer,)
        parts = (self.split.replace(":", "_"), self.arch, "+".join(self.memories), *mixer)
        time = f"{self.time:%Y%m%d-%H%M%S}-{self.time.microsecond // 1000:03}"
        return "-".join([*filter(None, parts), time])

    @property
    def path(self) -> Path:
        """Its file."""
        return self.directory / "evaluations" / f"{self.name}.json"

    def content(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """What the file holds.

        Args:
            results: see `programs.subject.Evaluated`; unit, split and window are among them.
        """
        return {
            "name": self.name,
            "time": self.time.isoformat(timespec="seconds"),
            "command": sys.argv,
            "code": dict(self.code),
            "libraries": versions(),
            "settings": dict(self.settings),
            "results": dict(results),
        }


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide figures."""
    libraries = {"torch": torch, "faiss": faiss, "numpy": np, "pytorch-lightning": pl}
    used = ("transformers", "tokenizers", "datasets")
    libraries |= {name: sys.modules[name] for name in used if name in sys.modules}
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: str(m.__version__) for name, m in libraries.items()}}


def _commit() -> str | None:
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ("git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40")
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no git here, or not this user's checkout
        return None
    return done.stdout.strip()
