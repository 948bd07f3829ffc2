"""Candidates, and which tokens a page shows."""

import numpy as np
import pytest
import torch

from neighborlm.common.errors import InputError
from neighborlm.programs.page.tokens import (
    CANDIDATES,
    OtherResult,
    PageTokens,
    chosen,
    compared_with,
    compared_with_scores,
    mixture_ranks,
    most_probable,
)


def test_candidates_are_those_of_a_dictionary():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 30, (50, 40))
    probs = rng.random((50, 40), dtype=np.float32)
    probs[3] = 0  # no opinion
    targets = rng.integers(0, 30, 50)
    found = most_probable(ids, probs, targets)
    for i in range(50):
        sums = {}
        for token, p in zip(ids[i].tolist(), probs[i].tolist(), strict=True):
            sums[token] = sums.get(token, 0.0) + p
        best = sorted((p for p in sums.values() if p > 0), reverse=True)[:CANDIDATES]
        np.testing.assert_allclose(found.probs[i][: len(best)], best, rtol=1e-6)
        assert (found.probs[i][len(best) :] == 0).all()
        assert (found.ids[i][len(best) :] == -1).all()
        for token, p in zip(found.ids[i], found.probs[i], strict=True):
            assert token < 0 or sums[token] == pytest.approx(p, rel=1e-6)
        own = sums.get(int(targets[i]), 0.0)
        rank = 1 + sum(p > own + 1e-9 for p in sums.values()) if own > 0 else 0
        assert found.ranks[i] == rank


@pytest.mark.parametrize("top", [40, 12])
def test_ranks_are_those_of_the_whole_vocabulary(top):
    """Where the model's 12 most probable tokens do not decide, there is a lower bound."""
    rng, n, size = np.random.default_rng(1), 300, 40
    model, recent = rng.dirichlet(np.full(size, 0.2), (2, n))
    recent[:, rng.random(size) < 0.7] = 0
    mixed, targets = 0.6 * model + 0.4 * recent, rng.integers(0, size, n)
    own = mixed[np.arange(n), targets]
    ranks = 1 + (mixed > own[:, None]).sum(axis=1)
    best = np.argsort(-model, axis=1)[:, :top]
    halves = np.tile(np.arange(size), 2), np.tile(0.2 * recent, 2)  # each token twice
    found = mixture_ranks(
        *map(torch.from_numpy, (targets, own)),
        (torch.from_numpy(best), torch.from_numpy(np.take_along_axis(0.6 * model, best, 1))),
        [(torch.from_numpy(halves[0]).expand(n, -1), torch.from_numpy(halves[1]))],
    )
    known = found > 0
    np.testing.assert_array_equal(found[known], ranks[known])
    assert (-found[~known] <= ranks[~known]).all()
    assert known.all() == (top == size)
    assert known.mean() > 0.1


GAINS = np.array([0.0, 0.1, 5.0, 0.0, 0.2, 0.3, 9.0])
POSITIONS = np.array([0, 1, 2, 3, 5, 6, 7])
LINES = np.array([0, 2, 4, 8])


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("2", [0, 1]),
        ("100", [0, 1, 2, 3, 5, 6, 7]),
        ("3:6", [3, 5]),
        ("gains:5", [2, 3, 5, 6, 7]),
        ("gains:3", [5, 6, 7]),
        ("gains:1", [5, 6, 7]),  # a line at least
    ],
)
def test_tokens_are_chosen(which, expected):
    assert POSITIONS[chosen(which, GAINS, POSITIONS, LINES)].tolist() == expected


@pytest.mark.parametrize("which", ["0", "-3", "all", "8:9", "gains:"])
def test_a_choice_that_holds_nothing(which):
    with pytest.raises(InputError, match="--page_tokens"):
        chosen(which, GAINS, POSITIONS, LINES)


def test_another_result_has_the_tokens_of_the_page(tmp_path):
    log_probs = np.log([0.5, 0.25, 0.125])
    other = OtherResult("other", "LM", {"lm": log_probs, "mixture": log_probs / 2})
    page = PageTokens(np.array([4, 6]), np.array([1, 3]), {}, {}, True, {})
    found = compared_with(page, np.array([4, 5, 6]), np.array([1, 2, 3]), other).other
    np.testing.assert_array_equal(found.log_probs["mixture"], log_probs[[0, 2]] / 2)
    for positions, targets in (([4, 5, 7], [1, 2, 3]), ([4, 5, 6], [1, 2, 9])):
        with pytest.raises(InputError, match="other: lacks token 6 of the page"):
            compared_with(page, np.array(positions), np.array(targets), other)
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("text.npz", "missing.npz"):
        with pytest.raises(InputError, match=f"{name}: .*expected the --token_scores of another"):
            compared_with_scores(page, tmp_path / name)
