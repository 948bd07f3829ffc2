"""The kNN distribution and the mixture against brute force and closed forms."""

import math

import numpy as np
import pytest
import torch

from neighborlm.common.contracts import Neighbors
from neighborlm.retrieval.memories.knn import (
    knn_log_prob,
    knn_weights,
    neighbor_scores,
    votes_of_scores,
)
from neighborlm.retrieval.memories.mixers import mixture
from neighborlm.retrieval.search.rescoring import exact_distances
from neighborlm.retrieval.search.retriever import votes_of
from neighborlm.retrieval.store.datastore import Datastore

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
def test_weights_sum_to_one_and_agree_with_the_probability_of_the_target(retrieved, temperature):
    scores, values, targets = retrieved
    weights = knn_weights(scores, temperature)
    distribution = torch.zeros(40, VOCAB).scatter_add_(1, values, weights)
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


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("temperature", [0.02, 1.0, 30.0])
def test_torch_and_the_compiled_loop_say_what_float64_says(metric, temperature):
    """Of hits near and far, so that they weigh next to nothing, of missing neighbours in any place,
    and of queries without any; of a few queries more than are worked on at a time."""
    rng = np.random.default_rng(0)
    n, k = 300, 70
    scores = -rng.gamma(3, 40, (n, k)).astype(np.float32)
    rows, values = rng.integers(0, 1000, (n, k)), rng.integers(0, 25, (n, k)).astype(np.uint16)
    rows[rng.random((n, k)) < 0.2] = -1
    rows[7], rows[8, 1:] = -1, -1
    targets = rng.integers(0, 27, n)
    known = np.where(rows < 0, -np.inf, scores.astype(np.float64))
    hits = values == targets[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        best = known.max(1, keepdims=True)
        log_weights = np.where(rows < 0, -np.inf, (known - best) / temperature)
        of_hits = np.logaddexp.reduce(np.where(hits, log_weights, -np.inf), axis=1)
        expected = of_hits - np.logaddexp.reduce(log_weights, axis=1)
    expected = np.where(np.isnan(expected), -np.inf, expected)

    neighbors = Neighbors(-scores if metric == "l2" else scores, rows, values)
    compiled = votes_of(neighbors, targets, temperature, metric)
    masked = neighbor_scores(neighbors.distances, rows, metric)
    in_torch = votes_of_scores(masked, torch.from_numpy(hits), temperature)
    assert (expected[np.isfinite(expected)] < -50).any() == (temperature <= 1)
    assert np.isneginf(expected).sum() > 5
    for votes in (compiled, in_torch):
        np.testing.assert_allclose(votes.log_probs, expected, rtol=1e-5, atol=2e-5)
        np.testing.assert_array_equal(votes.nearest, known.max(1))
        np.testing.assert_array_equal(votes.farthest, np.where(rows < 0, np.inf, known).min(1))


@pytest.mark.parametrize("lmbda", [0.0, 0.25, 0.9])
def test_mixture_sums_to_one_over_the_vocabulary(retrieved, lmbda):
    scores, values, _ = retrieved
    p_lm = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(0)).softmax(1)
    total = torch.zeros(40)
    for word in range(VOCAB):
        p_knn = knn_log_prob(scores, values == word)
        total += mixture([p_lm[:, word].log(), p_knn], [1 - lmbda, lmbda]).exp()
    torch.testing.assert_close(total[:-1], torch.ones(39))
    torch.testing.assert_close(total[-1], torch.tensor(1 - lmbda))


def test_mixture_equals_its_closed_form():
    lm, knn = torch.tensor([0.2, 0.5, 1e-30]), torch.tensor([0.7, 0.0, 1.0])
    mixed = mixture([lm.log(), knn.log()], [0.75, 0.25])
    torch.testing.assert_close(mixed.exp(), 0.25 * knn + 0.75 * lm)
    torch.testing.assert_close(mixture([lm.log(), knn.log()], [1, 0]), lm.log())
    torch.testing.assert_close(mixture([lm.log(), knn.log()], [0, 1]), knn.log())


def test_scores_follow_the_metric():
    distances, rows = np.array([[1.0, 2.0]], np.float32), np.array([[4, -1]])
    assert neighbor_scores(distances, rows, "l2").tolist() == [[-1.0, -np.inf]]
    assert neighbor_scores(distances, rows, "cosine").tolist() == [[1.0, -np.inf]]


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_exact_distances(make_store, metric, dtype):
    """In blocks of 37 distinct rows, and parts of 128 of the 760 neighbours."""
    store, keys, _ = make_store(dtype=dtype)
    rng = np.random.default_rng(4)
    queries = rng.normal(size=(19, 8)).astype(np.float32)
    rows = rng.integers(-1, 300, (19, 40))
    rows[3] = -1
    rows[4, :10] = 17
    found = exact_distances(queries, rows, store, metric, place_bits=7, key_bytes=4 * 8 * 37)
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
    assert exact_distances(np.ones((0, 8)), rows[:0], store, "l2").shape == (0, 3)


