"""The original GNN-LM's reference outputs, where they are at hand."""

from pathlib import Path

import pytest
from small import ROOT

from benchmarks.fidelity import run

FIXTURES = ROOT.parent / "shared" / "parity" / "gnnlm"


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="no reference outputs of the original GNN-LM")
def test_every_array_is_the_original_s(tmp_path: Path):
    rows = run(FIXTURES, tmp_path / "fidelity.json")
    gaps = {
        (row["case"], name): gap for row in rows for name, gap in row["largest_difference"].items()
    }
    assert len(gaps) > 180
    assert max(gaps.values()) <= 1e-4, max(gaps, key=gaps.get)
    assert {gap for (_, name), gap in gaps.items() if "graph" in name} == {0.0}
