"""The original GNN-LM's reference outputs, where they are at hand."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from small import ROOT

from benchmarks.fidelity import main, run
from benchmarks.fidelity_gnn import difference

FIXTURES = ROOT.parent / "shared" / "parity" / "gnnlm"


needs_outputs = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="no reference outputs of the original GNN-LM"
)


@needs_outputs
def test_every_array_is_the_original_s(tmp_path: Path):
    rows = run(FIXTURES, tmp_path / "fidelity.json")
    gaps = {
        (row["case"], name): gap for row in rows for name, gap in row["largest_difference"].items()
    }
    assert len(gaps) > 180
    assert max(gaps.values()) <= 1e-4, max(gaps, key=gaps.get)
    assert not any(row["above_tolerance"] for row in rows)
    exact = ("graph", "tokens", "codes of", "neighbors", "scored_tokens")
    assert {gap for (_, name), gap in gaps.items() if name.startswith(exact)} == {0.0}
    names = {name for _, name in gaps}
    assert {"loss_sum", "block0_scored_tokens", "block1_scored_tokens"} <= names
    # All others are what the outputs are computed from.
    left = json.loads((tmp_path / "fidelity.json").read_text())["not_compared"]
    inputs = ("block_index", "tgt_offsets", "loss_start")
    blocks = {f"hgt_block{b}: {name}" for b in (0, 1) for name in inputs}
    assert blocks == {name for name in left if not name.startswith("world: ")}
    assert "world: datastore_decoded" not in left


@needs_outputs
def test_what_is_not_compared_is_named(tmp_path: Path):
    fixtures = shutil.copytree(FIXTURES, tmp_path / "fixtures")
    outputs = dict(np.load(fixtures / "decoder_outputs.npz"))
    outputs["block0_scored_tokens"][0] += 1
    np.savez(fixtures / "decoder_outputs.npz", **outputs, block0_new=np.zeros(3))
    np.savez(fixtures / "more.npz", other=np.zeros(3))
    rows = run(fixtures, tmp_path / "fidelity.json")
    of_block = next(row for row in rows if row["case"] == "decoder block 0, fast")
    assert of_block["largest_difference"]["block0_scored_tokens"] == 1
    left = json.loads((tmp_path / "fidelity.json").read_text())["not_compared"]
    assert {"decoder_outputs: block0_new", "more: other"} <= set(left)


@needs_outputs
def test_a_block_behind_context_that_is_not_scored(tmp_path: Path):
    """The first places of its distributions are those of the block, not of what is scored."""
    fixtures = shutil.copytree(FIXTURES, tmp_path / "fixtures")
    block = dict(np.load(fixtures / "hgt_block1.npz"))
    np.savez(fixtures / "hgt_block1.npz", **{**block, "loss_start": np.array([5])})
    outputs = dict(np.load(fixtures / "decoder_outputs.npz"))
    for name, array in outputs.items():
        if "block1" in name and len(array) == len(block["tgt_offsets"]) and "feat" not in name:
            outputs[name] = array[5:]
    np.savez(fixtures / "decoder_outputs.npz", **outputs)
    rows = run(fixtures, tmp_path / "fidelity.json")
    gaps = next(row for row in rows if row["case"] == "decoder block 1, fast")["largest_difference"]
    assert len(outputs["block1_ratio0_logprob"]) == 19
    assert {"block1_ratio0_logprob", "block1_ratio0.3_full_logprob_first4"} <= set(gaps)
    assert not any(row["above_tolerance"] for row in rows)


@needs_outputs
@pytest.mark.parametrize("change", [0.0, 1e-3])
def test_what_is_above_the_tolerance_is_the_exit_status(
    tmp_path: Path, monkeypatch, capsys, change: float
):
    fixtures = shutil.copytree(FIXTURES, tmp_path / "fixtures")
    outputs = dict(np.load(fixtures / "decoder_outputs.npz"))
    outputs["block1_ratio0_full_logprob_first4"][2, 7] += change
    np.savez(fixtures / "decoder_outputs.npz", **outputs)
    flags = ["--fixtures", str(fixtures), "--output", str(tmp_path / "fidelity.json")]
    monkeypatch.setattr(sys, "argv", ["fidelity", *flags])
    if change == 0:
        main()
    else:
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "tolerance: 1e-04 and 1e-06 of the largest number" in said
    case = "above the tolerance: decoder block 1, fast: block1_ratio0_full_logprob_first4"
    assert (case in said) == (change > 0)
    assert ("cases are within it" in said) == (change == 0)


@pytest.mark.parametrize(
    ("ours", "theirs", "too_large"),
    [
        ([1.0, 2.0], [1.0, 2.00009], False),
        ([1.0, 2.0], [1.0, 2.0003], True),
        ([1e4], [1e4 + 0.01], False),  # float rounding of a sum
        ([20_000], [20_001], True),  # rows of a datastore
        ([1.0], [1.0, 2.0], True),
        ([np.nan], [1.0], True),
        ([1.0], [np.nan], True),
        ([], [], False),
    ],
)
def test_tolerance(ours, theirs, too_large):
    assert difference(np.array(ours), np.array(theirs)).too_large == too_large
