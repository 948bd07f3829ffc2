"""Exact search by torch against the one by faiss, and against distances in float64."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from accelerators import ACCELERATORS, skip_without
from small import without_digests

from neighborlm.callbacks.index_builder import IndexBuilder
from neighborlm.retrieval.search import Search, torch_retriever
from neighborlm.retrieval.search.index import open_retriever
from neighborlm.retrieval.search.retriever import FlatRetriever
from neighborlm.retrieval.search.torch_retriever import (
    BlockSizes,
    DeviceNearest,
    GroupNearest,
    TorchRetriever,
)
from neighborlm.retrieval.store.datastore import Datastore

ROWS, DIM = 300, 8
MASKED = (0, 1, 31, 32, 33, 60, 299)


SMALL = BlockSizes(buffer_bytes=32 * 4 * 8, keys=32, key_bytes=32 * 4 * DIM, group=3)
"""Blocks of 32 keys for 5 to 8 queries at a time."""


def by_topk(queries: torch.Tensor, k: int, at_once: int) -> DeviceNearest:
    return DeviceNearest(queries, k)


@pytest.fixture(params=["cpu", "cpu by topk", *ACCELERATORS])
def searching(request, monkeypatch) -> Callable[..., TorchRetriever]:
    """Makes a retriever of some device."""
    skip_without(request.param)
    if request.param == "cpu by topk":
        monkeypatch.setattr(torch_retriever, "CPUNearest", by_topk)
    return partial(TorchRetriever, device=request.param.split()[0], sizes=SMALL)


def random_queries(n: int, scale: float = 2) -> np.ndarray:
    """fp32 `[n, DIM]`."""
    return np.random.default_rng(7).normal(size=(n, DIM)).astype(np.float32) * np.float32(scale)


def poisoned(store: Datastore) -> Datastore:
    """The store with NaN where no key is: whoever reads those rows is found out."""
    without_digests(store.path / "manifest.json")
    keys = np.load(store.path / "keys.npy", mmap_mode="r+")
    keys[store.masked] = np.nan
    keys.flush()
    return Datastore.open(store.path)


@pytest.mark.parametrize("resident_bytes", [0, 1 << 20], ids=["streamed", "resident"])
@pytest.mark.parametrize("masked", [(), MASKED], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_finds_what_the_flat_search_finds(
    make_store, searching, metric, dtype, masked, resident_bytes
):
    """k goes beyond a block (32 keys), up to all keys and beyond them."""
    store = poisoned(make_store(ROWS, DIM, dtype, masked=masked)[0])
    retriever = searching(store, metric, resident_bytes=resident_bytes)
    queries = random_queries(19)
    before = queries.copy()
    for k in (1, 5, 40, store.n_keys, ROWS + 10):
        distances, rows, _ = retriever.search(queries, k)
        assert distances.shape == rows.shape == (19, k)
        assert (distances.dtype, rows.dtype) == (np.float32, np.int64)
        expected_distances, expected_rows, _ = FlatRetriever(store, metric).search(queries, k)
        np.testing.assert_allclose(distances, expected_distances, rtol=1e-5, atol=2e-5)
        # Neighbours that are equally far but for rounding may change places.
        differing = (rows != expected_rows).mean()
        assert differing <= (0.02 if dtype == "fp16" else 0.005)
        np.testing.assert_array_equal(rows < 0, expected_rows < 0)
        np.testing.assert_array_equal((rows >= 0).sum(1), min(k, store.n_keys))
        assert all(len(set(row[row >= 0])) == min(k, store.n_keys) for row in rows)
        assert not np.isin(rows, masked).any()
    np.testing.assert_array_equal(queries, before)
    assert (retriever.keys.resident is not None) == (resident_bytes > 0)


def test_distances_far_from_the_origin_keep_their_digits(tmp_path, new_builder, searching):
    """|q|^2 and |k|^2 are a million here, where fp32 has steps of 0.06."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=DIM)
    center = 1000 * direction / np.linalg.norm(direction)
    keys = (center + rng.normal(size=(ROWS, DIM)) / DIM**0.5).astype(np.float32)
    queries = (center + rng.normal(size=(20, DIM)) / DIM**0.5).astype(np.float32)
    builder = new_builder(tmp_path / "far", rows=ROWS, dim=DIM)
    builder.write(np.arange(ROWS), keys, np.zeros(ROWS, int))
    builder.sync()
    retriever = searching(builder.finish(), "l2")
    distances, rows, _ = retriever.search(queries, 50)
    table = ((queries[:, None].astype(np.float64) - keys.astype(np.float64)) ** 2).sum(-1)
    assert retriever.exact
    np.testing.assert_allclose(distances, np.sort(table)[:, :50], rtol=1e-4)
    np.testing.assert_allclose(distances, np.take_along_axis(table, rows, 1), rtol=1e-4)


