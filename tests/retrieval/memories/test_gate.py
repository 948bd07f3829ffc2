"""The small network that weighs: what it reads, that it learns, and that it stops."""

import pytest
import torch
from small_opinions import made_up, only

from neighborlm.common.contracts import Opinion
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories import gate
from neighborlm.retrieval.memories.gate import GateMixer, standardised, standards
from neighborlm.retrieval.memories.mixers import features_of, fit_weights, source_log_probs
from neighborlm.retrieval.memories.neighbors_by_k import MetaKMixer


def test_inputs_are_standardised_and_what_is_missing_is_said():
    infinite, missing = torch.inf, torch.nan
    columns = torch.tensor([[1.0, 5.0], [3.0, infinite], [5.0, missing], [7.0, 5.0]]).double()
    standard = standards(columns)
    assert standard["may_miss"].tolist() == [False, True]
    inputs = standardised(columns, standard)
    assert inputs.shape == (4, 3)
    torch.testing.assert_close(inputs[:, 0].mean(), torch.tensor(0.0).double())
    torch.testing.assert_close(inputs[:, 0].std(unbiased=False), torch.tensor(1.0).double())
    assert inputs[:, 1].tolist() == [0.0, 0.0, 0.0, 0.0]  # 5 is the mean
    assert inputs[:, 2].tolist() == [0.0, 1.0, 1.0, 0.0]
    other = standardised(torch.tensor([[-infinite, 1e30], [missing, 5.0]]).double(), standard)
    assert other.tolist() == [[0.0, gate.FARTHEST, 0.0], [0.0, 0.0, 0.0]]


def test_it_is_never_worse_than_constant_weights_on_what_is_held_out(monkeypatch):
    """Of noise there is nothing to learn."""
    opinions = made_up(3000)
    noise = torch.rand(3000, generator=torch.Generator().manual_seed(5))
    opinions = {
        "lm": Opinion(opinions["lm"].log_probs),
        "knn": Opinion(opinions["knn"].log_probs, {"noise": noise}),
    }
    monkeypatch.setattr(gate, "LEARNING_RATE", 1.0)
    mixer = GateMixer()
    mixer.fit(opinions)
    assert len(mixer.losses) == gate.PATIENCE + 1
    assert min(mixer.losses) == mixer.losses[0]
    judged = gate.held_out(3000, gate.HELD_OUT, mixer.seed)
    constant = fit_weights(source_log_probs(opinions)[~judged]).expand(2, -1)
    weights = mixer.weights({"knn.noise": torch.tensor([0.1, 0.9])}, 2)
    torch.testing.assert_close(weights, constant)


def test_it_keeps_the_epoch_that_was_best():
    opinions = made_up()
    mixer = GateMixer()
    mixer.fit(opinions)
    judged = gate.held_out(4000, gate.HELD_OUT, mixer.seed)
    log_probs = source_log_probs(opinions)
    mixed = (mixer.weights(features_of(opinions), 4000) * log_probs.exp()).sum(1).log()
    possible = judged & ~mixed.isneginf()
    assert -mixed[possible].mean().item() == pytest.approx(min(mixer.losses), rel=1e-12)
    assert min(mixer.losses) < mixer.losses[0] - 0.1


def test_the_seed_decides():
    states = []
    for seed in (1, 2):
        mixer = GateMixer(seed=seed)
        mixer.fit(made_up(1000))
        states.append(mixer.state()["w_1"])
    assert (states[0] != states[1]).any()


def test_it_can_be_fitted_where_no_gradients_are_wanted():
    mixers = GateMixer(), GateMixer()
    with torch.no_grad():
        mixers[0].fit(made_up(1000))
    mixers[1].fit(made_up(1000))
    assert (mixers[0].state()["w_1"] == mixers[1].state()["w_1"]).all()


def test_meta_k_weighs_the_nearest_by_their_distances():
    """The distribution of the nearest is right where its distance is small."""
    n = 4000
    generator = torch.Generator().manual_seed(0)
    distances = (10 * torch.rand(n, 4, generator=generator)).sort(1).values
    right = torch.rand(n, generator=generator) < torch.exp(-distances[:, 0])
    probs = torch.where(right, 0.9, 0.01)[:, None] * torch.tensor([1.0, 0.5, 0.25])
    distinct = torch.ones(n, 4).cumsum(1)
    opinions = {
        "lm": Opinion(torch.full((n,), 0.05).log()),
        "knn": Opinion(probs.log(), {"distances": distances, "distinct": distinct}),
    }
    mixer = MetaKMixer()
    mixer.fit(opinions)
    near, far = torch.full((1, 4), 0.01), torch.full((1, 4), 9.0)
    told = {"knn.distances": torch.cat([near, far]), "knn.distinct": distinct[:2]}
    weights = mixer.weights(told, 2)
    assert weights.shape == (2, 4)
    assert weights[0, 0] < 0.3 < 0.8 < weights[1, 0]
    assert weights[0, 1] > 0.6
    with pytest.raises(InputError, match="feature knn"):
        mixer.fit(only(made_up(), "lm", "knn"))
