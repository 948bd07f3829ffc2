"""Exact search block by block against a table of all distances; and what all retrievers share."""

import faiss
import numpy as np
import pytest
import torch
from small import without_digests

from neighborlm.callbacks.index_builder import IndexBuilder
from neighborlm.common.contracts import Neighbors
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.knn import knn_log_prob, neighbor_scores, weighted_scores
from neighborlm.retrieval.search import INDEX_KINDS, BaseRetriever, Search, open_retriever
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import check_index, is_factory, is_path
from neighborlm.retrieval.search.retriever import FlatRetriever, normalized
from neighborlm.retrieval.store import datastore as datastore_module
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.thinning import write_thinned

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
    without_digests(store.path / "manifest.json")
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
        distances, rows, _ = FlatRetriever(store, metric).search(queries, k)
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
    distances, _, _ = FlatRetriever(store, "l2").search(queries, 3)
    table = np.sort(all_distances(queries, keys, "l2"), axis=1)[:, :3]
    np.testing.assert_allclose(distances, table, rtol=1e-4, atol=1e-6)


def test_ranks_among_many_equal_keys(tmp_path, make_store, new_builder):
    """Frequent contexts give the same key thousands of times; distances are still the nearest."""
    keys = np.repeat(np.eye(4, dtype=np.float32), [50, 3, 40, 7], axis=0)
    builder = new_builder(tmp_path / "equal", rows=100, dim=4)
    builder.write(np.arange(100), keys, np.zeros(100, int))
    builder.sync()
    distances, rows, _ = FlatRetriever(builder.finish(), "l2").search(keys[50:51] * 1.5, 60)
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


# -- what all retrievers share -------------------------------------------------------------------


class Gives(BaseRetriever):
    """A retriever that gives what it is told."""

    name, metric = "an index of mine", "l2"

    def __init__(self, distances, rows):
        self.found = Neighbors(np.array(distances, np.float32), np.array(rows))

    def search(self, queries, k, ordered=True):
        return self.checked(self.found) if ordered else self.found


@pytest.mark.parametrize(
    ("distances", "rows"),
    [
        ([[1, 2, 3], [1, 3, 2]], [[4, 5, 6], [7, 8, 9]]),
        ([[1, 2, 3], [1, 2, 2]], [[4, 5, 6], [-1, 5, -1]]),
    ],
    ids=["a farther one before a nearer one", "a missing one before one that is there"],
)
def test_what_should_be_in_order_and_is_not_is_an_error(distances, rows):
    with pytest.raises(RuntimeError, match="an index of mine: the neighbours of query 1 are out"):
        Gives(distances, rows).search(None, 3)
    assert Gives(distances, rows).search(None, 3, ordered=False).rows.tolist() == rows


