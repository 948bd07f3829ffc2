"""A start of several ranks cannot hang: whichever of them dies, the others end with a sentence."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from several_ranks import CONTEXT
from small import ROOT

from neighborlm.retrieval.cluster.rank_watch import watch_from_the_start

FOLLOW = "from neighborlm.retrieval.cluster.ending import ENDING; import os, sys, time\n"
STARTED = f"{FOLLOW}ENDING.follow_starter(); print('ready', flush=True); time.sleep(60)"
STARTER = f"""{FOLLOW}import subprocess
ENDING.follow_starter()
rank_1 = os.environ | {{"LOCAL_RANK": "1"}}
started = subprocess.Popen([sys.executable, "-c", {STARTED!r}], env=rank_1)
ENDING.follow_started([started])
print(started.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_ranks_that_are_not_connected_yet(killed):
    """The one that started the other, and the one that was started."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTER],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as starter:
        said = sorted(starter.stdout.readline().strip() for _ in range(2))
        os.kill((starter.pid, int(said[0]))[killed], signal.SIGKILL)
        error = starter.stderr.read()  # until both have ended
    assert said[1] == "ready"
    here = socket.gethostname()
    what = ("has ended", "is gone: its process died or its host cannot be reached")[killed]
    assert error == (
        f"error: rank {killed} on {here} {what}; rank {1 - killed} on {here} stops too, and the "
        "same command goes on from what is on disk\n"
    )


def test_a_rank_of_another_launcher_goes_on():
    """As of torchrun that was started by a process with a run of its own behind it."""
    waits = f"{FOLLOW}ENDING.follow_starter(); time.sleep(0.5); print('goes on')"
    launched = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {waits!r}])"
    environment = {"PYTHONPATH": str(ROOT), "NEIGHBORLM_STARTER": str(os.getpid())}
    done = subprocess.run(
        [sys.executable, "-c", launched],
        env={**os.environ, **environment, "LOCAL_RANK": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("goes on\n", "")


def join(rank: int, port: int, folder: Path, patient: bool) -> None:
    """A rank that watches the other, and dies before the process group is made, or waits for it."""
    with open(folder / str(rank), "w") as file:
        os.dup2(file.fileno(), 2)
    watch_from_the_start(rank, 2, ("127.0.0.1", port), False, 30)
    if not patient:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    time.sleep(60)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_before_there_is_a_group(tmp_path, killed):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    ranks = [
        CONTEXT.Process(target=join, args=(rank, port, tmp_path, rank != killed), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    other = ranks[1 - killed]
    other.join(60)
    for process in ranks:
        process.kill()
        process.join()
    assert other.exitcode == 1
    here = socket.gethostname()
    said = (tmp_path / str(1 - killed)).read_text()
    assert f"error: rank {killed} on {here} is gone" in said
    assert f"rank {1 - killed} on {here} stops too" in said
