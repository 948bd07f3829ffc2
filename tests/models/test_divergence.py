"""A training stops at the first update that is not finite, and keeps what it had."""

from types import SimpleNamespace

import pytest
import torch

from neighborlm.common.errors import Diverged
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.models.weights import not_finite


@pytest.fixture
def model():
    """That has had the backward pass of its first update."""
    model = TransformerLM(20, width=8, ffn_width=8, layers=1, heads=1, lr=1.0)
    model.trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(),
        global_step=6,
        log_every_n_steps=50,
        default_root_dir="runs/words",
    )
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    model._loss_of_update = torch.tensor(3.0)
    return model


def test_finite_gradients_are_clipped_as_by_torch(model):
    model.on_before_optimizer_step(None)
    expected = [p.grad.clone() for p in model.parameters()]
    own = [torch.nn.Parameter(torch.zeros_like(g)) for g in expected]
    for parameter, gradient in zip(own, expected, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(own, 0.1)
    model.configure_gradient_clipping(None, 0.1)
    for parameter, other in zip(model.parameters(), own, strict=True):
        assert torch.equal(parameter.grad, other.grad)


@pytest.mark.parametrize(
    ("loss", "gradient", "said"),
    [
        (float("nan"), 0.5, "the loss is nan"),
        (3.0, float("inf"), "the norm of the gradient is inf"),
    ],
)
def test_what_is_not_finite_is_named(model, loss, gradient, said):
    model._loss_of_update = torch.tensor(loss)
    next(model.parameters()).grad.view(-1)[0] = gradient
    with pytest.raises(Diverged, match=f"at update 7: {said}; .*--model.lr.*stay in runs/words"):
        model.on_before_optimizer_step(None)


def test_a_scaler_is_given_time(model):
    next(model.parameters()).grad.view(-1)[0] = float("inf")
    scale = 65536.0
    model.trainer.precision_plugin.scaler = SimpleNamespace(get_scale=lambda: scale)
    model.on_before_optimizer_step(None)
    scale = 0.5
    with pytest.raises(Diverged):
        model.on_before_optimizer_step(None)


def test_weights_that_are_not_finite_are_not_saved(model):
    model.trainer.datamodule = None
    weights = {"large": torch.full((4,), 2e38), "bad": torch.tensor([0.0, float("nan")])}
    assert not_finite({"large": weights["large"]}) is None
    with pytest.raises(Diverged, match="weights of bad"):
        model.on_save_checkpoint({"state_dict": weights})
