"""A model's fingerprint follows its present weights, and is computed only when needed."""

import pytest
import torch

from neighborlm.models import trainable_lm
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.transformer_lm import TransformerLM


def make(**settings) -> TransformerLM:
    """A model whose weights are the same on every machine."""
    model = TransformerLM(9, 8, 12, 2, 2, **settings)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            steps = torch.arange(parameter.numel()).view(parameter.shape)
            parameter.copy_((steps % 7 - 3 + number % 5) / 8)
    return model.eval()


def test_fingerprints_are_those_that_datastores_carry():
    """They must never change, or existing datastores would be refused."""
    assert make().fingerprint == "734e523564152e28"
    assert make(pre_norm=False).fingerprint == "9645e93ca57d05ab"
    torch.manual_seed(0)
    network = GNNLM(make(), heads=2, layers=2, lm_ratio=0.25)
    with torch.no_grad():
        for parameter in network.network.parameters():
            parameter.fill_(0.5)
    assert network.fingerprint == "3914af51660b9035"


@pytest.fixture
def hashed(monkeypatch) -> list:
    """Counts the hashes that are computed."""
    made, real = [], trainable_lm.content_hash

    def content_hash(*args):
        made.append(args)
        return real(*args)

    monkeypatch.setattr(trainable_lm, "content_hash", content_hash)
    return made


def test_computed_once_and_again_when_a_weight_has_changed(hashed):
    model = make()
    fingerprint = model.fingerprint
    assert model.fingerprint == fingerprint
    assert len(hashed) == 1
    for parameter in model.parameters():
        last = parameter.detach().view(-1)[-1:]
        value = last.clone()
        last.copy_(torch.nextafter(value, value + 1))
        assert model.fingerprint != fingerprint
        last.copy_(value)
        assert model.fingerprint == fingerprint


@pytest.mark.parametrize(
    "optimizer", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"]
)
def test_a_training_changes_it(optimizer):
    model = make()
    fingerprint = model.fingerprint
    model.train()
    step = torch.optim.AdamW(model.parameters(), **optimizer)
    model.log_prob(model.hidden(torch.zeros(1, 2, dtype=torch.long))[0]).sum().backward()
    step.step()
    changed = model.fingerprint
    assert changed != fingerprint
    assert model.eval().fingerprint == changed


def test_other_weights_and_other_precision_change_it(hashed):
    model, other = make(), make()
    torch.nn.init.zeros_(other.decoder.layers[1].fc1.weight)
    fingerprint = model.fingerprint
    model.load_state_dict(other.state_dict())
    assert model.fingerprint == other.fingerprint != fingerprint
    assert model.double().fingerprint != other.fingerprint
    model.decoder.layers[1].fc1.weight = torch.nn.Parameter(torch.ones(12, 8))
    before = len(hashed)
    assert model.fingerprint != other.fingerprint
    assert len(hashed) == before + 1
