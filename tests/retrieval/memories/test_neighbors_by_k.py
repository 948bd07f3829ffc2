"""What the nearest 1, 2, 4, ... neighbours say, against counting them."""

import numpy as np
import pytest
import torch

from neighborlm.retrieval.memories.cache import Retrieved
from neighborlm.retrieval.memories.neighbors_by_k import NEAREST, distinct_values, opinion_by_k

N, VOCAB, TEMPERATURE = 40, 6, 2.0


def retrieved(k: int, metric: str) -> Retrieved:
    """Neighbours, the nearest first; some are missing, and one token has none."""
    rng = np.random.default_rng(0)
    scores = rng.random((N, k)).astype(np.float32) * 5 * (-1 if metric == "l2" else 1)
    scores[rng.random((N, k)) < 0.2] = -np.inf
    scores[0] = -np.inf
    scores = torch.from_numpy(-np.sort(-scores, axis=1))
    values, targets = (torch.from_numpy(rng.integers(0, VOCAB, s)) for s in ((N, k), N))
    hits = (values == targets[:, None]) & ~scores.isneginf()
    return Retrieved(torch.arange(N), targets, torch.zeros(N), scores, hits, values)


@pytest.mark.parametrize(
    ("k", "ks"),
    [(1, [1]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12]), (70, [1, 2, 4, 8, 16, 32, 70])],
)
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_it_equals_counting(k, ks, metric):
    block = retrieved(k, metric)
    opinion = opinion_by_k(block, TEMPERATURE, metric)
    assert opinion.log_probs.shape == (N, len(ks))
    sign, told_apart = (-1.0 if metric == "l2" else 1.0), min(k, NEAREST)
    distances, distinct = (opinion.features[name] for name in ("distances", "distinct"))
    assert distances.shape == distinct.shape == (N, told_apart)
    for row in range(N):
        there = int(block.scores[row].isfinite().sum())
        scores, values = (x[row, :there].tolist() for x in (block.scores, block.values))
        for column, of_all in enumerate(ks):
            weights = np.exp(np.array(scores[:of_all]) / TEMPERATURE)
            hits = np.array(values[:of_all]) == block.targets[row].item()
            expected = weights[hits].sum() / weights.sum() if there else 0.0
            assert opinion.log_probs[row, column].exp().item() == pytest.approx(expected, rel=1e-5)
        found = distances[row].tolist()
        assert found[:there] == [sign * score for score in scores[:told_apart]]
        assert np.isinf(found[there:]).all()
        counts = [len(set(values[: i + 1])) for i in range(told_apart)]
        assert distinct[row].tolist() == counts


def test_a_missing_neighbor_between_others_is_not_counted():
    scores = torch.tensor([[2.0, -torch.inf, 1.0]])
    assert distinct_values(scores, torch.tensor([[5, 4, 5]])).tolist() == [[1.0, 1.0, 1.0]]
