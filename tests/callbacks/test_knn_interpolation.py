"""The mixing callback, fed by hand, against brute force over all keys."""

import math

import numpy as np
import pytest
import torch

from callbacks import knn_interpolation
from callbacks.knn_interpolation import KNNInterpolation
from callbacks.token_scores import ScoreTable
from models.transformer_lm import TokenScores
from retrieval.datastore import DatastoreBuilder
from retrieval.retriever import FlatRetriever

N, D, Q, K, LMBDA, TEMPERATURE = 200, 6, 70, 9, 0.3, 2.0


class FakeModule:
    """All that the callback wants of a model."""

    device = torch.device("cpu")


@pytest.fixture
def world(tmp_path):
    """A datastore and scored tokens."""
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(N, D)).astype(np.float32), rng.integers(0, 12, N)
    builder = DatastoreBuilder(tmp_path / "s", N, D, "fp32", 12, {}, np.empty(0, np.int64))
    builder.write(np.arange(N), keys, values)
    builder.sync()
    scores = TokenScores(
        torch.from_numpy(rng.permutation(Q)),
        torch.from_numpy(rng.integers(0, 12, Q)),
        torch.from_numpy(rng.normal(-3, 1, Q).astype(np.float32)),
        torch.from_numpy(rng.normal(size=(Q, D)).astype(np.float32)),
    )
    return builder.finish(), keys, values, scores


def feed(callback, scores, batch):
    callback.on_test_epoch_start(None, FakeModule)
    for part in zip(*(column.split(batch) for column in scores), strict=True):
        callback.on_test_batch_end(None, FakeModule, TokenScores(*part), None, 0)
    callback.on_test_epoch_end(None, FakeModule)
    return callback


@pytest.mark.parametrize(("batch", "queries_at_once"), [(70, 1024), (7, 20), (1, 1)])
def test_equals_brute_force(world, batch, queries_at_once, monkeypatch):
    monkeypatch.setattr(knn_interpolation, "QUERIES_AT_ONCE", queries_at_once)
    store, keys, values, scores = world
    callback = KNNInterpolation(
        store, FlatRetriever(store, "l2"), K, LMBDA, TEMPERATURE, keep_scores=True
    )
    feed(callback, scores, batch)

    queries, targets = scores.keys.double().numpy(), scores.targets.numpy()
    distances = ((queries[:, None] - keys) ** 2).sum(-1)
    nearest = np.argsort(distances, 1)[:, :K]
    close = np.take_along_axis(distances, nearest, 1)
    weights, hits = np.exp(-close / TEMPERATURE), values[nearest] == targets[:, None]
    p_knn = (weights * hits).sum(1) / weights.sum(1)
    mixed = np.log(LMBDA * p_knn + (1 - LMBDA) * scores.log_probs.double().exp().numpy())

    total = callback.loss.compute()
    assert total["tokens"] == Q
    assert total["loss"].item() == pytest.approx(-mixed.mean(), rel=1e-6)
    statistics = callback.statistics()
    assert statistics["nearest_distance"] == pytest.approx(close[:, 0].mean(), rel=1e-5)
    assert statistics["kth_distance"] == pytest.approx(close[:, -1].mean(), rel=1e-5)
    assert statistics["target_among_neighbors"] == pytest.approx(hits.any(1).mean())
    table = callback.table.gathered()
    np.testing.assert_array_equal(table["position"], np.arange(Q))
    order = np.argsort(scores.positions.numpy())
    np.testing.assert_allclose(table["log_prob"], mixed[order], rtol=1e-4)
    np.testing.assert_allclose(np.exp(table["knn_log_prob"]), p_knn[order], rtol=1e-4, atol=1e-9)


class Finds:
    """A retriever that finds what it is told."""

    metric = "l2"

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def search(self, queries, k):
        return np.full(self.rows.shape, 3.0, np.float32), self.rows


@pytest.mark.parametrize(("missing", "voters"), [("left_out", [5]), ("last_row", [5, N - 1])])
def test_missing_neighbours(world, missing, voters):
    store, _, values, scores = world
    one = TokenScores(*(column[:1] for column in scores))
    one = one._replace(targets=torch.tensor([int(values[5])]))
    callback = KNNInterpolation(
        store, Finds(np.array([[5, -1]])), 2, 1.0, distances="index", missing=missing
    )
    feed(callback, one, 1)
    expected = math.log(np.mean(values[voters] == values[5]))
    assert callback.loss.compute()["loss"].item() == pytest.approx(-expected, abs=1e-6)


def test_errors_of_the_search_surface(world):
    store, _, _, scores = world
    callback = KNNInterpolation(store, Finds(np.array([[N + 5]])), 1, 0.5)
    with pytest.raises(IndexError):
        feed(callback, scores, 70)


def test_kept_for_tuning(world):
    store, _, _, scores = world
    callback = KNNInterpolation(store, FlatRetriever(store, "l2"), K, 0.0, keep_retrieved=True)
    assert callback.retrieved().scores.shape == (0, K)  # a rank without a batch
    feed(callback, scores, 7)
    kept = callback.retrieved()
    assert kept.scores.shape == kept.hits.shape == (Q, K)
    torch.testing.assert_close(kept.lm_log_prob, scores.log_probs)


def test_score_table_is_in_corpus_order():
    table = ScoreTable()
    table.add(position=np.array([4, 2]), x=np.array([0.4, 0.2]))
    table.add(position=np.array([0]), x=np.array([0.0]))
    assert table.gathered()["x"].tolist() == [0.0, 0.2, 0.4]
