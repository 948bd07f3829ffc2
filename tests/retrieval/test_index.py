"""Searching: exact search against brute force, indexes built, resumed, refused."""

import json

import numpy as np
import pytest

from errors import InputError
from retrieval import datastore as datastore_module
from retrieval.index import IndexBuilding, auto_factory, open_retriever
from retrieval.retriever import FlatRetriever


def brute_force(queries, keys, metric, k):
    """Distances and rows of the k nearest, nearest first."""
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    if metric == "l2":
        table = ((queries[:, None] - keys) ** 2).sum(-1)
        order = np.argsort(table, axis=1)[:, :k]
    else:
        if metric == "cosine":
            queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
            keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        table = queries @ keys.T
        order = np.argsort(-table, axis=1)[:, :k]
    return np.take_along_axis(table, order, 1), order


@pytest.fixture
def queries():
    return np.random.default_rng(5).normal(size=(23, 8)).astype(np.float32)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_flat_equals_brute_force(make_store, queries, metric, dtype, monkeypatch):
    monkeypatch.setattr(datastore_module, "BLOCK_BYTES", 4 * 8 * 40)  # eight blocks of 40 keys
    store, keys, _ = make_store(dtype=dtype)
    distances, rows = FlatRetriever(store, metric).search(queries, 50)
    expected, order = brute_force(queries, keys, metric, 50)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-5)


def test_flat_leaves_out_masked_rows(make_store, queries):
    masked = np.arange(0, 300, 3)
    store, keys, _ = make_store(masked=masked)
    _, rows = FlatRetriever(store, "l2").search(queries, 250)
    kept = np.setdiff1d(np.arange(300), masked)
    _, order = brute_force(queries, keys[kept], "l2", 200)
    np.testing.assert_array_equal(rows[:, :200], kept[order])
    assert (rows[:, 200:] == -1).all()


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("masked", [(), (3, 4, 250)])
def test_visiting_every_list_is_exact(make_store, queries, metric, masked):
    store, keys, _ = make_store(masked=masked)
    IndexBuilding(store, "IVF7,Flat", metric).run()
    _, rows = open_retriever(store, "IVF7,Flat", metric, nprobe=99).search(queries, 20)
    kept = np.setdiff1d(np.arange(300), masked)
    _, order = brute_force(queries, keys[kept], metric, 20)
    np.testing.assert_array_equal(rows, kept[order])


@pytest.mark.parametrize(
    "factory", ["IVF7,SQ8", "IVF7,SQfp16", "IVF7,PQ4x4", "RR8,IVF7,RaBitQfs", "OPQ4,IVF7,PQ4x4"]
)
def test_compressed_types_find_most_and_their_training_is_seeded(make_store, queries, factory):
    store, keys, _ = make_store(rows=3000)
    found = []
    for _ in range(2):
        path = IndexBuilding(store, factory, "l2").run()
        _, rows = open_retriever(store, factory, "l2", nprobe=7).search(queries, 50)
        found.append(rows)
        path.unlink()
    np.testing.assert_array_equal(found[0], found[1])
    _, order = brute_force(queries, keys, "l2", 50)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(order, found[0], strict=True)])
    assert recall > 0.3


def test_interrupted_adding_goes_on(make_store, queries, monkeypatch):
    store, _, _ = make_store()
    IndexBuilding(store, "IVF7,SQ8", "l2").run()
    whole = open_retriever(store, "IVF7,SQ8", "l2", 7).search(queries, 20)
    path = IndexBuilding(store, "IVF7,SQ8", "l2").path
    path.unlink()

    monkeypatch.setattr(datastore_module, "BLOCK_BYTES", 4 * 8 * 50)
    stages = []

    def interrupt(stage, done, total):
        stages.append((stage, done))
        if done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        IndexBuilding(store, "IVF7,SQ8", "l2").run(interrupt)
    assert not path.exists()
    stages.clear()
    again = IndexBuilding(store, "IVF7,SQ8", "l2")
    again.run(lambda stage, done, total: stages.append((stage, done)))
    assert stages[0] == ("adding", 100)
    assert again.is_complete()
    assert not again.partial.exists()
    parts = open_retriever(store, "IVF7,SQ8", "l2", 7).search(queries, 20)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_does_not_fit_is_refused(make_store, tmp_path):
    store, _, _ = make_store()
    path = IndexBuilding(store, "IVF7,SQ8", "l2").run()
    other, _, _ = make_store(rows=200, name="other")
    with pytest.raises(InputError, match="its metric is l2, but ip is expected"):
        open_retriever(store, str(path), "ip", 1)
    with pytest.raises(InputError, match="its keys is 300, but 200 is expected"):
        open_retriever(other, str(path), "l2", 1)
    path.with_name(f"{path.name}.json").unlink()  # an index from elsewhere
    with pytest.raises(InputError, match="number of keys is 300, but 200 is expected"):
        open_retriever(other, str(path), "l2", 1)
    (tmp_path / "noise.faiss").write_bytes(b"noise")
    with pytest.raises(InputError, match=r"noise.faiss: cannot be read"):
        open_retriever(store, str(tmp_path / "noise.faiss"), "l2", 1)
    with pytest.raises(InputError, match="no such index"):
        open_retriever(store, "IVF9,SQ8", "l2", 1)
    with pytest.raises(InputError, match="could not parse"):
        IndexBuilding(store, "IVFX", "l2").run()
    with pytest.raises(InputError, match="has 301 lists but the datastore only 300 keys"):
        IndexBuilding(store, "IVF301,Flat", "l2").run()


def test_an_index_of_another_seed_is_another_index(make_store):
    store, _, _ = make_store()
    path = IndexBuilding(store, "IVF7,SQ8", "l2", seed=1).run()
    assert json.loads(path.with_name(f"{path.name}.json").read_text())["seed"] == 1
    with pytest.raises(InputError, match="its seed is 1, but 2 is expected"):
        IndexBuilding(store, "IVF7,SQ8", "l2", seed=2).is_complete()


def test_auto_goes_by_size_and_memory():
    gib = 1 << 30
    assert auto_factory(10_000, 128, gib) == "flat"
    assert auto_factory(217_000, 128, gib) == "IVF1024,SQfp16"
    assert auto_factory(5_000_000, 128, gib) == "IVF4096,SQ8"
    assert auto_factory(103_000_000, 1024, 64 * gib) == "RR1024,IVF16384,RaBitQfs"
