"""The token loss does not depend on how tokens were batched."""

import math

import pytest
import torch

from neighborlm.models.metrics import TokenLoss


def loss_of(groups) -> dict[str, torch.Tensor]:
    metric = TokenLoss()
    for group in groups:
        metric.update(group)
    return metric.compute()


def test_equal_whatever_the_grouping():
    """The sums agree to digits that single precision would lose."""
    torch.manual_seed(0)
    log_probs = -20 * torch.rand(300_000)
    expected = -math.fsum(log_probs.tolist()) / len(log_probs)
    shuffled = log_probs[torch.randperm(len(log_probs))].view(-1, 2)
    groupings = [log_probs.split(n) for n in (300_000, 1001, 9_999)] + [shuffled.split(777)]
    found = [loss_of([*groups, torch.empty(0)]) for groups in groupings]
    for result in found:
        assert result["loss"].dtype == torch.float64
        assert result["loss"].item() == pytest.approx(expected, rel=1e-12)
        assert result["tokens"].item() == 300_000


def test_half_precision_log_probs_and_modules():
    metric = torch.nn.ModuleList([TokenLoss()]).to(torch.bfloat16)[0]
    for _ in range(1000):
        metric.update(torch.full((1,), -0.5, dtype=torch.bfloat16))
    assert metric.compute()["loss"].item() == 0.5


def test_nothing_and_a_new_start():
    metric = TokenLoss()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(metric.compute()["loss"])
    metric.update(torch.tensor([-1.0]))
    metric.reset()
    metric.update(torch.tensor([[-3.0, -5.0]]))
    assert metric.compute() == {
        "loss": torch.tensor(4.0, dtype=torch.float64),
        "tokens": torch.tensor(2),
    }
