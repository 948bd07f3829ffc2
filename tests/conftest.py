"""A model trained on a tiny corpus by the programs themselves, a way to run them, and small random
datastores."""

import os

# Two pytest workers with one thread each do not fight over the cores, and figures of one process
# are then those of ranks, which have one thread each, to the last bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import multiprocessing
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from accelerators import ACCELERATORS, STANDIN, skip_without
from running import IMPORTED, Programs
from small import ROOT, SMALL, write_corpus

from neighborlm.retrieval.store.datastore import Datastore, DatastoreBuilder

# Processes that tests start take this checkout, even where another one is installed.
os.environ["PYTHONPATH"] = str(ROOT)
multiprocessing.set_forkserver_preload(IMPORTED)  # before any test starts the one server there is


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run programs come first: where workers take a file at a time, the last ones, which
    only one of them has, are then short."""
    long = {
        item.path
        for item in items
        if "run_program" in item.fixturenames or item.get_closest_marker("slow")
    }
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(params=["cpu", *ACCELERATORS], scope="session")
def device(request) -> str:
    """A device of torch: the CPU, the stand-in accelerator, CUDA."""
    skip_without(request.param)
    return request.param


@pytest.fixture(params=ACCELERATORS, scope="session")
def run_on_accelerator(request, run_program) -> Callable[..., subprocess.CompletedProcess]:
    """As `run_program`, with the model on each accelerator that there is."""
    skip_without(request.param)
    accelerator = "gpu" if request.param == "cuda" else request.param
    # The stand-in is no accelerator of Lightning's own: what lies beside it makes it known first.
    before = (STANDIN / "run",) if request.param == "standin" else ()

    def run(cwd: Path, program: str, *flags: object) -> subprocess.CompletedProcess:
        where = ("--trainer.accelerator", accelerator, "--trainer.devices=1")
        return run_program(cwd, *before, ROOT / program, *flags, *where)

    return run


@pytest.fixture(scope="session")
def run_program(tmp_path_factory) -> Programs:
    """Runs a program of the repository; see `running`."""
    return Programs(tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="session")
def run_on_hosts(run_program) -> Callable[..., None]:
    """Runs a program as two ranks that take themselves for two hosts, with flags of their own."""
    return run_program.on_hosts


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
