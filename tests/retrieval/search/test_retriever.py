"""Exact search block by block against a table of all distances."""

import numpy as np
import pytest

from neighborlm.retrieval.search.retriever import FlatRetriever, normalized
from neighborlm.retrieval.store import datastore as datastore_module
from neighborlm.retrieval.store.datastore import Datastore

ROWS, DIM, BLOCK = 90, 8, 32
MASKED = (0, 1, 31, 32, 33, 60, 89)


def all_distances(queries: np.ndarray, keys: np.ndarray, metric: str) -> np.ndarray:
    """float64 `[Q, N]`, smaller is nearer."""
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    if metric == "l2":
        return ((queries[:, None] - keys) ** 2).sum(-1)
    if metric == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        keys = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-30)
    return -(queries @ keys.T)


def poisoned(store: Datastore) -> Datastore:
    """The store with NaN where no key is: whoever reads those rows is found out."""
    keys = np.load(store.path / "keys.npy", mmap_mode="r+")
    keys[store.masked] = np.nan
    keys.flush()
    return Datastore.open(store.path)


@pytest.mark.parametrize("masked", [(), MASKED], ids=["all", "masked"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("k", [1, 40, 83, 95], ids=lambda k: f"k{k}")
def test_every_k_against_all_distances(make_store, monkeypatch, metric, masked, k):
    """k goes beyond a block (32 keys), up to all keys and beyond them."""
    monkeypatch.setattr(datastore_module, "BLOCK_BYTES", 4 * DIM * BLOCK)
    store, keys, _ = make_store(ROWS, DIM, masked=masked)
    store = poisoned(store)
    # faiss computes few queries directly and many (from 20 on) through matrix products.
    for n_queries in (3, 41):
        queries = np.random.default_rng(k).normal(size=(n_queries, DIM)).astype(np.float32) * 2
        before = queries.copy()
        distances, rows = FlatRetriever(store, metric).search(queries, k)
        np.testing.assert_array_equal(queries, before)
        assert distances.shape == rows.shape == (n_queries, k)
        assert (distances.dtype, rows.dtype) == (np.float32, np.int64)

        table = all_distances(queries, keys, metric)
        table[:, list(masked)] = np.inf
        found = min(k, store.n_keys)
        assert (rows[:, found:] == -1).all()
        np.testing.assert_array_equal(rows[:, :found], np.argsort(table, axis=1)[:, :found])
        expected = np.take_along_axis(table, rows[:, :found], axis=1)
        signed = distances[:, :found] if metric == "l2" else -distances[:, :found]
        np.testing.assert_allclose(signed, expected, rtol=1e-5, atol=2e-5)


def test_the_stored_half_precision_keys_are_searched(make_store):
    """Not the keys before they were rounded: the order of near ones differs."""
    store, keys, _ = make_store(ROWS, 2, "fp16")
    queries = np.random.default_rng(1).normal(size=(50, 2)).astype(np.float32)
    distances, _ = FlatRetriever(store, "l2").search(queries, 3)
    table = np.sort(all_distances(queries, keys, "l2"), axis=1)[:, :3]
    np.testing.assert_allclose(distances, table, rtol=1e-4, atol=1e-6)


def test_ranks_among_many_equal_keys(tmp_path, make_store, new_builder):
    """Frequent contexts give the same key thousands of times; distances are still the nearest."""
    keys = np.repeat(np.eye(4, dtype=np.float32), [50, 3, 40, 7], axis=0)
    builder = new_builder(tmp_path / "equal", rows=100, dim=4)
    builder.write(np.arange(100), keys, np.zeros(100, int))
    builder.sync()
    distances, rows = FlatRetriever(builder.finish(), "l2").search(keys[50:51] * 1.5, 60)
    np.testing.assert_allclose(np.sort(distances[0]), [0.25] * 3 + [3.25] * 57, rtol=1e-6)
    assert len(set(rows[0])) == 60
    assert {50, 51, 52} <= set(rows[0][:3].tolist())


def test_normalized():
    vectors = np.array([[3.0, 4.0], [0.0, 0.0], [1e-15, 0.0]], np.float64)
    unit = normalized(vectors, "cosine")
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
    for metric in ("l2", "ip"):
        np.testing.assert_array_equal(normalized(vectors, metric), vectors.astype(np.float32))
    assert normalized(np.ones((4, 6), np.float32)[:, ::2], "l2").flags.c_contiguous
