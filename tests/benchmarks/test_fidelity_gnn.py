"""The original GNN-LM's reference outputs, where they are at hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small import ROOT

from benchmarks.fidelity import run

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
