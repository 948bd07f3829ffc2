"""At a tiny size, what the ranks send is what they should, and they find the same."""

import json

import pytest

from benchmarks.distributed import run


@pytest.mark.slow
@pytest.mark.usefixtures("one_server")
@pytest.mark.parametrize("index", ["flat", "IVF4,SQfp16"])
def test_what_is_sent_is_what_is_expected(tmp_path, index):
    sizes = {"keys": 2000, "dim": 8, "queries": 64, "k": 9, "at_once": 20}
    run(tmp_path / "d.json", ranks=[1, 2], index=index, nprobe=2, **sizes)
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert [(row["placement"], row["ranks"]) for row in rows] == [
        ("contiguous", 1),
        ("contiguous", 2),
        ("round_robin", 1),
        ("round_robin", 2),
    ]
    for row in rows:
        assert row["same_neighbors"] > 0.99
        assert row["queries_per_second"] > 0
        assert row["asked_again"] == 0
        senders = row["ranks"] if row["ranks"] > 1 else 0
        assert row["bytes_sent"] == [row["bytes_expected"]] * senders
