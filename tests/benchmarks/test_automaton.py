"""The automaton against what the original program computed on a GPT-2, and the benchmarks of it and
of smaller datastores on made-up texts."""

import json
from pathlib import Path

import numpy as np
import pytest
from small import ROOT

from benchmarks.automaton import Fixtures, main
from benchmarks.texts import Text
from benchmarks.thinning import figures, smaller
from neighborlm.retrieval.store.datastore import Datastore

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


def test_what_smaller_datastores_and_projected_keys_cost(texts, tmp_path):
    flags = dict(zip(texts[::2], texts[1::2], strict=True))
    valid, test = (
        Text.of(Datastore.open(Path(flags[f"--{name}"])), dict(np.load(flags[f"--{name}_scores"])))
        for name in ("valid", "test")
    )
    whole = Datastore.open(tmp_path / "memory")
    memories = smaller(whole, "IVF4,Flat", merged=[4], random=[0.5], pca=[4])
    assert [memory.name for memory in smaller(whole, "IVF4,Flat", [4], [0.5], [4])] == [
        *("all entries", "merged, k 4", "random, 50%"),
        *("PCA to 4, distances exact", "PCA to 4, distances index"),
    ]
    every, merged, half, exact, own = (figures(memory, valid, test, 8, 4) for memory in memories)
    assert (every["keys"], half["keys"], own["keys"]) == (2000, 1000, 2000)
    assert 1000 < merged["keys"] < 2000
    assert half["bytes"] == every["bytes"] / 2
    assert merged["bytes"] == merged["keys"] * (every["bytes"] / 2000 + 4)  # and its weight
    assert own["bytes"] == 2000  # values alone
    assert own["index_bytes"] < 0.8 * every["index_bytes"]
    assert every["perplexity"] < half["perplexity"]  # half of what the text repeats is missing
    assert exact["perplexity"] < own["perplexity"]  # all dimensions weigh what four have found
