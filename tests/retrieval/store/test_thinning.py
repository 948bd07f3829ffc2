"""Smaller datastores against a plain greedy merge, and what votes count in them."""

import numpy as np
import pytest
import torch

from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.automaton import AutomatonMemory
from neighborlm.retrieval.memories.knn import knn_log_prob, weighted_scores
from neighborlm.retrieval.store import thinning
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.thinning import (
    merged,
    open_weights,
    random_rows,
    write_thinned,
)
from neighborlm.tools.datastore import main

ROWS, VALUES = 300, 4


def rows_of(datastore):
    """Which rows of the larger datastore a thinned one has, int64 `[M]`."""
    return np.load(datastore.path / "rows.npy")


@pytest.fixture
def store(new_builder, tmp_path) -> Datastore:
    """One with few values, so that neighbours share them, and some rows without a key."""
    rng = np.random.default_rng(0)
    builder = new_builder(tmp_path / "store", ROWS, masked=(2, 50))
    keys = rng.normal(size=(ROWS, 8)).astype(np.float32)
    builder.write(np.arange(ROWS), keys, rng.integers(0, VALUES, ROWS))
    builder.sync()
    return builder.finish()


def nearest_of(datastore: Datastore, k: int) -> np.ndarray:
    """The k nearest rows of each row that has a key, itself left out; -1 of the others."""
    keys = np.asarray(datastore.keys, np.float64)
    distances = np.square(keys[:, None] - keys).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    distances[:, datastore.masked] = np.inf
    nearest = np.argsort(distances, axis=1)[:, :k]
    nearest[datastore.masked] = -1
    return nearest


def plain_merge(datastore: Datastore, neighbors: np.ndarray, seed: int) -> list[int]:
    """Who stands for how many."""
    taken_by: dict[int, int] = {}
    values = datastore.values.tolist()
    for row in np.random.default_rng(seed).permutation(len(values)).tolist():
        if row in taken_by or row in datastore.masked:
            continue
        for other in neighbors[row].tolist():
            took = other in taken_by.values()
            if values[other] == values[row] and other not in taken_by and not took:
                taken_by[other] = row
    counts = np.bincount(list(taken_by.values()), minlength=len(values)) + 1
    counts[[*taken_by, *datastore.masked]] = 0
    return counts.tolist()


@pytest.mark.parametrize("k", [1, 8])
def test_merging_equals_a_plain_merge(store, k):
    neighbors = nearest_of(store, k)
    weights = merged(store, neighbors, seed=3)
    assert weights.tolist() == plain_merge(store, neighbors, 3)
    assert weights.sum() == store.n_keys
    assert np.count_nonzero(weights) < 0.9 * store.n_keys
    others = merged(store, neighbors, seed=4)
    assert not np.array_equal(weights, others)


def test_a_row_does_not_take_over_itself(store):
    itself = np.arange(ROWS)[:, None]
    assert merged(store, itself).tolist() == [0 if row in (2, 50) else 1 for row in range(ROWS)]


def test_merged_entries_vote_as_often_as_they_stand_for_others(store, tmp_path):
    weights = merged(store, nearest_of(store, 8))
    rows = np.flatnonzero(weights)
    small = write_thinned(store, tmp_path / "small", rows, {}, weights[rows])
    np.testing.assert_array_equal(small.keys, store.keys[rows])
    np.testing.assert_array_equal(small.values, store.values[rows])
    np.testing.assert_array_equal(rows_of(small), rows)
    np.testing.assert_array_equal(open_weights(small), weights[rows])
    query, temperature = np.zeros(8, np.float32), 3.0
    scores = -np.square(np.asarray(small.keys) - query).sum(axis=1)
    expected = np.zeros(VALUES)
    for value, weight, score in zip(small.values, weights[rows], scores, strict=True):
        expected[value] += weight * np.exp(score / temperature)
    expected /= expected.sum()
    counts = torch.from_numpy(open_weights(small).astype(np.int64))[None]
    weighted = weighted_scores(torch.from_numpy(scores)[None], counts, temperature)
    for value in range(VALUES):
        hits = torch.from_numpy(small.values == value)[None]
        found = knn_log_prob(weighted, hits, temperature).exp().item()
        assert found == pytest.approx(expected[value], rel=1e-4)
    missing = weighted_scores(torch.tensor([[-torch.inf]]), torch.tensor([[7]]))
    assert missing.isneginf().all()


