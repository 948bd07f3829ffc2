"""The program that sweeps over a cache."""

import json
import math

import numpy as np
import pytest

from neighborlm.retrieval.memories.cache_builder import RetrievalCacheBuilder
from neighborlm.retrieval.memories.tuning import sweep, tune
from neighborlm.tools.sweep import main


@pytest.fixture
def cache(tmp_path):
    """200 tokens with 12 neighbours, the near ones more often right."""
    rng = np.random.default_rng(0)
    builder = RetrievalCacheBuilder(tmp_path / "cache", 210, 12, 40, {})
    targets = rng.integers(0, 40, 200)
    right = rng.random((200, 12)) < np.linspace(0.7, 0.1, 12)
    right[::2] = False
    values = np.where(right, targets[:, None], rng.integers(0, 40, (200, 12)))
    scores = -np.sort(rng.gamma(2.0, 20.0, (200, 12)), axis=1).astype(np.float32)
    builder.write(np.arange(5, 205), targets, rng.normal(-4, 1, 200), scores, values)
    builder.sync()
    return builder.finish()


def test_default_grid_and_its_best_points(cache, tmp_path, capsys):
    main(["--cache", str(cache.path), "--output", str(tmp_path / "out" / "sweep.json")])
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["k"] == [1, 2, 4, 8, 12]
    assert (found["tokens"], found["lmbda"][0], found["lmbda"][-1]) == (200, 0, 0.9)
    assert np.allclose(np.diff(np.log2(found["temperature"])), 0.5)
    losses = np.array(found["losses"])
    np.testing.assert_array_equal(
        losses, sweep(cache, found["k"], found["temperature"], found["lmbda"])
    )
    assert losses[..., 0] == pytest.approx(found["lm"]["loss"])
    assert found["best"]["loss"] == losses.min()
    assert found["best"]["ppl"] == math.exp(losses.min())
    assert [point["loss"] for point in found["best_of_k"]] == losses.min(axis=(1, 2)).tolist()
    at = [found[name].index(found["best"][name]) for name in ("k", "temperature", "lmbda")]
    assert losses[tuple(at)] == losses.min()
    assert found["best_of_k"][-1]["loss"] == pytest.approx(tune(cache).loss, abs=5e-3)
    assert f"{found['best']['ppl']:.2f}" in capsys.readouterr().out


def test_given_grid(cache, tmp_path):
    flags = ["--k", "8", "2", "--temperature", "30", "--lmbda", "0.25", "0.5", "0.25"]
    main(["--cache", str(cache.path), *flags, "--output", str(tmp_path / "sweep.json")])
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert np.shape(found["losses"]) == (2, 1, 2)
    assert (found["k"], found["lmbda"]) == ([2, 8], [0.25, 0.5])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--k", "0"), "--k is 0; expected numbers of at least 1"),
        (("--k", "13"), "keeps 12 neighbours a token, not 13"),
        (("--temperature", "0"), "--temperature is 0.0; expected finite numbers, more than 0"),
        (("--lmbda", "1.5"), "--lmbda is 1.5; expected numbers from 0 to 1"),
        (("--cache", "{above}"), "is no cache of a split; expected one, such as"),
    ],
)
def test_one_sentence(cache, flags, message, capsys):
    flags = [flag.format(above=cache.path.parent) for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        main(["--cache", str(cache.path), *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
