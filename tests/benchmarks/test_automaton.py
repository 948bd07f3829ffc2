"""The automaton against what the original program computed on a GPT-2, and the benchmarks of it and
of smaller datastores on made-up texts."""

import json
from pathlib import Path

import numpy as np
import pytest
from small import ROOT

from benchmarks.automaton import Fixtures, main
from benchmarks.thinning import main as thinning
from neighborlm.tools.datastore import main as datastore

FIXTURES = ROOT.parent / "shared/parity/hf"


@pytest.fixture(scope="module")
def fixtures() -> Fixtures:
    pytest.importorskip("transformers", reason="the keys come from a model of transformers")
    if not FIXTURES.is_dir():
        pytest.skip(f"the reference outputs are not at {FIXTURES}")
    return Fixtures(FIXTURES)


def test_equals_the_original_program(fixtures):
    cases = fixtures.cases()
    assert len(cases) >= 2
    for name, case in cases.items():
        found = fixtures.compare(name, case)
        assert found["nats"] < 1e-3, name
        assert found["saved"] == pytest.approx(found["expected"], abs=1e-12), name


@pytest.fixture
def texts(tmp_path, new_builder) -> list[str]:
    """Flags for a datastore and two texts that repeat parts of it."""
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2000, 8)).astype(np.float32), rng.integers(0, 50, 2000)
    flags = []
    for name, rows in (
        ("memory", slice(None)),
        ("valid", slice(0, 500)),
        ("test", slice(800, 1400)),
    ):
        count = len(values[rows])
        builder = new_builder(tmp_path / name, count)
        builder.write(np.arange(count), keys[rows] + rng.normal(size=(count, 8)) / 10, values[rows])
        builder.sync()
        builder.finish()
        flags += [f"--{name}", str(tmp_path / name)]
        if name != "memory":
            scores = tmp_path / f"{name}.npz"
            lm = np.full(count, -np.log(50), np.float32)
            np.savez(scores, position=np.arange(count), lm_log_prob=lm)
            flags += [f"--{name}_scores", str(scores)]
    return flags


def test_searches_saved_on_a_text_that_repeats_the_memory(texts, tmp_path):
    output = tmp_path / "automaton.json"
    main([*texts, "--k", "8", "--min_pointers", "[1, 1000]", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["tokens"] == 600
    knn, few, always = (found["rows"][name] for name in ("kNN", "1", "1000"))
    assert few["saved"] > 0.9  # a pointer to the entry itself comes true to the end of the walk
    assert always["saved"] == 0
    assert few["perplexity"] < 3 < 50
    assert always["perplexity"] <= knn["perplexity"] * 1.01  # its neighbours, and pointers


def test_what_is_missing_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["--memory", str(Path("anywhere"))])
    assert "--valid is missing; expected it, or --fixtures" in capsys.readouterr().err


def test_what_a_smaller_datastore_costs(texts, tmp_path):
    memory, output = tmp_path / "memory", tmp_path / "thinning.json"
    half = tmp_path / "half"
    datastore(["thin", "--source", str(memory), "--output", str(half), "--share", ".5"])
    stores = ["--datastores", f"[{memory}, {half}]"]
    thinning([*stores, *texts[2:], "--k", "8", "--output", str(output)])
    whole, part = json.loads(output.read_text())["rows"].values()
    assert whole["keys"] == 2000
    assert part["keys"] == 1000
    assert part["bytes"] == whole["bytes"] / 2
    assert whole["perplexity"] < part["perplexity"]  # half of what the text repeats is missing
