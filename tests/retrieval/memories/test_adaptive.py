"""The network that decides before the search: that it learns where neighbours help, and that it is
repeatable."""

import numpy as np
import pytest
import torch

from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories import adaptive
from neighborlm.retrieval.memories.adaptive import (
    AdaptiveSettings,
    loss_with_gate,
    threshold_of,
    trained,
)
from neighborlm.retrieval.memories.mixers import held_out

N, SKIP = 1000, 0.5


@pytest.fixture(scope="module")
def tokens():
    """Neighbours are right where the first number of the key is large."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    helps = key[:, 0] > 0.2
    lm, knn = torch.full((N,), 0.1), torch.where(helps, 0.8, 0.0)
    others = [torch.rand(N, width, generator=generator, dtype=torch.float64) for width in (1, 1, 4)]
    return [key, *others], torch.stack([lm, knn], dim=1).double().log(), helps


def test_it_skips_where_neighbors_do_not_help(tokens):
    features, log_probs, helps = tokens
    judged = held_out(N, 0.1, 1)
    gate, threshold = trained(features, log_probs, judged, SKIP, seed=1)
    log_weights = gate.log_weights(features)
    skipped = log_weights[:, 1] < threshold
    assert skipped[judged].float().mean() == pytest.approx(SKIP, abs=0.02)
    assert helps[skipped].float().mean() < 0.05 < 0.7 < helps[~skipped].float().mean()
    half = torch.full_like(log_weights, 0.5).log()
    assert loss_with_gate(log_weights, log_probs, threshold) < loss_with_gate(
        half, log_probs, -np.inf
    )


def test_it_is_repeatable(tokens, monkeypatch):
    """Whatever was drawn before."""
    monkeypatch.setattr(adaptive, "EPOCHS", 2)
    features, log_probs = [group[:200] for group in tokens[0]], tokens[1][:200]
    found = []
    for _ in range(2):
        torch.rand(3)
        gate, threshold = trained(features, log_probs, held_out(200, 0.1, 1), SKIP, seed=1)
        found.append((gate.log_weights(features), threshold))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)


def test_thresholds():
    numbers = torch.tensor([3.0, 1.0, 2.0, 4.0])
    assert [threshold_of(numbers, skip) for skip in (0, 0.25, 0.5)] == [-np.inf, 2.0, 3.0]
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    log_probs = torch.tensor([[0.5, 1.0], [0.5, 1.0]]).log()
    expected = -np.log([0.5, 0.9]).mean()
    assert loss_with_gate(weights, log_probs, np.log(0.5)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("skip", [-0.1, 1.0, float("nan")])
def test_no_such_share(skip):
    with pytest.raises(InputError, match=r"--adaptive.skip is .*; expected 0 or more"):
        AdaptiveSettings(skip).check()
