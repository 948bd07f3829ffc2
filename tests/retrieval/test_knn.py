"""The kNN distribution and the mixture against brute force and closed forms."""

import numpy as np
import pytest
import torch

from retrieval import knn as knn_module
from retrieval.knn import (
    exact_distances,
    interpolate,
    knn_distribution,
    knn_log_prob,
    neighbor_scores,
    tune,
)

VOCAB = 30


@pytest.fixture
def retrieved():
    """Scores [40, 12] with missing neighbours, values, targets; the last row finds nothing."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 12)).astype(np.float32) * 5
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    scores[-1] = -np.inf
    values = rng.integers(0, VOCAB, (40, 12))
    targets = np.where(rng.random(40) < 0.7, values[:, 0], rng.integers(0, VOCAB, 40))
    return torch.from_numpy(scores), torch.from_numpy(values), torch.from_numpy(targets)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 30.0])
def test_distribution_sums_to_one_and_holds_the_target(retrieved, temperature):
    scores, values, targets = retrieved
    distribution = knn_distribution(scores, values, VOCAB, temperature)
    torch.testing.assert_close(distribution[:-1].sum(1), torch.ones(39))
    assert distribution[-1].sum() == 0
    brute = np.zeros((40, VOCAB))
    for row in range(40):
        for score, value in zip(scores[row].tolist(), values[row].tolist(), strict=True):
            brute[row, value] += np.exp(score / temperature)
    brute[:-1] /= brute[:-1].sum(1, keepdims=True)
    np.testing.assert_allclose(distribution, brute, rtol=1e-4, atol=1e-7)
    of_target = knn_log_prob(scores, values == targets[:, None], temperature).exp()
    torch.testing.assert_close(of_target, distribution.gather(1, targets[:, None])[:, 0])


@pytest.mark.parametrize("lmbda", [0.0, 0.25, 0.9])
def test_mixture_sums_to_one_over_the_vocabulary(retrieved, lmbda):
    scores, values, _ = retrieved
    p_lm = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(0)).softmax(1)
    total = torch.zeros(40)
    for word in range(VOCAB):
        p_knn = knn_log_prob(scores, values == word)
        total += interpolate(p_lm[:, word].log(), p_knn, lmbda).exp()
    torch.testing.assert_close(total[:-1], torch.ones(39))
    torch.testing.assert_close(total[-1], torch.tensor(1 - lmbda))


def test_mixture_equals_its_closed_form():
    lm, knn = torch.tensor([0.2, 0.5, 1e-30]), torch.tensor([0.7, 0.0, 1.0])
    mixed = interpolate(lm.log(), knn.log(), 0.25)
    torch.testing.assert_close(mixed.exp(), 0.25 * knn + 0.75 * lm)
    torch.testing.assert_close(interpolate(lm.log(), knn.log(), 0.0), lm.log())
    torch.testing.assert_close(interpolate(lm.log(), knn.log(), 1.0), knn.log())


def test_scores_follow_the_metric():
    distances, rows = np.array([[1.0, 2.0]], np.float32), np.array([[4, -1]])
    assert neighbor_scores(distances, rows, "l2").tolist() == [[-1.0, -np.inf]]
    assert neighbor_scores(distances, rows, "cosine").tolist() == [[1.0, -np.inf]]


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_exact_distances(make_store, metric, dtype, monkeypatch):
    monkeypatch.setattr(knn_module, "BLOCK_BYTES", 4 * 8 * 37)  # blocks of 37 distinct rows
    store, keys, _ = make_store(dtype=dtype)
    rng = np.random.default_rng(4)
    queries = rng.normal(size=(19, 8)).astype(np.float32)
    rows = rng.integers(-1, 300, (19, 40))
    rows[3] = -1
    rows[4, :10] = 17
    found = exact_distances(queries, rows, store, metric)
    a, b = queries.astype(np.float64), keys.astype(np.float64)
    if metric == "cosine":
        a /= np.linalg.norm(a, axis=1, keepdims=True)
        b /= np.linalg.norm(b, axis=1, keepdims=True)
    table = ((a[:, None] - b) ** 2).sum(-1) if metric == "l2" else a @ b.T
    expected = np.take_along_axis(table, np.maximum(rows, 0), 1)
    np.testing.assert_allclose(found[rows >= 0], expected[rows >= 0], rtol=1e-4, atol=1e-5)


def test_nothing_found_at_all(make_store):
    store, _, _ = make_store()
    rows = np.full((2, 3), -1)
    scores = neighbor_scores(exact_distances(np.ones((2, 8)), rows, store, "l2"), rows, "l2")
    assert knn_log_prob(scores, torch.zeros(2, 3, dtype=torch.bool)).isneginf().all()


def test_tuning_finds_the_optimum_of_a_finer_grid():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(-rng.gamma(2.0, 20.0, (600, 16)).astype(np.float32)).sort(
        descending=True
    )[0]
    hits = torch.from_numpy(rng.random((600, 16)) < np.linspace(0.6, 0.05, 16))
    lm = torch.from_numpy(rng.normal(-3, 1, 600).astype(np.float32)).clamp(max=-0.01)
    tuned = tune(lm, scores, hits)

    def loss(lmbda, temperature):
        weights = np.exp(scores.double().numpy() / temperature)
        p_knn = (weights * hits.numpy()).sum(1) / weights.sum(1)
        return -np.log(lmbda * p_knn + (1 - lmbda) * np.exp(lm.double().numpy())).mean()

    assert tuned.loss == pytest.approx(loss(tuned.lmbda, tuned.temperature), abs=1e-5)
    assert tuned.losses[0, 0] == pytest.approx(-lm.double().mean().item(), abs=1e-5)
    finer = min(
        loss(lmbda, temperature)
        for lmbda in np.arange(0, 1, 0.02)
        for temperature in 2.0 ** np.arange(-3, 11, 0.125)
    )
    assert tuned.loss <= finer + 1e-3
