"""A rank that dies makes the others stop with one sentence, in bounded time; the same command then
goes on from what is on disk."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from running import half_written, kill_last_when, text_of
from small import ROOT, SMALL

from neighborlm.callbacks.lightning_internals import Continuation
from neighborlm.common.errors import InputError
from neighborlm.programs.checkpoints import load_model

HERE = (*SMALL, "--data.corpus", "words")
CKPT = ("--ckpt_path", "runs/words/checkpoints/best.ckpt")
TWO = ("--trainer.devices", 2, "--trainer.strategy", "ddp")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")


def start(cwd: Path, *command: object) -> subprocess.Popen:
    """Python with a program of the repository, which starts its other ranks itself; its messages in
    cwd/errors."""
    with open(cwd / "errors", "w") as errors:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=errors,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def of_rank_1(process: subprocess.Popen) -> int | None:
    """The process of rank 1 below another one."""
    below = [process.pid]
    for pid in below:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            below += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:
            continue
        if b"LOCAL_RANK=1" in environment:
            return pid
    return None


def kill_rank_1_when(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the program ended before its rank could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(of_rank_1(process), signal.SIGKILL)


def check_sentence(said: str) -> None:
    """That names the rank and its host, and no traceback."""
    host = re.escape(socket.gethostname())
    sentence = rf"^error: rank 1 on {host} is gone.*; rank 0 on {host} stops too.*on disk$"
    assert len(re.findall(sentence, said, re.MULTILINE)) == 1, said
    assert "Traceback" not in said


@pytest.fixture
def folder(workplace, tmp_path):
    """A folder of its own beside the workplace's corpus and run."""
    for name in ("words", "runs"):
        (tmp_path / name).symlink_to(workplace / name)
    return tmp_path


@pytest.mark.parametrize("launch", [(), (*TORCHRUN, 2)], ids=["lightning", "torchrun"])
def test_evaluation_loses_a_rank(folder, run_program, launch):
    flags = (*HERE, *CKPT, "--save_datastore", "--data.max_tokens", 24, "--knn.datastore", "store")
    process = start(folder, *launch, ROOT / "evaluate.py", *flags, *TWO)
    kill_rank_1_when(lambda: half_written(folder / "store"), process)
    assert process.wait(timeout=30) != 0
    said = (folder / "errors").read_text()
    if not launch:
        check_sentence(said)
    else:  # which ends its processes by itself
        assert "error: rank 1" in said
    assert not json.loads((folder / "store/manifest.json").read_text())["complete"]
    run_program(folder, "evaluate.py", *flags, *TWO)
    assert json.loads((folder / "store/manifest.json").read_text())["complete"]


def test_training_loses_a_rank_while_it_makes_a_datastore(folder, run_program):
    flags = (
        *("--config", ROOT / "configs/text/gnn_lm.yaml", "--data.corpus", "words"),
        *("--data.tokens_per_sample", 24, "--data.context_window", 12, "--data.max_tokens", 24),
        *("--data.threshold", 0, "--neighbors.k", 4, "--neighbors.exclude_window", 30),
        *("--neighbors.datastores", "stores", "--trainer.default_root_dir", "run"),
        *("--model.lm_checkpoint", CKPT[1], "--model.heads", 2, "--model.warmup_updates", 5),
        *("--trainer.max_steps", 4, "--trainer.val_check_interval", 2),
        *("--trainer.enable_progress_bar", "false", *TWO),
    )
    processes = run_program.start(folder, "train.py", [flags] * 2)
    kill_last_when(lambda: half_written(folder / "stores/train"), processes)
    check_sentence(text_of(processes[0], "stderr"))
    run_program(folder, "train.py", *flags)
    assert load_model(folder / "run/checkpoints/last.ckpt").updates == 4


def test_training_loses_a_rank_between_updates(folder, run_program):
    flags = (*HERE, *TWO, "--trainer.default_root_dir", "run", "--trainer.val_check_interval", 20)
    flags = (*flags, "--checkpoint_every", 5, "--trainer.max_steps")
    processes = run_program.start(folder, "train.py", [(*flags, 100000)] * 2)
    kill_last_when((folder / "run/checkpoints/last.ckpt").exists, processes)
    check_sentence(text_of(processes[0], "stderr"))
    done = run_program(folder, "train.py", *flags, 40)
    assert "continuing from" in done.stdout


def test_ranks_go_on_from_the_same_update(workplace):
    """Where hosts share no run directory, only the first of them has a checkpoint."""
    last = workplace / "runs/words/checkpoints/last.ckpt"

    def begin(ckpt_path, first: int) -> None:
        strategy = SimpleNamespace(broadcast=lambda own: first)
        trainer = SimpleNamespace(
            world_size=2, global_rank=1, strategy=strategy, default_root_dir="runs/words"
        )
        Continuation(ckpt_path, []).setup(trainer, None, "fit")

    begin(last, 40)
    begin(None, 0)
    with pytest.raises(
        InputError, match="runs/words: rank 1 would go on from update 0, but rank 0"
    ):
        begin(None, 40)
    with pytest.raises(InputError, match=r"last.ckpt: rank 1 would go on from update 40, but"):
        begin(last, 20)


def test_an_interrupt_of_one_rank_keeps_its_sentence(folder):
    """And what it has trained since the last checkpoint, though the other rank knows of nothing."""
    flags = (*HERE, *TWO, "--trainer.default_root_dir", "run", "--trainer.val_check_interval", 20)
    process = start(folder, ROOT / "train.py", *flags)
    checkpoints = folder / "run/checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints / "best.ckpt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (checkpoints / "last.ckpt").exists()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "interrupted: the same command continues" in (folder / "errors").read_text()
    assert load_model(checkpoints / "last.ckpt").updates >= 20


def test_figures_under_torchrun_are_those_of_one_process(folder, run_program):
    """Ranks that all start at once, where datastore and index are missing."""
    flags = (*HERE, *CKPT, "--knnlm", "--knn.k", 16, "--knn.index", "IVF8,SQ8")
    flags = (*flags, "--knn.lmbda", 0.25, "--token_scores")
    found = {}
    for ranks in (1, 2):
        launch = ("torch.distributed.run", "--nproc-per-node", ranks, ROOT / "evaluate.py")
        program = launch if ranks > 1 else ("evaluate.py",)
        place = (f"{ranks}.npz", "--output", f"{ranks}.json", "--knn.datastore", f"store{ranks}")
        devices = ("--trainer.devices", ranks, "--trainer.strategy", "ddp" if ranks > 1 else "auto")
        run_program(folder, *program, *flags, *place, *devices)
        results = json.loads((folder / f"{ranks}.json").read_text())
        figures = [results[name] for name in ("tokens", "ppl")] + [results["knn"]["ppl"]]
        scores = np.load(folder / f"{ranks}.npz")
        found[ranks] = figures, scores["log_prob"]
    assert found[2][0] == pytest.approx(found[1][0], rel=1e-12)
    np.testing.assert_array_equal(found[2][1], found[1][1])
