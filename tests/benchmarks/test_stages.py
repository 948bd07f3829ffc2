"""The stages and the training are timed at a tiny size, and the plain ways find the same scores."""

import json
from pathlib import Path

import pytest

from benchmarks import stages, training

pytestmark = pytest.mark.slow

SMALL = (
    *("--made_up.train_tokens", 5000, "--made_up.test_tokens", 1000, "--made_up.words", 800),
    *("--made_up.width", 16, "--made_up.layers", 2, "--repeat", 1, "--threads", 1),
)


def test_every_stage_beside_its_plain_way(tmp_path: Path, measure):
    measure(
        stages,
        *("--output", "stages.json", *SMALL, "--made_up.updates", 2, "--updates", 8),
        *("--index", "IVF8,PQ2", "--nprobe", 4, "--k", 8),
    )
    found = json.loads((tmp_path / "stages.json").read_text())
    rows = {row["title"]: row for row in found["rows"]}
    assert list(rows) == [
        "LM evaluation",
        "datastore",
        "IVF8,PQ2 training",
        "IVF8,PQ2 adding",
        "kNN-LM, auto",
        "kNN-LM, IVF8,PQ2",
        "… its own distances",
        "tuning, auto",
        "neighbour tables",
        "GNN-LM training",
        "GNN-LM evaluation",
    ]
    for row in rows.values():
        assert row["ratio"] > 0
        assert row["ours"]["peak_bytes"] > 1e8
    same = ("LM evaluation", "kNN-LM, IVF8,PQ2", "… its own distances", "GNN-LM evaluation")
    for title in same:
        ours, theirs = rows[title]["ours"], rows[title]["plain"]
        assert ours["runs"][0]["tokens"] == theirs["runs"][0]["tokens"]
        assert ours["ppl"] == pytest.approx(theirs["ppl"], rel=1e-4)
    written = rows["datastore"]["plain"]["runs"][0]
    assert written["largest_difference_of_keys"] < 0.01  # ours are halves
    assert found["environment"]["threads"] == 1


def test_stages_that_were_asked_for(tmp_path: Path, measure):
    measure(
        stages,
        *("--output", "stages.json", *SMALL, "--made_up.updates", 2, "--without_plain", "true"),
        *("--only", "lm", "datastore"),
    )
    rows = json.loads((tmp_path / "stages.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == ["lm", "datastore"]
    assert "plain" not in rows[0]


def test_training_beside_a_bare_loop(tmp_path: Path, measure):
    measure(
        training,
        *("--output", "training.json", *SMALL, "--max_tokens", 512, "--first", 1, "--updates", 3),
        *("--variants", "no-clipping", "no-bar"),
    )
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    ways = [("no-clipping", "train.py"), ("no-clipping", "bare"), ("no-bar", "train.py")]
    assert [(row["variant"], row["way"]) for row in rows] == ways
    assert len({row["runs"][0]["tokens"] for row in rows}) == 1  # the same batches
    assert [row["of_bare"] for row in rows[1:]] == [1, None]  # one that was not measured
