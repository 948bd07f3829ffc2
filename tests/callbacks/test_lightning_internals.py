"""Checkpoints are seen whole or not at all, and only those that somebody has named are loaded."""

import os

import pytest
import torch

from neighborlm.callbacks.lightning_files import WholeCheckpoints
from neighborlm.common.errors import InputError
from neighborlm.programs.run import Run


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints/last.ckpt"
    checkpoints = WholeCheckpoints()
    checkpoints.save_checkpoint({"update": 1}, path)

    def half(checkpoint, making):
        assert making.parent == path.parent  # on the same disk, whatever TMPDIR is
        making.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as full:
        full.setattr(torch, "save", half)
        with pytest.raises(InputError, match=r"last.ckpt: cannot be written \(No space left"):
            checkpoints.save_checkpoint({"update": 2}, path)
    assert torch.load(path) == {"update": 1}
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_loaded_or_saved_for_slurm(tmp_path, monkeypatch):
    variables = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in (variables | {"NODEID": "0"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another model")
    trainer = Run(tmp_path, {"logger": False, "devices": 1}).trainer()
    environment = trainer._accelerator_connector.cluster_environment
    assert type(environment).__name__ == "SLURMEnvironment"
    assert not environment.auto_requeue
    assert trainer._checkpoint_connector._hpc_resume_path is None
