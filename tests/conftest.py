"""A model trained on a tiny corpus by the programs themselves, a way to run them, and small random
datastores."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from small import ROOT, SMALL, write_corpus

from retrieval.datastore import Datastore, DatastoreBuilder


@pytest.fixture(scope="session")
def run_program() -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python PROGRAM.py …` or `python -m MODULE …` of the repository with a folder of its own
    as working directory."""

    def run(
        cwd: Path, program: str, *flags: object, status: int = 0
    ) -> subprocess.CompletedProcess:
        what = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
        done = subprocess.run(
            [sys.executable, *what, *map(str, flags)],
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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of so small tasks spend their time waiting for one another."""
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.fixture
def make_store(tmp_path) -> Callable[..., tuple[Datastore, np.ndarray, np.ndarray]]:
    """Makes a datastore of random keys; returns it with the keys (fp32) and values."""

    def make(
        rows: int = 300, dim: int = 8, dtype: str = "fp32", masked=(), name: str = "store"
    ) -> tuple[Datastore, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        keys = rng.normal(size=(rows, dim)).astype(np.float32)
        values = rng.integers(0, 50, rows)
        builder = builder_of(tmp_path / name, rows, dim, dtype, np.array(masked, dtype=np.int64))
        builder.write(np.arange(rows), keys, values)
        builder.sync()
        store = builder.finish()
        return store, store.keys.astype(np.float32), values

    return make


def builder_of(path: Path, rows=300, dim=8, dtype="fp32", masked=(), **made_from):
    """A builder with everything but its place given."""
    made_from = {"model": "m", **made_from}
    return DatastoreBuilder(path, rows, dim, dtype, 50, made_from, np.array(masked, dtype=np.int64))


@pytest.fixture
def new_builder() -> Callable[..., DatastoreBuilder]:
    """`builder_of`."""
    return builder_of
