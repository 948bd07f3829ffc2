"""Runs programs as processes that are forked from one which has imported them: that takes longer
than most of what the tests do with them. Tests that are about the start itself make processes of
their own."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from small import ROOT

IMPORTED = [
    *(f"neighborlm.programs.{program}" for program in ("train", "evaluate", "generate")),
    "torch_geometric.data",
]
"""By the process from which all others are forked: the programs and what they import, and what
benchmarks import besides."""
SECONDS = 240
"""That a program may take."""


def as_program(
    cwd: Path, program: str, flags: list[str], output: Path, environment: dict[str, str]
) -> None:
    """What a process does that is to run `python PROGRAM.py …` or `python -m MODULE …`."""
    # Its own processes are started in Python's usual way, and not as it was itself.
    multiprocessing.set_start_method(None, force=True)
    # Where the tests run in the background, interrupts are ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [program, *flags]
    if (ROOT / program).is_file():
        runpy.run_path(str(ROOT / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


class Programs:
    """Runs `python PROGRAM.py …` or `python -m MODULE …` of the repository with a folder of its own
    as working directory. Ranks are started as torchrun starts them.

    Args:
        output: an empty folder for what they print.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.started = 0
        self.context = multiprocessing.get_context("forkserver")

    def __call__(
        self, cwd: Path, program: str | Path, *flags: object, status: int = 0
    ) -> subprocess.CompletedProcess:
        """Runs a program, with as many ranks as `--trainer.devices` says.

        Args:
            status: with which it must end.
        """
        given = list(map(str, flags))
        if program == "torch.distributed.run":
            return run_torchrun(cwd, given, status)
        ranks = (
            int(given[given.index("--trainer.devices") + 1]) if "--trainer.devices" in given else 1
        )
        return self.run_ranks(cwd, str(program), [given] * ranks, 1, status)

    def on_hosts(self, cwd: Path, program: str, flags_of: Callable[[int], tuple]) -> None:
        """Runs a program as two ranks that take themselves for two hosts.

        Args:
            flags_of: flags by the number of the host.
        """
        trainer = ("--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp")
        flags = [list(map(str, (*flags_of(number), *trainer))) for number in range(2)]
        self.run_ranks(cwd, program, flags, 2, 0)

    def start(
        self, cwd: Path, program: str, flags: Sequence[Sequence[object]], hosts: int = 1
    ) -> list[BaseProcess]:
        """A process for each list of flags, its name the folder of what it prints."""
        environments = [{}] if len(flags) == 1 else environments_of(len(flags), hosts)
        processes = []
        for own, environment in zip(flags, environments, strict=True):
            place = self.output / str(self.started)
            place.mkdir()
            self.started += 1
            arguments = (cwd, program, list(map(str, own)), place, environment)
            process = self.context.Process(target=as_program, args=arguments, name=str(place))
            process.start()
            processes.append(process)
        return processes

    def run_ranks(
        self, cwd: Path, program: str, flags: Sequence[list[str]], hosts: int, status: int
    ) -> subprocess.CompletedProcess:
        """A process for each list of flags; what the first prints, and the worst status."""
        processes = self.start(cwd, program, flags, hosts)
        deadline = time.monotonic() + SECONDS
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        if any(process.is_alive() for process in processes):
            for process in processes:
                process.kill()
            pytest.fail(f"{program} {' '.join(flags[0])}: still runs after {SECONDS} seconds")
        said = [text_of(processes[0], name) for name in ("stdout", "stderr")]
        found = max((process.exitcode for process in processes), key=abs)
        assert found == status, "\n".join(
            text_of(process, name) for process in processes for name in ("stdout", "stderr")
        )
        return subprocess.CompletedProcess([program, *flags[0]], found, *said)


def text_of(process: BaseProcess, name: Literal["stdout", "stderr"]) -> str:
    """What a process of `Programs` has printed."""
    return (Path(process.name) / name).read_text()


def half_written(store: Path) -> bool:
    """Whether keys have come into a datastore that is not complete."""
    if not (store / "written.npy").exists():
        return False
    return bool(np.load(store / "keys.npy", mmap_mode="r").any())


def kill_last_when(condition: Callable[[], bool], processes: list[BaseProcess]) -> None:
    """Kills the last rank once the condition holds; the others must end of themselves then."""
    deadline = time.monotonic() + SECONDS / 2
    try:
        while not condition():
            assert processes[-1].is_alive(), "the program ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        processes[-1].kill()
        for process in processes:
            process.join(timeout=30)
            assert process.exitcode not in (0, None)
    finally:
        for process in processes:
            process.kill()


def environments_of(ranks: int, hosts: int) -> list[dict[str, str]]:
    """What torchrun tells each rank."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    on_host = ranks // hosts
    return [
        meeting
        | {"RANK": str(rank), "WORLD_SIZE": str(ranks), "GROUP_RANK": str(rank // on_host)}
        | {"LOCAL_RANK": str(rank % on_host), "LOCAL_WORLD_SIZE": str(on_host)}
        for rank in range(ranks)
    ]


def run_torchrun(cwd: Path, flags: list[str], status: int) -> subprocess.CompletedProcess:
    """`torchrun …` itself."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *flags],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done