def test_equal_distances_and_missing_neighbours_at_the_end_are_in_order():
    nearest_first = Gives([[1, 1, 3e38], [0, 2, 2]], [[4, 5, -1], [3, 2, 1]])
    assert nearest_first.search(None, 3) is nearest_first.found
    similar = Gives([[3, 1, -3e38]], [[4, 5, -1]])
    similar.metric = "ip"
    assert similar.search(None, 3) is similar.found


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("index", ["flat", "torch", "IVF7,SQfp16", "IVF7,PQ4x4fs"])
@pytest.mark.parametrize("queries", [2, 60])
def test_every_retriever_votes_as_what_it_finds(make_store, metric, index, queries):
    """By the engine in one way or the other, or by faiss; checked in float64."""
    store, _, values = make_store(dtype="fp16", masked=[3, 4])
    if is_factory(index):
        IndexBuilding(store, index, metric).run()
    retriever = open_retriever(store, Search(index, metric, nprobe=3))
    retriever.prepare()
    asked = np.random.default_rng(6).normal(size=(queries, DIM)).astype(np.float32)
    targets = np.arange(queries)  # values are below 50
    votes = retriever.vote(asked, 200, targets, temperature=2.0)
    distances, rows, _ = retriever.search(asked, 200)
    scores = distances.astype(np.float64) * (-1 if metric == "l2" else 1)
    weights = np.where(rows < 0, 0, np.exp((scores - scores[:, :1]) / 2))
    hits = values[rows] == targets[:, None]
    share = (weights * hits).sum(1) / weights.sum(1)
    np.testing.assert_allclose(np.exp(votes.log_probs), share, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(votes.nearest, scores[:, 0], rtol=1e-4, atol=1e-5)
    last = np.where(rows < 0, np.inf, scores).min(1)
    np.testing.assert_allclose(votes.farthest, last, rtol=1e-4, atol=1e-4)
    assert (share[50:] == 0).all()
    assert (share[:50] > 0).any()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("index", ["flat", "torch", "IVF7,SQfp16"])
def test_merged_entries_vote_as_torch_counts_them(make_store, tmp_path, metric, index):
    source, *_ = make_store(dtype="fp16")
    rows = np.arange(0, 300, 2)
    weights = np.random.default_rng(1).integers(1, 9, len(rows)).astype(np.uint32)
    store = write_thinned(source, tmp_path / "merged", rows, {"by": "a test"}, weights)
    if is_factory(index):
        IndexBuilding(store, index, metric).run()
    retriever = open_retriever(store, Search(index, metric, nprobe=3))
    asked = np.random.default_rng(6).normal(size=(60, DIM)).astype(np.float32)
    targets = np.arange(60)
    votes = retriever.vote(asked, 40, targets, temperature=2.0)
    distances, found, _ = retriever.search(asked, 40)
    scores = neighbor_scores(distances, found, metric)
    weighted = weighted_scores(scores, torch.from_numpy(weights[found].astype(np.float32)), 2.0)
    hits = torch.from_numpy(store.values_of(found) == targets[:, None])
    expected = knn_log_prob(weighted, hits, 2.0)
    np.testing.assert_allclose(votes.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(votes.log_probs, knn_log_prob(scores, hits, 2.0))
    np.testing.assert_allclose(votes.nearest, scores.max(dim=1).values, rtol=1e-5, atol=1e-5)


# -- the registry --------------------------------------------------------------------------------


class Newest(BaseRetriever):
    """Takes the last keys for the nearest ones."""

    name = "newest"

    def __init__(self, datastore, search):
        self.datastore, self.metric = datastore, search.metric

    def search(self, queries, k, ordered=True):
        numbers = np.arange(self.datastore.n_keys)[: -k - 1 : -1]
        rows = np.tile(self.datastore.rows_of(numbers), (len(queries), 1))
        return Neighbors(np.tile(np.arange(k, dtype=np.float32), (len(queries), 1)), rows)


def test_a_kind_of_index_is_one_entry(make_store, monkeypatch, tmp_path):
    monkeypatch.setitem(INDEX_KINDS, "newest", Newest)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "newest").touch()
    assert not is_path("newest")
    assert not is_factory("newest")
    check_index("newest", DIM, "l2")
    store, _, values = make_store(masked=[299])
    IndexBuilder(store.path, Search("newest")).build()
    retriever = open_retriever(store, Search("newest"))
    queries = np.zeros((5, DIM), np.float32)
    assert retriever.search(queries, 3).rows.tolist() == [[298, 297, 296]] * 5
    votes = retriever.vote(queries, 2, np.full(5, values[297]), 1.0)
    expected = 1 / (1 + np.e) if values[298] != values[297] else 1.0
    np.testing.assert_allclose(np.exp(votes.log_probs), expected, rtol=1e-5)
    with pytest.raises(InputError, match="expected auto, flat, torch, newest, the path"):
        check_index("older", DIM, "l2")


def test_masked_rows_that_an_index_finds_are_missing_and_last(make_store, tmp_path):
    """One of the original program counts rows, those of zeros at its end too."""
    store, keys, _ = make_store(masked=[7, 8, 299])
    index = faiss.IndexFlatL2(DIM)
    index.add(keys)
    faiss.write_index(index, str(tmp_path / "x.index"))
    retriever = open_retriever(store, Search(str(tmp_path / "x.index")))
    assert index.ntotal == len(store) > store.n_keys
    distances, rows, _ = retriever.search(keys[[7, 8, 100]], 30)
    expected = np.argsort(all_distances(keys[[7, 8, 100]], keys, "l2"), axis=1)[:, :30]
    for found, nearest in zip(rows, expected, strict=True):
        kept = nearest[~np.isin(nearest, [7, 8, 299])]
        assert found[: len(kept)].tolist() == kept.tolist()
        assert (found[len(kept) :] == -1).all()
    assert (rows[:2, -1] == -1).all()
    assert (np.diff(distances, axis=1) >= 0).all()
