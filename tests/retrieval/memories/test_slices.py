"""Slices of a text and bootstrap intervals, against loops over tokens and samples."""

import math

import numpy as np
import pytest

from neighborlm.retrieval.memories.slices import (
    FEWEST_BLOCKS,
    Slices,
    by_bands,
    by_quantiles,
    by_truth,
    compared,
    gain_intervals,
    gains,
    in_repeats,
)

N = 1234


@pytest.fixture
def losses() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lm = rng.gamma(2.0, 2.0, N).astype(np.float32)
    return {"lm": lm, "better": lm * 0.9, "other": lm + rng.normal(0, 0.02, N)}


def test_intervals_are_those_of_blocks_drawn_one_by_one(losses):
    """As many samples of our own: their quantiles differ by chance alone."""
    found = compared(losses, block=100, samples=4000, level=0.9)
    blocks = [slice(first, first + 100) for first in range(0, N, 100)]
    rng = np.random.default_rng(7)
    perplexities, ratios = [], []
    for _ in range(4000):
        chosen = [blocks[i] for i in rng.integers(0, len(blocks), len(blocks))]
        lm, better = (np.concatenate([losses[x][b] for b in chosen]) for x in ("lm", "better"))
        perplexities.append(math.exp(better.mean()))
        ratios.append(math.exp(better.mean() - lm.mean()))
    better = found["better"]
    assert better.ppl.value == pytest.approx(math.exp(losses["better"].astype(float).mean()))
    for interval, drawn in ((better.ppl, perplexities), (better.relative, ratios)):
        width = interval.high - interval.low
        assert interval.low < interval.value < interval.high
        np.testing.assert_allclose(interval[1:], np.quantile(drawn, [0.05, 0.95]), atol=width / 20)
    assert found["lm"].relative == (1, 1, 1)
    # All blocks are alike to it: what is hard for both does not blur the ratio.
    assert better.relative.high / better.relative.low < better.ppl.high / better.ppl.low


def test_intervals_of_classes_are_those_of_blocks_drawn_one_by_one(losses):
    rng = np.random.default_rng(3)
    which = rng.integers(0, 2, N)
    which[: 40 * (FEWEST_BLOCKS - 1)] = 2  # in too few blocks, but for the last
    which[700:705] = 3
    slices = Slices("class", ["a", "b", "c", "few", "none"], which)
    found = gain_intervals(losses, slices, block=40, samples=4000, level=0.9)
    assert list(found) == ["better", "other"]
    lowered = losses["lm"].astype(float) - losses["better"]
    blocks = [slice(first, first + 40) for first in range(0, N, 40)]
    drawn = {0: [], 1: []}
    for _ in range(4000):
        chosen = [blocks[i] for i in rng.integers(0, len(blocks), len(blocks))]
        classes, lower = (np.concatenate([x[b] for b in chosen]) for x in (which, lowered))
        for i, means in drawn.items():
            means.append(lower[classes == i].mean())
    for i, interval in enumerate(found["better"][:4]):
        assert interval.value == pytest.approx(lowered[which == i].mean())
        if i in drawn:
            width = interval.high - interval.low
            ends = np.quantile(drawn[i], [0.05, 0.95])
            np.testing.assert_allclose(interval[1:], ends, atol=width / 20)
        else:
            assert np.isnan(interval[1:]).all()
    assert np.isnan(found["better"][4]).all()


def test_samples_are_the_same_again_and_chance_is_seen(losses):
    found = compared(losses, block=50)
    assert found == compared(losses, block=50)
    assert found != compared(losses, block=50, seed=2)
    assert found["other"].relative.low < 1 < found["other"].relative.high
    assert compared({"lm": losses["lm"][:3]})["lm"].ppl[1:] == pytest.approx(
        [math.exp(losses["lm"][:3].mean())] * 2
    )


def test_what_cannot_be_compared_is_refused(losses):
    for wrong in ({"lm": np.array([])}, {**losses, "knn": np.full(N, np.inf)}):
        with pytest.raises(ValueError, match="not finite"):
            compared(wrong)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_repeated_passages_are_those_that_a_loop_finds(length):
    rng = np.random.default_rng(length)
    text = rng.integers(0, 3, 300).astype(np.uint16)
    text[200:230] = text[20:50]
    text[290:] = 2
    expected, seen = np.zeros(300, dtype=bool), set()
    for start in range(300 - length + 1):
        passage = tuple(text[start : start + length].tolist())
        expected[start : start + length] |= passage in seen
        seen.add(passage)
    assert 0 < expected.sum() < 300
    np.testing.assert_array_equal(in_repeats(text, length), expected)


def test_short_texts_repeat_nothing():
    assert in_repeats(np.array([4, 4]), 8).tolist() == [False, False]
    assert in_repeats(np.array([], dtype=np.int64), 2).tolist() == []


def test_quantiles_hold_as_many_and_keep_equals_together():
    values = np.array([0.0, 0, 0, 0, 0, 1, 2, 3, np.inf, np.nan])
    slices = by_quantiles("distance", values)
    assert slices.labels[-1] == "none"
    assert (slices.which[-2:] == len(slices.labels) - 1).all()
    assert len(set(slices.which[:5].tolist())) == 1
    assert (np.diff(slices.which) >= 0).all()
    even = by_quantiles("distance", np.random.default_rng(0).permutation(100), parts=5)
    assert np.bincount(even.which).tolist() == [20] * 5
    assert len(even.labels) == 5
    assert by_quantiles("distance", np.full(4, np.inf)).labels == ["any", "none"]


def test_gains_are_those_of_a_loop(losses):
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 12, N)
    slices = by_bands("overlap", lengths, [0, 1, 3, 20])
    table = gains(losses, slices)
    assert [row.label for row in table] == ["0", "1 to 2", "3 to 19", "20 or more"]
    for row, (low, high) in zip(table, [(0, 1), (1, 3), (3, 20)], strict=False):
        own = np.flatnonzero((lengths >= low) & (lengths < high))
        assert row.share == pytest.approx(len(own) / N)
        assert row.loss == pytest.approx(losses["lm"][own].mean(), rel=1e-6)
        for name, gain in row.gains.items():
            by = [float(losses["lm"][t]) - float(losses[name][t]) for t in own]
            assert gain.nats == pytest.approx(np.mean(by), rel=1e-5, abs=1e-9)
            assert gain.helped == pytest.approx(np.mean([x > 0.01 for x in by]))
            assert gain.hurt == pytest.approx(np.mean([x < -0.01 for x in by]))
    assert table[3].share == 0
    assert math.isnan(table[3].loss)
    by_loss = gains(losses, by_truth("long", lengths > 5, "short", "long"))
    whole = sum(row.share * row.gains["better"].nats for row in by_loss)
    assert whole == pytest.approx((losses["lm"] - losses["better"]).mean(), rel=1e-5)
