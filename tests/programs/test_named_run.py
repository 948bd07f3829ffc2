"""`evaluate.py runs/NAME`: the run's own settings, and what is no run."""

import json
import shutil

import pytest
import yaml
from small import SMALL

from neighborlm.common.errors import InputError
from neighborlm.programs import evaluate
from neighborlm.programs.named_run import with_settings_of_run

TRAINED = {
    "seed_everything": 3,
    "trainer": {"max_steps": 40, "devices": 8, "precision": "bf16-mixed", "limit_test_batches": 2},
    "model": {"width": 16},
    "data": {"corpus": "-a text", "threshold": 0, "dictionary": None},
    "neighbors": {"k": 4},
    "arch": "gnn_lm",
    "threads": 1,
    "ckpt_path": "other.ckpt",
    "checkpoint_every": 500,
}
AS_FLAGS = [
    *("--arch=gnn_lm", "--seed_everything=3", "--trainer.precision=bf16-mixed"),
    *('--model={"width": 16}', "--data.corpus=-a text", "--data.threshold=0", "--neighbors.k=4"),
]


@pytest.mark.parametrize(
    ("given", "completed"),
    [
        (["{run}", "--knnlm"], ["{run}", *AS_FLAGS, "--knnlm"]),
        (["--config", "{run}/config.yaml", "--x=1"], ["{run}", *AS_FLAGS, "--x=1"]),
        (["--knnlm", "-c={run}/config.yaml"], ["{run}", "--knnlm", *AS_FLAGS]),
        (
            ["--config", "{run}/other.yaml", "--k", "2"],
            ["--config", "{run}/other.yaml", "--k", "2"],
        ),
        (["--config", "none/config.yaml"], ["--config", "none/config.yaml"]),
        (["--config"], ["--config"]),
        ([], []),
    ],
)
def test_what_a_run_stands_for(tmp_path, given, completed):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TRAINED))
    (tmp_path / "other.yaml").write_text("data: {corpus: text}")
    given, completed = (
        [arg.format(run=tmp_path) if "{run}" in arg else arg for arg in args]
        for args in (given, completed)
    )
    assert with_settings_of_run(given) == completed


@pytest.mark.parametrize(
    ("named", "content", "words"),
    [
        ("none", None, ("none: no such directory", "expected")),
        ("best.ckpt", None, ("best.ckpt: is a file", "expected")),
        (".", None, (": has no config.yaml", "train.py")),
        (".", "[a, list]", ("config.yaml: is no config",)),
        (".", "data: {a: [", ("config.yaml: is no config",)),
        (".", "data: text", ("config.yaml: is no config",)),
    ],
)
def test_what_is_no_run(tmp_path, named, content, words):
    (tmp_path / "best.ckpt").touch()
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InputError) as error:
        with_settings_of_run([str(tmp_path / named)])
    assert all(word in str(error.value) for word in words), error.value


def test_a_run_needs_no_config(workplace, monkeypatch, tmp_path):
    """It is that of the command with all settings, wherever the run was moved."""
    monkeypatch.chdir(workplace)
    run = shutil.copytree("runs/words", tmp_path / "moved")
    before = set((run / "evaluations").glob("*"))
    quiet, found = ("--trainer.enable_progress_bar", "false", "--split", "valid"), []
    for named in (
        [*SMALL, "--data.corpus", "words"],
        [str(run)],
        ["--config", str(run / "config.yaml")],
    ):
        evaluate.main([*named, *quiet, "--output", str(tmp_path / "results.json")])
        found.append(json.loads((tmp_path / "results.json").read_text()))
    assert found[0]["loss"] == found[1]["loss"] == found[2]["loss"]
    assert found[0]["window"] == found[1]["window"] == found[2]["window"]
    assert [r["checkpoint"] for r in found[1:]] == [str(run / "checkpoints/best.ckpt")] * 2
    assert len(set((run / "evaluations").glob("valid-lm-*.json")) - before) == 2
