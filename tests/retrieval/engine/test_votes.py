"""Counting votes of neighbours that have been found; `test_knn` compares the figures."""

import numpy as np
import pytest

from neighborlm.common.contracts import Neighbors
from neighborlm.retrieval.engine import count_votes

DISTANCES = np.array([[1, 2, 3], [4, 5, np.nan]], dtype=np.float32)
ROWS = np.array([[8, 6, -1], [5, 6, 7]])
VALUES = np.array([[1, 1, 1], [2, 3, 2]], dtype=np.uint8)


def test_what_is_missing_or_no_number_has_no_vote():
    votes = count_votes(Neighbors(DISTANCES, ROWS, VALUES), np.array([1, 2]), 1.0, similar=False)
    np.testing.assert_allclose(votes.log_probs, [0, -np.log1p(np.exp(-1))], atol=1e-6)
    assert votes.nearest.tolist() == [-1, -4]
    assert votes.farthest.tolist() == [-2, -5]


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_company_change_a_vote(threads):
    rng = np.random.default_rng(0)
    found = Neighbors(
        rng.random((1000, 9), dtype=np.float32),
        rng.integers(-1, 50, (1000, 9)),
        rng.integers(0, 4, (1000, 9)),
    )
    targets = rng.integers(0, 4, 1000)
    votes = count_votes(found, targets, 0.1, similar=True, threads=threads)
    for i in (0, 127, 128, 999):
        one = Neighbors(*(column[i : i + 1] for column in found))
        alone = count_votes(one, targets[i : i + 1], 0.1, similar=True)
        assert [column[i] for column in votes] == [column[0] for column in alone]


def test_nobody_votes():
    nothing = Neighbors(DISTANCES[:, :0], ROWS[:, :0], VALUES[:, :0])
    votes = count_votes(nothing, np.array([1, 2]), 1.0, similar=False)
    assert np.isneginf(votes.log_probs).all()
    assert np.isneginf(votes.nearest).all()
    assert np.isposinf(votes.farthest).all()


def test_neighbours_stand_for_several_entries():
    found = Neighbors(DISTANCES, ROWS, VALUES)
    counts = np.array([[5, 1, 9], [2, 3, 9]])
    votes = count_votes(found, np.array([1, 2]), 0.5, similar=False, counts=counts)
    np.testing.assert_allclose(votes.log_probs, [0, -np.log1p(1.5 * np.exp(-2))], atol=1e-6)
    assert votes.nearest.tolist() == [-1, -4]
    assert votes.farthest.tolist() == [-2, -5]
    with pytest.raises(ValueError, match=r"of shape \(2, 3\), and counts of \(2, 2\)"):
        count_votes(found, np.array([1, 2]), 0.5, similar=False, counts=counts[:, :2])


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"3 targets, and distances, rows, values of shapes"):
        count_votes(Neighbors(DISTANCES, ROWS, VALUES), np.arange(3), 1.0, similar=False)
