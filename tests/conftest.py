"""A model trained on a tiny corpus by the programs themselves, a way to run them, and small random
datastores."""

import os

# Two pytest workers with one thread each do not fight over the cores, and figures of one process
# are then those of ranks, which have one thread each, to the last bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import multiprocessing
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from small import ROOT, SMALL, write_corpus

from neighborlm.retrieval.store.datastore import Datastore, DatastoreBuilder

# Processes that tests start take this checkout, even where another one is installed.
os.environ["PYTHONPATH"] = str(ROOT)

LIBRARIES = ["faiss", "jsonargparse", "pytorch_lightning.cli", "tensorboard", "torch_geometric.nn"]
"""What takes long to import of what the programs import."""


def as_program(cwd: Path, program: str, flags: list[str], output: Path) -> None:
    """What a process does that is to run `python PROGRAM.py …` or `python -m MODULE …`."""
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [program, *flags]
    if program.endswith(".py"):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


@pytest.fixture(scope="session")
def run_program(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python PROGRAM.py …` or `python -m MODULE …` of the repository with a folder of its own
    as working directory.

    Programs that start others are run just so; all else in a process that has imported the
    libraries already, which takes longer than most of what the tests do with them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    output = tmp_path_factory.mktemp("output")

    def run(
        cwd: Path, program: str, *flags: object, status: int = 0
    ) -> subprocess.CompletedProcess:
        flags = list(map(str, flags))
        if program == "torch.distributed.run" or "--trainer.devices" in flags:
            what = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
            done = subprocess.run(
                [sys.executable, *what, *flags],
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
                capture_output=True,
                text=True,
                timeout=240,
            )
        else:
            process = context.Process(target=as_program, args=(cwd, program, flags, output))
            process.start()
            process.join(240)
            if process.is_alive():
                process.kill()
                pytest.fail(f"{program} {' '.join(flags)}: still runs after 240 seconds")
            said = [(output / name).read_text() for name in ("stdout", "stderr")]
            done = subprocess.CompletedProcess([program, *flags], process.exitcode, *said)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def run_on_hosts(run_program) -> Callable[..., None]:
    """Runs a program of the repository as two ranks that take themselves for two hosts, each with
    flags of its own."""

    def run(cwd: Path, program: str, flags_of: Callable[[int], tuple]) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]

        def on(number: int) -> None:
            node = ("--nnodes", 2, "--node-rank", number, "--nproc-per-node", 1)
            meeting = ("--rdzv-backend", "static", "--rdzv-endpoint", f"127.0.0.1:{port}")
            trainer = ("--trainer.num_nodes", 2, "--trainer.devices", 1)
            flags = (*flags_of(number), *trainer, "--trainer.strategy", "ddp")
            run_program(cwd, "torch.distributed.run", *node, *meeting, ROOT / program, *flags)

        with ThreadPoolExecutor() as hosts:
            list(hosts.map(on, range(2)))

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
