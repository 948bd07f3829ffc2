"""A model trained on a tiny corpus by the programs themselves, and a way to run them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small import ROOT, SMALL, write_corpus


@pytest.fixture(scope="session")
def run_program() -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python PROGRAM …` from the repository with a folder of its own as working directory."""

    def run(
        cwd: Path, program: str, *flags: object, status: int = 0
    ) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, str(ROOT / program), *map(str, flags)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, run_program) -> Path:
    """A folder with a corpus `words` and the run `runs/words` that train.py made from it."""
    folder = tmp_path_factory.mktemp("workplace")
    write_corpus(folder / "words")
    flags = ("--trainer.max_steps", 40, "--trainer.val_check_interval", 20)
    run_program(folder, "train.py", *SMALL, "--data.corpus", "words", *flags)
    return folder
