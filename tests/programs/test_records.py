"""Every evaluation leaves a record of its own, and flags that change nothing are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from small import SMALL, scalars

import neighborlm
from neighborlm.common.errors import InputError
from neighborlm.programs.effects import check_effects
from neighborlm.programs.settings import KNNSettings, MemorySettings
from neighborlm.retrieval.memories.recent import RecentSettings

HERE = (*SMALL, "--data.corpus", "words")
BEST = "runs/words/checkpoints/best.ckpt"


def records(run: Path) -> list[dict]:
    """The oldest first."""
    found = [json.loads(path.read_text()) for path in (run / "evaluations").glob("*.json")]
    return sorted(found, key=lambda record: record["name"][-19:])


def test_evaluations_stand_side_by_side(workplace, run_program, tmp_path):
    """In the run of the checkpoint, wherever the command runs; the latest is results.json too."""
    run = tmp_path / "runs/mine"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = run / "checkpoints/best.ckpt"
    checkpoint.write_bytes((workplace / BEST).read_bytes())
    knn = ("--knnlm", "--knn.k", 8, "--knn.lmbda", 0.25)
    for flags in (("--split", "valid"), (), knn):
        run_program(workplace, "evaluate.py", *HERE, "--ckpt_path", checkpoint, *flags)
    valid, plain, mixed = records(run)
    assert valid["name"].startswith("valid-lm-2")
    assert plain["name"].startswith("test-lm-2")
    assert mixed["name"].startswith("test-lm-knn-2")
    assert valid["results"]["split"] == "valid"
    assert "knn" not in plain["results"]
    assert mixed["results"]["loss"] == pytest.approx(plain["results"]["loss"], rel=1e-6)
    latest = json.loads((run / "results.json").read_text())
    assert latest.pop("record") == str(run / f"evaluations/{mixed['name']}.json")
    assert latest == mixed["results"]

    assert mixed["code"]["neighborlm"] == neighborlm.__version__
    libraries = {"python", "torch", "faiss", "numpy", "pytorch-lightning"}
    assert set(mixed["libraries"]) - {"transformers", "tokenizers"} == libraries
    assert mixed["command"][-5:] == [str(flag) for flag in knn]
    assert mixed["settings"]["knn"]["k"] == 8
    assert mixed["settings"]["data"]["corpus"] == "words"
    assert mixed["results"]["unit"] == "word"
    window = {"tokens_per_sample": 24, "context_window": 12, "break_mode": "none"}
    window |= {"stride": 12, "protocol": "neighborlm"}
    window["first_token"] = "scored, after the token before it; the split's after an end token"
    assert mixed["results"]["window"] == window

    logged = {path.parent.name for path in (run / "evaluate").glob("*/events*")}
    assert logged == {record["name"] for record in (valid, plain, mixed)}
    assert "test/knn/ppl" in scalars(run / "evaluate" / mixed["name"])
    assert "test/knn/ppl" not in scalars(run / "evaluate" / plain["name"])


@pytest.mark.parametrize(
    ("settings", "memories", "mixer", "said"),
    [
        ({"knn": KNNSettings(k=8)}, [], "constant", "--knn.k 8"),
        ({"knn": KNNSettings(index="flat")}, ["ngram", "recent"], "constant", "--knn.index flat"),
        ({"recent": RecentSettings(size=9)}, ["knn"], "constant", "--recent.size 9"),
        ({}, [], "gate", "--mixer gate"),
    ],
)
def test_what_has_no_effect_is_refused(settings, memories, mixer, said):
    with pytest.raises(InputError, match=f"{said}: has no effect"):
        check_effects(MemorySettings(**settings), memories, mixer, makes_products=False)


def test_what_has_an_effect_is_not():
    knn, recent = KNNSettings(k=8), RecentSettings(size=9)
    check_effects(MemorySettings(), [], "constant", makes_products=False)
    check_effects(MemorySettings(knn), [], "constant", makes_products=True)
    check_effects(MemorySettings(knn), ["knn"], "gate", makes_products=False)
    check_effects(MemorySettings(knn, recent), ["knn", "recent"], "gate", makes_products=False)


def test_a_part_is_said_to_be_one(workplace, run_program, tmp_path):
    """And what it retrieved is not taken for the whole split's."""
    knn = ("--knnlm", "--knn.k", 8, "--knn.lmbda", 0.25, "--knn.cache", tmp_path / "cache")
    flags = (*HERE, *knn, "--output", tmp_path / "part.json", "--token_scores", tmp_path / "s.npz")
    done = run_program(workplace, "evaluate.py", *flags, "--trainer.limit_test_batches", 1)
    results = json.loads((tmp_path / "part.json").read_text())
    text = (workplace / "words/test.txt").read_text()
    whole = len(text.split()) + text.count("\n")
    assert results["part"] == f"first {results['tokens']} of {whole} tokens"
    assert 0 < results["tokens"] < whole
    assert results["part"] in " ".join(done.stdout.split())
    refused = run_program(workplace, "evaluate.py", *flags, status=2)
    assert f"keeps the first {results['tokens']} of {whole} tokens" in refused.stderr
    again = run_program(workplace, "evaluate.py", *flags, "--trainer.limit_test_batches", 1)
    assert results["part"] in " ".join(again.stdout.split())
    positions = np.load(tmp_path / "s.npz")["position"]
    np.testing.assert_array_equal(positions, np.arange(results["tokens"]))


def test_no_batch_is_no_evaluation(workplace, run_program):
    flags = (*HERE, "--trainer.limit_test_batches", 0)
    refused = run_program(workplace, "evaluate.py", *flags, status=2)
    assert "--trainer.limit_test_batches leaves no token of the test split" in refused.stderr
