"""Mixtures and their weights against closed forms and brute force."""

import numpy as np
import pytest
import torch
from small_opinions import made_up, only, part_of

from neighborlm.common.contracts import Opinion, Scored, Want
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories import gate
from neighborlm.retrieval.memories.buckets import BucketMixer
from neighborlm.retrieval.memories.closed_forms import DrozdovMixer, NestMixer
from neighborlm.retrieval.memories.gate import GateMixer
from neighborlm.retrieval.memories.mixers import (
    ConstantMixer,
    features_of,
    fit_weights,
    held_out,
    lm_opinion,
    mixture,
    source_log_probs,
    want_of,
    weights_by_source,
)

ALL = {
    "constant": (ConstantMixer, ("lm", "knn", "ngram")),
    "buckets": (BucketMixer, ("lm", "knn", "ngram")),
    "gate": (GateMixer, ("lm", "knn", "ngram")),
    "drozdov": (DrozdovMixer, ("lm", "knn")),
    "nest": (NestMixer, ("lm", "knn")),
}


def loss_of(mixer, opinions) -> float:
    """Mean negative log-likelihood of a mixer's mixture."""
    log_probs = source_log_probs(opinions)
    weights = mixer.weights(features_of(opinions), len(log_probs))
    return -mixture(log_probs.unbind(1), weights.unbind(1)).mean().item()


# -- mixtures ------------------------------------------------------------------------------------


def test_a_mixture_equals_its_closed_form():
    probs = torch.tensor([[0.2, 0.0, 0.5], [1e-30, 0.0, 0.0], [0.3, 1.0, 0.0]]).double()
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.9, 0.0], [0.0, 0.5, 0.5]]).double()
    mixed = mixture(probs.log().unbind(1), weights.unbind(1))
    torch.testing.assert_close(mixed.exp(), (probs * weights).sum(1))
    nothing = mixture(probs[1:2, 1:].log().unbind(1), [0.5, 0.5])
    assert nothing.tolist() == [-np.inf]


def test_a_mixture_of_distributions_is_one():
    generator = torch.Generator().manual_seed(0)
    tables = torch.rand(3, 50, 20, generator=generator).double()
    tables /= tables.sum(2, keepdim=True)
    weights = torch.rand(50, 3, generator=generator).double().softmax(1)
    mixed = mixture(tables.log().unbind(0), [w[:, None] for w in weights.unbind(1)])
    torch.testing.assert_close(mixed.exp().sum(1), torch.ones(50).double())


def test_the_model_has_the_features_that_it_was_asked_for():
    asked = Scored(torch.arange(2), torch.arange(2), torch.zeros(2))
    assert lm_opinion(asked).features == {}
    top = torch.tensor([[0.5, 0.2], [0.25, 0.1]]).log()
    told = asked._replace(entropy=torch.ones(2), top_log_probs=top)
    features = features_of({"lm": lm_opinion(told)})
    torch.testing.assert_close(features["lm.top_prob"], torch.tensor([0.5, 0.25]))
    assert features["lm.entropy"].tolist() == [1.0, 1.0]
    assert want_of(["lm.top_prob", "knn.nearest_distance"]) == Want(top=1)
    assert BucketMixer(["lm.entropy"]).want == Want(entropy=True)
    assert GateMixer(["lm.entropy", "lm.top_prob"]).want == Want(entropy=True, top=1)


def test_a_memory_of_several_distributions_is_several_sources():
    opinions = only(made_up(100), "lm", "knn")
    both = torch.stack([opinions["knn"].log_probs, opinions["knn"].log_probs - 1], dim=1)
    opinions["knn"] = Opinion(both)
    assert source_log_probs(opinions).shape == (100, 3)
    weights = torch.tensor([[0.5, 0.25, 0.25]]).double().expand(100, -1)
    by_source = weights_by_source(opinions, weights)
    assert by_source["lm"].tolist() == by_source["knn"].tolist() == [0.5] * 100


# -- fitting -------------------------------------------------------------------------------------


def test_weights_of_two_sources_are_the_best_of_a_fine_grid():
    log_probs = source_log_probs(only(made_up(), "lm", "knn"))
    found = fit_weights(log_probs)[0]
    grid = torch.arange(1, 10_000).double() / 10_000
    probs = log_probs.exp()
    losses = torch.stack([-(probs[:, 0] * (1 - w) + probs[:, 1] * w).log().mean() for w in grid])
    assert abs(found[1] - grid[losses.argmin()]) < 2e-4
    torch.testing.assert_close(found.sum(), torch.tensor(1.0).double())


def test_weights_of_disjoint_sources_are_their_shares():
    """Where each token is possible by one source alone, its weight is the share of its tokens."""
    log_probs = torch.full((10, 3), -torch.inf).double()
    for token, source in enumerate([0] * 5 + [1] * 3 + [2] * 2):
        log_probs[token, source] = -1.0 - token
    torch.testing.assert_close(fit_weights(log_probs)[0], torch.tensor([0.5, 0.3, 0.2]).double())


def test_weights_of_three_sources_are_where_the_likelihood_is_flat():
    """The maximum on the simplex: the mean of p_s / p is 1 for sources of some weight, and at most
    1 for the others (Karush, Kuhn and Tucker)."""
    probs = source_log_probs(made_up()).exp()
    weights = fit_weights(probs.log())[0]
    gradient = (probs / (probs @ weights)[:, None]).mean(0)
    torch.testing.assert_close(gradient, torch.ones(3).double(), rtol=1e-4, atol=0)
    useless = torch.cat([probs, probs[:, :1] / 2], dim=1)
    weights = fit_weights(useless.log())[0]
    assert weights[3] < 1e-5


