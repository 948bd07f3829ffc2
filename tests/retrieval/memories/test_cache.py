"""The cache of a retrieval pass: any order, any number of writers, bounded blocks, refusals."""

import json
import shutil

import numpy as np
import pytest
from small import without_digests

from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories import cache as cache_module
from neighborlm.retrieval.memories.cache import Extent, RetrievalCache
from neighborlm.retrieval.memories.cache_builder import RetrievalCacheBuilder

N, K, VOCAB = 90, 7, 300
RNG = np.random.default_rng(0)
SCORED = np.sort(RNG.permutation(N)[:70])
TARGETS = RNG.integers(0, VOCAB, 70)
LM = RNG.normal(-4, 1, 70).astype(np.float32)
SCORES = -np.sort(RNG.gamma(2.0, 10.0, (70, K)).astype(np.float32), axis=1)
SCORES[::5, 4:] = -np.inf
SCORES[13] = -np.inf
VALUES = np.where(RNG.random((70, K)) < 0.3, TARGETS[:, None], RNG.integers(0, VOCAB, (70, K)))
MADE_FROM = {"model": "m", "nprobe": 8}


@pytest.fixture
def new(tmp_path):
    """A builder with everything but what a test is about given."""

    def make(rows=N, k=K, made_from=MADE_FROM, name="cache"):
        return RetrievalCacheBuilder(tmp_path / name, rows, k, VOCAB, made_from)

    return make


def write(builder, some, shuffled=False):
    """The tokens of some numbers, their neighbours in another order if asked for."""
    order = np.tile(np.arange(K), (len(some), 1))
    if shuffled:
        order = np.random.default_rng(1).permuted(order, axis=1)
    scores = np.take_along_axis(SCORES[some], order, 1)
    values = np.take_along_axis(VALUES[some], order, 1)
    builder.write(SCORED[some], TARGETS[some], LM[some], scores, values)
    builder.sync()


def check(cache, k=K):
    """Holds what was written, in corpus order."""
    blocks = [block[:5] for block in cache]
    columns = [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
    hits = np.equal(VALUES, TARGETS[:, None]) & np.isfinite(SCORES)
    expected = (SCORED, TARGETS, LM, SCORES[:, :k], hits[:, :k])
    for found, wanted in zip(columns, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("shuffled", [False, True])
def test_two_writers_in_any_order(new, monkeypatch, shuffled):
    some = np.random.default_rng(2).permutation(70)
    first, second = new(), new()
    write(second, some[:30], shuffled)
    write(first, some[30:], shuffled)
    cache = first.finish({"loss": 4.0})
    assert cache.values.dtype == cache.targets.dtype == np.uint16
    assert (cache.n_scored, cache.manifest["results"]) == (70, {"loss": 4.0})
    check(cache)
    monkeypatch.setattr(cache_module, "BLOCK_BYTES", 800)
    blocks = list(cache)
    assert len(blocks) == len(cache) > 5
    assert max(sum(column.nbytes for column in block[3:5]) for block in blocks) <= 800
    check(cache)


def test_equal_scores_keep_their_order(new):
    builder = new(rows=1, k=5)
    scores = np.array([[-np.inf, -2.0, 3.0, -2.0, 3.0]])
    builder.write([0], [1], [-1.0], scores.astype(np.float32), np.array([[4, 3, 2, 1, 0]]))
    cache = builder.finish()
    assert cache.scores[0].tolist() == [3, 3, -2, -2, -np.inf]
    assert cache.values[0].tolist() == [2, 0, 3, 1, 4]


@pytest.mark.parametrize("change", [{}, {"k": 9}, {"rows": 80}, {"made_from": {"model": "other"}}])
def test_what_a_killed_run_left_is_written_anew(new, tmp_path, change):
    left = new(**change)
    if not change:
        write(left, np.arange(10))
    assert not RetrievalCache.is_complete(tmp_path / "cache")
    with pytest.raises(InputError, match="is unfinished"):
        RetrievalCache.open(tmp_path / "cache")
    builder = new()
    write(builder, np.arange(70))
    check(builder.finish())
    with pytest.raises(InputError, match="already holds a complete cache"):
        new()


def test_another_command_in_the_same_place(new):
    builder = new()
    write(builder, np.arange(70))
    new(made_from={"model": "other"})
    with pytest.raises(InputError, match="was taken by another command"):
        builder.finish()


def test_a_larger_k_serves_a_smaller(new):
    builder = new()
    write(builder, np.arange(70))
    cache = builder.finish()
    cache.fits({**MADE_FROM, "rows": N, "k": 3})
    check(cache.nearest(3), 3)
    check(cache.nearest(3).nearest(K))
    for expected, message in (
        ({"k": 8}, "its k is 7, but 8 is expected"),
        ({"k": 3, "nprobe": 32}, "its nprobe is 8, but 32 is expected"),
        ({"index": "flat"}, "its index is None, but flat is expected"),
        ({"rows": 91}, "its rows is 90, but 91 is expected"),
    ):
        with pytest.raises(InputError, match=message):
            cache.fits(expected)
    with pytest.raises(InputError, match="keeps 7 neighbours a token, not 8"):
        cache.nearest(8)


def test_a_cache_of_format_1_is_read_for_what_it_has(new, tmp_path):
    """Its manifest says nothing of what was not kept then."""
    builder = new()
    write(builder, np.arange(70))
    builder.finish()
    path = tmp_path / "cache" / "manifest.json"
    manifest = without_digests(path)
    assert [manifest.pop(name) for name in Extent._fields] == [0, 0, False, False]
    path.write_text(json.dumps(manifest | {"version": 1}))
    cache = RetrievalCache.open(tmp_path / "cache")
    check(cache)
    assert cache.rows is cache.top_ids is cache.scored().entropy is None


def test_a_column_is_missing(new):
    with pytest.raises(ValueError, match="expected lm_log_prob, targets, scores, values"):
        new().write(SCORED, TARGETS, LM, SCORES, VALUES, rows=VALUES)


def test_disk_space(new, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"needs 6\.01 GB but the disk has 1 MB free"):
        new(rows=10**6, k=1000)
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, -1, "positions"),
        (0, N, "positions"),
        (1, VOCAB, "targets"),
        (2, np.nan, "is NaN"),
        (3, np.nan, "is NaN"),
        (4, VOCAB, "values"),
    ],
)
def test_what_cannot_be_is_refused(new, column, value, message):
    columns = [SCORED.copy(), TARGETS.copy(), LM.copy(), SCORES.copy(), VALUES.copy()]
    columns[column].flat[20] = value
    with pytest.raises(ValueError, match=message):
        new().write(*columns)


def test_damaged_files_are_refused(new, tmp_path):
    builder = new()
    write(builder, np.arange(70))
    builder.finish()
    with open(tmp_path / "cache" / "scores.npy", "r+b") as file:
        file.truncate(500)
    with pytest.raises(InputError, match=r"scores\.npy"):
        RetrievalCache.open(tmp_path / "cache")
