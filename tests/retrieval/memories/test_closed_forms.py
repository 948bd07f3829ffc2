"""Published weights of a kNN memory against their formulas and exhaustive search."""

import math

import numpy as np
import pytest
import torch
from small_opinions import made_up, only

from neighborlm.common.contracts import Opinion
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.closed_forms import DrozdovMixer, NestMixer
from neighborlm.retrieval.memories.mixers import features_of

NEAREST, FARTHEST = "knn.nearest_distance", "knn.kth_distance"


@pytest.fixture
def opinions() -> dict[str, Opinion]:
    return only(made_up(), "lm", "knn")


def test_each_bucket_has_the_lmbda_of_the_highest_likelihood(opinions):
    mixer = DrozdovMixer(buckets=8)
    mixer.fit(opinions)
    weights = mixer.weights(features_of(opinions), 4000)
    distance = features_of(opinions)[NEAREST].double().numpy()
    lm, knn = (opinions[name].log_probs.double().exp().numpy() for name in ("lm", "knn"))
    assert np.isinf(distance).any()  # they are in the last bucket
    for own in np.split(distance.argsort(kind="stable"), 8):
        losses = [-np.log((1 - w) * lm[own] + w * knn[own]).sum() for w in np.arange(100) / 100]
        assert (weights[own, 1] == np.argmin(losses) / 100).all()


def test_nest_equals_its_formula():
    mixer = NestMixer(alpha=0.3, tau=0.1)
    assert not mixer.needs_fitting
    nearest = torch.tensor([1.0, 4.0, 0.0, 0.0, torch.inf, torch.nan])
    farthest = torch.tensor([4.0, 4.0, 2.0, 0.0, torch.inf, torch.nan])
    of_lm = mixer.weights({NEAREST: nearest, FARTHEST: farthest}, 6)[:, 0].tolist()
    for found, ratio in zip(of_lm, [0.25, 1.0, 0.0, 0.0], strict=False):
        assert found == pytest.approx(1 / (1 + math.exp(-(ratio - 0.3) / 0.1)), rel=1e-6)
    assert of_lm[4:] == [1.0, 1.0]  # no neighbours


def test_nest_finds_the_best_pair_of_its_grid(opinions):
    mixer = NestMixer()
    mixer.fit(opinions)
    features = features_of(opinions)
    lm, knn = (opinions[name].log_probs.double().exp() for name in ("lm", "knn"))

    def loss(alpha: float, tau: float) -> float:
        weights = NestMixer(alpha, tau).weights(features, 4000)
        return -(weights[:, 0] * lm + weights[:, 1] * knn).log().sum().item()

    best = loss(mixer.alpha, mixer.tau)
    for alpha in np.arange(21) / 20:
        for tau in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
            assert best <= loss(float(alpha), tau) + 1e-6
    assert best < loss(0.3, 0.1)


def test_nest_needs_distances(opinions):
    similar = {NEAREST: torch.tensor([0.9]), FARTHEST: torch.tensor([0.2])}
    with pytest.raises(InputError, match=r"squared distances.*--knn.metric l2"):
        NestMixer(0.3, 0.1).weights(similar, 1)
    with pytest.raises(InputError, match="squared distances"):
        NestMixer(0.3, 0.1).weights({NEAREST: -similar[FARTHEST], FARTHEST: similar[NEAREST]}, 1)
    for wrong in ((0.3, None), (None, 0.1), (0.3, 0.0)):
        with pytest.raises(InputError, match="alpha"):
            NestMixer(*wrong)


@pytest.mark.parametrize("mixer", [DrozdovMixer(), NestMixer()], ids=["drozdov", "nest"])
def test_they_weigh_one_memory(mixer):
    with pytest.raises(InputError, match=r"one memory, but there are 3 sources \(knn, ngram\)"):
        mixer.fit(made_up())


def test_another_memory_may_have_the_distance(opinions):
    renamed = {"lm": opinions["lm"], "recent": opinions["knn"]}
    mixers = DrozdovMixer(memory="recent"), DrozdovMixer()
    mixers[0].fit(renamed)
    mixers[1].fit(opinions)
    assert torch.equal(mixers[0].lmbdas, mixers[1].lmbdas)