def test_random_rows_have_a_key(store, tmp_path):
    rows = random_rows(store, 0.5)
    assert len(rows) == 149
    assert (np.diff(rows) > 0).all()
    assert not np.isin(rows, store.masked).any()
    small = write_thinned(store, tmp_path / "small", rows, {"seed": 1})
    np.testing.assert_array_equal(small.keys, store.keys[rows])
    assert open_weights(small) is None
    assert small.fingerprint != store.fingerprint
    assert small.manifest["made_from"]["model"] == "m"  # what checks the model goes on to do so
    assert open_weights(store) is None


def test_writing_goes_on_where_it_stopped(store, tmp_path, monkeypatch):
    monkeypatch.setattr(thinning, "BLOCK_BYTES", 4 * 8 * 50)
    monkeypatch.setattr(thinning, "SYNC_SECONDS", 0.0)
    rows = random_rows(store, 0.5)

    def interrupt(done: int, total: int) -> None:
        if done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_thinned(store, tmp_path / "small", rows, {}, report=interrupt)
    assert np.load(tmp_path / "small/written.npy").sum() == 100
    small = write_thinned(store, tmp_path / "small", rows, {})
    np.testing.assert_array_equal(small.keys, store.keys[rows])


def test_commands(make_store, tmp_path, capsys):
    store, keys, _ = make_store(name="large")
    source = ("--source", str(store.path))
    main(["merge-entries", *source, "--output", str(tmp_path / "m"), "--k", "9"])
    small = Datastore.open(tmp_path / "m")
    assert open_weights(small).sum() == len(store)
    assert f"of {store.path}" in capsys.readouterr().out
    table = [str(path) for path in store.path.glob("neighbors-k9.json")]
    flags = ["merge-entries", *source, "--k", "9", "--table", *table]
    main([*flags, "--output", str(tmp_path / "again")])
    np.testing.assert_array_equal(rows_of(Datastore.open(tmp_path / "again")), rows_of(small))
    with pytest.raises(SystemExit):
        main(["split", "--source", str(small.path), "--output", str(tmp_path / "s"), "--shards=2"])
    assert "its entries were merged, and their weights are not dealt" in capsys.readouterr().err
    main(["thin", *source, "--output", str(tmp_path / "t"), "--share", ".25"])
    quarter = Datastore.open(tmp_path / "t")
    np.testing.assert_array_equal(quarter.keys, keys[rows_of(quarter)])
    assert len(quarter) == 75


def test_what_cannot_be_is_refused(store, make_store, tmp_path, capsys):
    for share in (0.0, 1.0):
        with pytest.raises(InputError, match=rf"--share is {share}, which keeps \d+ of the 298"):
            random_rows(store, share)
    small = write_thinned(store, tmp_path / "small", random_rows(store, 0.5), {})
    with pytest.raises(InputError, match="has only some rows of another datastore"):
        write_thinned(small, tmp_path / "smaller", random_rows(small, 0.5), {})
    with pytest.raises(InputError, match=r"already holds a complete datastore"):
        write_thinned(store, tmp_path / "small", random_rows(store, 0.5), {})
    retriever = type("Any", (), {"metric": "l2", "exact": True})()
    with pytest.raises(InputError, match="cannot tell which entry follows which"):
        AutomatonMemory(small, retriever, 4)
    other, *_ = make_store(name="other", rows=200)
    main(["merge-entries", "--source", str(other.path), "--output", str(tmp_path / "m")])
    flags = ["merge-entries", "--source", str(store.path), "--output", str(tmp_path / "n")]
    with pytest.raises(SystemExit):
        main([*flags, "--table", str(other.path / "neighbors-k8.json")])
    said = capsys.readouterr().err
    assert "its queries is" in said
    assert other.fingerprint in said
