"""The settings that are refused before anything is opened."""

import math

import pytest

from neighborlm.common.errors import InputError
from neighborlm.programs.settings import KNNSettings


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lmbda": 0.0},
        {"lmbda": 1.0},
        {"lmbda": "auto"},
        {"temperature": "auto"},
        {"k": 1, "nprobe": 1, "temperature": 1e-3},
        {"similarity": "ip", "distances": "exact"},
    ],
)
def test_possible(settings):
    KNNSettings(**settings).check()


@pytest.mark.parametrize(
    "settings",
    [
        {"lmbda": -0.01},
        {"lmbda": 1.01},
        {"lmbda": math.nan},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"k": 0},
        {"nprobe": 0},
        {"min_context": -1},
        {"similarity": "ip", "distances": "index"},
    ],
    ids=str,
)
def test_impossible(settings):
    with pytest.raises(InputError) as caught:
        KNNSettings(**settings).check()
    name, value = next(iter(settings.items()))
    assert f"--knn.{name}" in str(caught.value)
    assert str(value) in str(caught.value)


def test_infinite_temperature():
    with pytest.raises(InputError):
        KNNSettings(temperature=math.inf).check()
