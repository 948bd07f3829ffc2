"""evaluate.py against what knn-transformers computed on a GPT-2: the model alone, the neighbours by
exact and by the index's own distances, and RetoMaton with the searches that it saves."""

import json

import pytest
from small import ROOT

pytest.importorskip("transformers", reason="the extra hf is not installed")

from benchmarks.fidelity_hf import main

FIXTURE = ROOT.parent / "shared/parity/hf"
CASES = "base_test|knn_k64_t10_recomp|knn_k1024_t10_test|reto_k64"


@pytest.mark.skipif(not FIXTURE.is_dir(), reason=f"the reference outputs are not at {FIXTURE}")
def test_equals_the_original_program(tmp_path):
    output = tmp_path / "fidelity.json"
    main(["--fixture", str(FIXTURE), "--cases", CASES, "--output", str(output)])
    found = json.loads(output.read_text())
    assert len(found) == 4
    for name, case in found.items():
        assert case["fits"], name
        assert case["nats"] < 1e-3, name
    (reto,) = (case for name, case in found.items() if "reto" in name)
    assert reto["saved"] == pytest.approx(reto["expected_saved"], abs=1e-12)


def test_what_is_no_fixture_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--fixture", str(tmp_path)])
    assert "has no expected.json; expected a fixture" in capsys.readouterr().err
