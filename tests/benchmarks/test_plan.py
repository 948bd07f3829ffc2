"""The plan beside what the code takes."""

import numpy as np
import pytest

from benchmarks import plan
from benchmarks.plan import compare
from neighborlm.tools.plan_settings import Constants


def test_every_stage_is_measured_and_bytes_are_as_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CODEC", "PQ8")  # OPQ takes its time
    monkeypatch.setattr(plan, "QUERIES", 1000)
    factories = ["IVF64,SQfp16", "IVF64,SQ8"]
    exact, again = compare(5000, factories, Constants(), tmp_path, lambda *_: None)
    stages = {"datastore", "index", "search", "bytes"}
    assert exact["ratio"].keys() == stages | {"table", "codes"}
    assert again["ratio"].keys() == stages | {"stored keys"}
    for line in (exact, again):
        assert line["ratio"]["bytes"] == pytest.approx(1, abs=0.2)
        assert all(np.isfinite(ratio) and ratio > 0 for ratio in line["ratio"].values())
