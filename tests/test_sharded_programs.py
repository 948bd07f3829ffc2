"""evaluate.py on a datastore in shards, by one rank and by several: the figures of a datastore in
one piece, and an index for each shard."""

import json

import numpy as np
import pytest
from small import SMALL

from neighborlm.retrieval.store.datastore import Datastore

HERE = (*SMALL, "--data.corpus", "words", "--knn.k", 16)
GIVEN = ("--knn.lmbda", 0.25, "--knn.temperature", 3)


def by(count: int) -> tuple:
    """Flags for so many ranks."""
    return ("--trainer.devices", count, "--trainer.strategy", "ddp" if count > 1 else "auto")


@pytest.fixture
def evaluate(workplace, run_program, tmp_path):
    """Runs evaluate.py with a datastore of some name; returns its results and its scores."""

    def run(name: str, *flags: object) -> tuple[dict, dict]:
        files = ("--output", tmp_path / "results.json", "--token_scores", tmp_path / "scores.npz")
        place = ("--knn.datastore", tmp_path / name, "--knnlm", *files)
        run_program(workplace, "evaluate.py", *HERE, *place, *flags)
        results = json.loads((tmp_path / "results.json").read_text())
        return results, dict(np.load(tmp_path / "scores.npz"))

    return run


def check_same(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    """Figures of the LM and of the mixture, as they are printed, and of each token."""
    for ours, theirs in zip(*((r[0], r[0]["knn"]) for r in (found, expected)), strict=True):
        assert f"{ours['ppl']:.2f}" == f"{theirs['ppl']:.2f}"
        assert f"{ours['loss']:.4f}" == f"{theirs['loss']:.4f}"
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    for name in expected[1]:
        # Large terms cancel in distances of an exact search by products.
        least = 1e-5 if "distance" in name else 1e-6
        np.testing.assert_allclose(found[1][name], expected[1][name], rtol=1e-5, atol=least)


def test_exact_search_by_ranks_is_that_of_a_datastore_in_one_piece(evaluate):
    """Also where a rank has no token of its own: it searches its shards for the other."""
    whole = evaluate("whole", "--knn.index", "flat", *GIVEN)
    assert "communication" not in whole[0]["knn"]
    alone = evaluate("sharded", "--knn.index", "flat", *GIVEN, "--knn.shards", 3)
    check_same(alone, whole)
    for flags in ((), ("--data.max_tokens", 100_000)):
        found = evaluate("sharded", "--knn.index", "flat", *GIVEN, *by(2), *flags)
        check_same(found, whole)
        communication = found[0]["knn"]["communication"]
        assert communication["ranks"] == 2
        assert communication["rounds"] >= 2
        assert min(communication["bytes_sent"], communication["bytes_received"]) > 10_000


def test_ranks_build_and_search_an_index_for_each_shard(evaluate, tmp_path):
    """With lmbda tuned: one pass of searches over each of two splits."""
    flags = ("--knn.index", "IVF8,SQ8", "--knn.nprobe", 2)
    together = evaluate("sharded", *flags, "--knn.shards", 3, *by(2))
    store = Datastore.open(tmp_path / "sharded")
    name = "IVF8_SQ8-l2.faiss"
    assert (store.path / f"{name}.trained").is_file()
    assert not (store.path / name).exists()
    shards = [store.shard(number).path / name for number in range(3)]
    made = [path.stat().st_mtime_ns for path in shards]
    alone = evaluate("sharded", *flags)
    check_same(together, alone)
    assert [path.stat().st_mtime_ns for path in shards] == made
    assert alone[0]["knn"]["lmbda"] == together[0]["knn"]["lmbda"]
    assert together[0]["knn"]["communication"]["rounds"] >= 2


def test_hosts_that_share_no_datastore(evaluate, workplace, run_program, run_on_hosts, tmp_path):
    """Each makes one shard in a folder of its own, and all index and search them together."""
    whole = evaluate("whole", "--knn.index", "flat", *GIVEN, "--data.max_tokens", 24)
    flags = (*HERE, *GIVEN, "--data.max_tokens", 24, "--knn.index", "IVF4,Flat", "--knn.shards", 2)

    def on_host(number: int) -> tuple:
        return (*flags, "--knn.shard", number, "--knn.datastore", tmp_path / f"host{number}")

    for number in range(2):
        run_program(workplace, "evaluate.py", *on_host(number), "--save_datastore")
    said = run_program(workplace, "evaluate.py", *on_host(0), "--knnlm", status=2).stderr
    assert "--knn.shard 0 of 2: this host has that shard alone" in said
    files = ("--output", tmp_path / "found.json", "--token_scores", tmp_path / "found.npz")
    run_on_hosts(workplace, "evaluate.py", lambda number: (*on_host(number), "--knnlm", *files))
    results = json.loads((tmp_path / "found.json").read_text())
    assert results["knn"]["communication"]["ranks"] == 2
    check_same((results, dict(np.load(tmp_path / "found.npz"))), whole)