def test_mixture_where_probabilities_underflow():
    """exp(-200) is no fp32 number; with r = p_LM / p_kNN, log p = log p_kNN + log(l + (1-l) r)."""
    rng = np.random.default_rng(0)
    lm, knn = rng.uniform(-400, -1, (2, 200)).astype(np.float32).astype(np.float64)
    lmbda = rng.uniform(0.001, 0.999, 200)
    knn = np.maximum(knn, lm - 300)
    expected = knn + np.log(lmbda + (1 - lmbda) * np.exp(lm - knn))
    lm, knn, lmbda = map(torch.from_numpy, (lm, knn, lmbda))
    weights = [1 - lmbda, lmbda]
    torch.testing.assert_close(mixture([lm, knn], weights), torch.from_numpy(expected))
    found = mixture([lm.float(), knn.float()], weights)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("distance", [50.0, 90.0, 200.0, 5000.0])
def test_a_vote_from_far_away_is_counted(distance):
    """exp(-200) is no fp32 number; with one near neighbour p_kNN of two far ones is 2 exp(-d)."""
    scores = torch.tensor([[-3.0, -3.0 - distance, -3.0 - distance, float("-inf")]])
    hits = torch.tensor([[False, True, True, True]])
    found = knn_log_prob(scores, hits)
    torch.testing.assert_close(found, torch.tensor([math.log(2) - distance]), rtol=1e-6, atol=1e-6)
    assert knn_log_prob(scores, torch.tensor([[False, False, False, True]])) == -torch.inf


def test_mixture_of_nothing_is_impossible_not_undefined():
    never = torch.tensor([-torch.inf, -torch.inf, -1.0])
    other = torch.tensor([-torch.inf, -2.0, -torch.inf])
    for lmbda, expected in ((0.0, never), (1.0, other)):
        assert torch.equal(mixture([never, other], [1 - lmbda, lmbda]), expected)


def test_missing_neighbours_change_nothing(retrieved):
    scores, values, targets = retrieved
    hits = values == targets[:, None]
    rows = np.where(scores.isneginf(), -1, 7)
    distances = -scores.numpy()
    rng = np.random.default_rng(1)
    more = np.concatenate([distances, rng.normal(-1e30, 1e30, (40, 6))], 1).astype(np.float32)
    padded = neighbor_scores(more, np.pad(rows, ((0, 0), (0, 6)), constant_values=-1), "l2")
    votes = torch.cat([hits, torch.ones(40, 6, dtype=torch.bool)], 1)
    torch.testing.assert_close(knn_log_prob(padded, votes), knn_log_prob(scores, hits))


def test_only_differences_of_scores_matter():
    """As with inner products of long vectors, or distances of unnormalised ones."""
    generator = torch.Generator().manual_seed(0)
    near = torch.randint(-1000, 0, (100, 32), generator=generator) / 128  # exact in fp32
    hits = torch.rand(100, 32, generator=generator) < 0.3
    far = near - 16384
    torch.testing.assert_close(
        knn_log_prob(far, hits), knn_log_prob(near, hits), rtol=1e-5, atol=1e-5
    )


def test_what_does_not_fit_together_is_refused(make_store):
    with pytest.raises(ValueError, match="hits"):
        knn_log_prob(torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.bool))
    store, _, _ = make_store()
    with pytest.raises(ValueError, match="wide keys"):
        exact_distances(np.ones((1, 8), np.float32), np.zeros((3, 2), np.int64), store, "l2")


class Counting(Datastore):
    """A datastore that notes what is read of it."""

    def read(self, rows):
        self.manifest.setdefault("read", []).append(rows)
        return super().read(rows)


def test_exact_distances_read_each_row_once_in_order_and_in_blocks(make_store):
    store, _, _ = make_store()
    store = Counting(store.path, {}, store.keys, store.values, store.masked)
    rows = np.random.default_rng(0).integers(-1, 60, (30, 20))
    queries = np.random.default_rng(1).normal(size=(30, 8)).astype(np.float32)
    sizes = {"place_bits": 6, "key_bytes": 4 * 8 * 10}
    found = exact_distances(queries, rows.T.copy().T, store, "l2", **sizes)  # any memory layout
    blocks = sorted(store.manifest["read"], key=lambda block: block[0])  # by several threads
    assert max(len(block) for block in blocks) <= 10
    np.testing.assert_array_equal(np.concatenate(blocks), np.unique(rows[rows >= 0]))
    expected = ((queries[:, None].astype(np.float64) - store.keys[rows]) ** 2).sum(-1)
    np.testing.assert_allclose(found[rows >= 0], expected[rows >= 0], rtol=1e-5)


def test_exact_distances_count_rows_not_keys(make_store):
    """Rows without a key are still rows."""
    store, keys, _ = make_store(masked=np.arange(0, 300, 2))
    rows = np.array([[1, 299, 101]])
    query = np.ones((1, 8), np.float32)
    expected = ((query[:, None] - keys[rows]) ** 2).sum(-1)
    np.testing.assert_allclose(exact_distances(query, rows, store, "l2"), expected, rtol=1e-5)