def test_the_key_itself_is_at_no_negative_distance(make_store, searching):
    store, keys, _ = make_store(ROWS, DIM)
    distances, rows, _ = searching(store, "l2").search(keys[:20], 2)
    np.testing.assert_array_equal(rows[:, 0], np.arange(20))
    assert (distances >= 0).all()
    np.testing.assert_allclose(distances[:, 0], 0, atol=1e-5)


def test_keys_in_the_order_of_their_distances(tmp_path, new_builder, searching):
    """Each block has nothing but nearer keys than the ones before it, or nothing but farther."""
    keys = np.zeros((ROWS, DIM), dtype=np.float32)
    keys[:, 0] = np.arange(ROWS)
    builder = new_builder(tmp_path / "ordered", rows=ROWS, dim=DIM)
    builder.write(np.arange(ROWS), keys, np.zeros(ROWS, int))
    builder.sync()
    retriever = searching(builder.finish(), "l2")
    distances, rows, _ = retriever.search(keys[[0, ROWS - 1]], 10)
    np.testing.assert_array_equal(rows, [range(10), range(ROWS - 1, ROWS - 11, -1)])
    np.testing.assert_allclose(distances, [np.arange(10.0) ** 2] * 2, atol=1e-2)


def test_ranks_among_many_equal_keys(tmp_path, new_builder, searching):
    """Frequent contexts give the same key thousands of times; distances are still the nearest."""
    keys = np.repeat(np.eye(4, DIM, dtype=np.float32), [50, 3, 40, 7], axis=0)
    builder = new_builder(tmp_path / "equal", rows=100, dim=DIM)
    builder.write(np.arange(100), keys, np.zeros(100, int))
    builder.sync()
    distances, rows, _ = searching(builder.finish(), "l2").search(keys[50:51] * 1.5, 60)
    np.testing.assert_allclose(distances[0], [0.25] * 3 + [3.25] * 57, rtol=1e-6)
    assert len(set(rows[0])) == 60
    assert {50, 51, 52} == set(rows[0][:3].tolist())


def test_queries_that_are_not_finite_find_nothing(make_store, searching):
    store, _, _ = make_store(ROWS, DIM)
    queries = random_queries(12)
    retriever = searching(store, "l2")
    expected = retriever.search(queries[1:11], 4)
    queries[0, 3], queries[11, 0] = np.nan, np.inf
    distances, rows, _ = retriever.search(queries, 4)
    np.testing.assert_array_equal(rows[[0, 11]], -1)
    np.testing.assert_array_equal(rows[1:11], expected[1])
    np.testing.assert_allclose(distances[1:11], expected[0], rtol=1e-5)
    assert retriever.search(queries[:0], 4)[1].shape == (0, 4)


def test_lower_precision_of_products_is_put_aside_and_back(make_store, searching):
    store, _, _ = make_store(ROWS, DIM)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        distances, _, _ = searching(store, "ip").search(random_queries(20), 5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    expected, _, _ = FlatRetriever(store, "ip").search(random_queries(20), 5)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 7, 40])
@pytest.mark.parametrize("width", [1, 5, 64])
def test_the_smallest_of_blocks(k, width):
    """Columns come at random, in ascending order and in descending order of their numbers."""
    rng = np.random.default_rng(0)
    values = rng.permuted(np.tile(np.arange(200, dtype=np.float32), (9, 1)), axis=1)
    values[1], values[2] = np.arange(200), np.arange(200)[::-1]
    queries = np.zeros((9, DIM), dtype=np.float32)
    cpu, device = GroupNearest(queries, k), DeviceNearest(torch.from_numpy(queries), k)
    for first in range(0, 200, width):
        block = np.ascontiguousarray(values[:, first : first + width])
        cpu.keep(block, first)
        device.keep(torch.from_numpy(block), first)
    for found, numbers in (cpu.result(), device.result()):
        np.testing.assert_array_equal(found, np.tile(np.arange(k), (9, 1)))
        np.testing.assert_array_equal(numbers, np.argsort(values, axis=1)[:, :k])


def test_nothing_is_built_for_it(make_store):
    store, _, _ = make_store(ROWS, DIM)
    retriever = open_retriever(store, Search("torch", "ip", nprobe=1, device="cpu"))
    assert isinstance(retriever, TorchRetriever)
    assert retriever.metric == "ip"
    assert retriever.device == torch.device("cpu")
    before = sorted(store.path.iterdir())
    IndexBuilder(store.path, Search("torch", "ip")).build()
    assert sorted(store.path.iterdir()) == before
