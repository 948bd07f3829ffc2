"""What a pass keeps of its tokens, for mixers to be fitted to."""

import math

import numpy as np
import pytest
import torch

from neighborlm.callbacks.interpolation import Interpolation
from neighborlm.callbacks.tally import Tally
from neighborlm.common.contracts import Memory, Opinion, Scored, Want
from neighborlm.retrieval.memories.buckets import BucketMixer
from neighborlm.retrieval.memories.mixers import lm_opinion


def scored(first: int, n: int = 4) -> Scored:
    """Tokens of some positions, of which everything tells the position."""
    positions = torch.arange(first, first + n)
    column = positions.float()
    top = torch.stack([-column / 10, -column], dim=1)
    return Scored(positions, positions % 3, -column, {}, column + 0.5, None, top)


def opinion(first: int, n: int = 4) -> Opinion:
    """Of a memory that has two distributions, and features of one number and of three."""
    column = torch.arange(first, first + n).float()
    log_probs = torch.stack([-column - 1, torch.where(column % 2 == 0, -column, -torch.inf)], dim=1)
    return Opinion(log_probs, {"one": column, "three": column[:, None].expand(-1, 3)})


def test_opinions_come_back_in_the_order_of_the_text():
    tally = Tally(keep_scores=True)
    for first in (8, 0, 4):
        tally.add(scored(first), {"memory": opinion(first)})
    asked, found = tally.heard(["memory"])
    found = {"lm": lm_opinion(asked), **found}
    torch.testing.assert_close(asked.targets, asked.positions % 3)
    column = torch.arange(12).float()
    torch.testing.assert_close(found["lm"].log_probs, -column)
    torch.testing.assert_close(found["lm"].features["entropy"], column + 0.5)
    torch.testing.assert_close(found["lm"].features["top_prob"], (-column / 10).exp())
    torch.testing.assert_close(found["memory"].log_probs, opinion(0, 12).log_probs)
    assert found["memory"].features.keys() == {"one", "three"}
    torch.testing.assert_close(found["memory"].features["three"][:, 2], column)


def test_a_graph_network_speaks_for_the_model():
    tally = Tally(keep_scores=True)
    asked = scored(0)._replace(lm_log_probs=torch.full((4,), -9.0))
    tally.add(asked, {"memory": opinion(0)})
    heard, _ = tally.heard(["memory"])
    torch.testing.assert_close(heard.log_probs, asked.log_probs)
    torch.testing.assert_close(heard.lm_log_probs, asked.lm_log_probs)


def test_means_of_several_numbers_and_distributions():
    """Any of its distributions may have the target."""
    tally = Tally()
    only_second = torch.tensor([[-math.inf, -1.0], [-math.inf, -math.inf]])
    features = {"some": torch.tensor([1.0, math.inf]), "none": torch.full((2,), math.nan)}
    tally.add(scored(0, 2), {"memory": Opinion(only_second, features)})
    statistics = tally.statistics()
    assert statistics["memory.has_target"] == 0.5
    assert statistics["memory.some"] == 1.0
    assert "memory.none" not in statistics
    assert statistics["lm.entropy"] == pytest.approx(1.0)


class Fixed(Memory):
    """Says what it is given."""

    want, in_order = Want(keys=("a",)), False

    def say(self, asked: Scored) -> Opinion:
        return opinion(int(asked.positions[0]), len(asked.positions))


def test_what_the_mixer_reads_is_asked_of_the_model_too():
    given = {"memory": Fixed()}
    mixer = BucketMixer(["lm.entropy", "memory.one"])
    assert Interpolation(given, mixer, np.zeros(4)).want == Want(("a",), entropy=True)
    assert Interpolation(given, None, np.zeros(4)).want == Want(("a",))


def test_each_distribution_of_a_memory_is_weighed():
    tally = Tally(keep_scores=True)
    tally.add(scored(0, 12), {"memory": opinion(0, 12)})
    mixer = BucketMixer(["lm.entropy"], buckets=2)
    asked, opinions = tally.heard(["memory"])
    mixer.fit({"lm": lm_opinion(asked), **opinions})
    mixing = Interpolation({"memory": Fixed()}, mixer, np.zeros(12), keep_scores=True)
    mixing._mix(scored(0, 12), {"memory": opinion(0, 12)})
    table = mixing.tally.table.gathered()
    weights = mixer.weights({"lm.entropy": scored(0, 12).entropy}, 12).numpy()
    probs = np.exp(np.column_stack([table["lm_log_prob"], table["memory_log_prob"]]), dtype=float)
    np.testing.assert_allclose(np.exp(table["log_prob"]), (weights * probs).sum(1), rtol=1e-5)
    of_memory = mixing.tally.statistics()["weight.memory"]
    assert of_memory == pytest.approx(weights[:, 1:].sum(1).mean())