def test_tokens_that_no_source_allows_say_nothing():
    log_probs = source_log_probs(made_up(500))
    impossible = torch.full((7, 3), -torch.inf).double()
    expected = fit_weights(log_probs)
    torch.testing.assert_close(fit_weights(torch.cat([impossible, log_probs])), expected)


def test_a_cell_is_drawn_to_its_prior_by_as_many_tokens():
    log_probs = source_log_probs(only(made_up(300), "lm", "knn"))
    cells = torch.zeros(300).long()
    cells[200:] = 2
    prior = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]).double()
    found = fit_weights(log_probs, cells, prior, strength=50.0)
    torch.testing.assert_close(found[1], prior[1])  # of no token at all
    grid = torch.arange(1, 10_000).double() / 10_000
    probs = log_probs.exp()
    for cell in (0, 2):
        own = probs[cells == cell]
        posterior = torch.stack(
            [
                (own[:, 0] * (1 - w) + own[:, 1] * w).log().sum()
                + 50 * (prior[cell, 0] * (1 - w).log() + prior[cell, 1] * w.log())
                for w in grid
            ]
        )
        assert abs(found[cell, 1] - grid[posterior.argmax()]) < 2e-4
    for cell, part in ((0, slice(0, 200)), (2, slice(200, None))):
        alone = fit_weights(log_probs[part])[0]
        torch.testing.assert_close(
            fit_weights(log_probs, cells, prior, 0.0)[cell], alone, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("n", [1, 2, 50, 5000])
def test_whole_stretches_are_held_out(n):
    chosen = held_out(n, 0.25, seed=1)
    assert len(chosen) == n
    assert chosen.any()
    if n == 5000:
        assert not chosen.all()
        assert (chosen[1:] != chosen[:-1]).sum() <= 10
        assert torch.equal(chosen, held_out(n, 0.25, seed=1))
        assert not torch.equal(chosen, held_out(n, 0.25, seed=2))


# -- what all mixers have in common --------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_weights_are_a_distribution_of_each_token_alone(name):
    """Also of tokens whose features are infinite or missing; how many come does not matter."""
    make, sources = ALL[name]
    opinions = only(made_up(), *sources)
    mixer = make()
    assert mixer.needs_fitting
    mixer.fit(opinions)
    fresh = only(made_up(300, seed=1), *sources)
    weights = mixer.weights(features_of(fresh), 300)
    assert weights.dtype == torch.float64
    assert weights.shape == (300, len(sources))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(300).double())
    parts = [part_of(fresh, slice(first, first + 7)) for first in range(0, 300, 7)]
    alone = [mixer.weights(features_of(part), len(part["lm"].log_probs)) for part in parts]
    torch.testing.assert_close(torch.cat(alone), weights, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ALL)
def test_features_are_worth_their_weights_on_other_tokens(name):
    make, sources = ALL[name]
    constant, mixer = ConstantMixer(), make()
    for one in (constant, mixer):
        one.fit(only(made_up(), *sources))
    fresh = only(made_up(4000, seed=1), *sources)
    gain = loss_of(constant, fresh) - loss_of(mixer, fresh)
    assert gain == 0 if name == "constant" else gain > 0.1


@pytest.mark.parametrize("name", ALL)
def test_fitting_twice_gives_the_same(name):
    make, sources = ALL[name]
    states = []
    for _ in range(2):
        mixer = make()
        mixer.fit(only(made_up(), *sources))
        states.append(mixer.state())
    for array, again in zip(*(state.values() for state in states), strict=True):
        np.testing.assert_array_equal(array, again)


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_fitted_has_no_weights(name):
    mixer = ALL[name][0]()
    with pytest.raises(InputError, match="no weights yet"):
        mixer.weights({}, 3)
    with pytest.raises(InputError, match="no weights yet"):
        mixer.state()


@pytest.mark.parametrize("name", [name for name in ALL if name != "constant"])
def test_a_feature_that_nobody_offers_is_refused(name):
    make, sources = ALL[name]
    mixer = make()
    mixer.fit(only(made_up(), *sources))
    with pytest.raises(InputError, match=r"reads the feature .* those here: lm"):
        mixer.weights(features_of(only(made_up(), "lm")), 4000)


def test_given_shares_need_no_fitting():
    mixer = ConstantMixer((0.75, 0.25))
    assert not mixer.needs_fitting
    mixed = mixer.mixed([torch.tensor([0.5]).log().double(), torch.tensor([0.1]).log().double()])
    torch.testing.assert_close(mixed.exp(), torch.tensor([0.4]).double())


@pytest.mark.parametrize("kind", [GateMixer, BucketMixer])
def test_features_of_the_model_are_read_only_by_name(kind, monkeypatch):
    """Whether they are at hand depends on what else is kept, and figures must not."""
    monkeypatch.setattr(gate, "EPOCHS", 1)
    opinions = made_up(1000)
    without = {**opinions, "lm": Opinion(opinions["lm"].log_probs)}
    for named in (None, ["lm.entropy"]):
        mixer = kind(named)
        mixer.fit(opinions)
        assert ("lm.entropy" in mixer.state()["features"]) == (named is not None)
    plain, mixer = kind(), kind()
    plain.fit(without)
    mixer.fit(opinions)
    features = features_of(without)
    torch.testing.assert_close(mixer.weights(features, 1000), plain.weights(features, 1000))
