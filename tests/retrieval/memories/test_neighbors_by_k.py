"""What the nearest 1, 2, 4, ... neighbours say, against counting them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neighborlm.common.contracts import Neighbors, Scored, Want
from neighborlm.retrieval.memories.neighbors_by_k import NeighborsByK, distinct_values

N, VOCAB, TEMPERATURE = 40, 6, 2.0


def knn_of(k: int, metric: str = "l2") -> SimpleNamespace:
    """A memory that finds the same neighbours again, in any order; some are missing."""
    rng = np.random.default_rng(0)
    distances = rng.random((N, k)).astype(np.float32) * 5
    rows = rng.integers(0, 100, (N, k))
    rows[rng.random((N, k)) < 0.2] = -1
    rows[0] = -1
    values = rng.integers(0, VOCAB, (N, k)).astype(np.uint16)
    found = Neighbors(distances, rows, values)
    return SimpleNamespace(
        k=k,
        temperature=TEMPERATURE,
        similarity=metric,
        want=Want(("a",)),
        neighbors=lambda asked: found,
        found=found,
    )


@pytest.mark.parametrize(("k", "ks"), [(1, [1]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_it_equals_counting(k, ks, metric):
    knn = knn_of(k, metric)
    memory = NeighborsByK(knn)
    assert memory.ks == ks
    assert memory.want == knn.want
    targets = torch.from_numpy(np.random.default_rng(1).integers(0, VOCAB, N))
    opinion = memory.say(Scored(torch.arange(N), targets))
    assert opinion.log_probs.shape == (N, len(ks))
    sign = -1.0 if metric == "l2" else 1.0
    for row in range(N):
        some = [
            (sign * float(distance), int(value))
            for distance, place, value in zip(*(x[row] for x in knn.found), strict=True)
            if place >= 0
        ]
        some.sort(key=lambda pair: -pair[0])
        for column, of_all in enumerate(ks):
            nearest = some[:of_all]
            weights = np.exp([score / TEMPERATURE for score, _ in nearest])
            hits = np.array([value == targets[row] for _, value in nearest], bool)
            expected = weights[hits].sum() / weights.sum() if some else 0.0
            assert opinion.log_probs[row, column].exp().item() == pytest.approx(expected, rel=1e-5)
        distances, distinct = (opinion.features[name][row] for name in ("distances", "distinct"))
        np.testing.assert_allclose(distances[: len(some)], [sign * s for s, _ in some], rtol=1e-6)
        assert distances[len(some) :].isinf().all()
        counts = [len({value for _, value in some[: i + 1]}) for i in range(k)]
        assert distinct.tolist() == counts


def test_missing_neighbours_are_no_values():
    scores = torch.tensor([[-1.0, -torch.inf, -torch.inf]])
    assert distinct_values(scores, torch.tensor([[3, 4, 3]])).tolist() == [[1.0, 1.0, 1.0]]
