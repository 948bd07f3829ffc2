"""The recall that an index says of itself: against brute force, the same after an interruption, of
each shard its own."""

import json

import numpy as np
import pytest

from neighborlm.callbacks.index_builder import IndexBuilder
from neighborlm.retrieval.search import Search, index_recall
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import open_retriever
from neighborlm.retrieval.search.index_recall import RecallSample
from neighborlm.retrieval.store import datastore as datastore_module
from neighborlm.retrieval.store.maintenance import deal_again

MASKED = [0, 7, 8, 299]


@pytest.fixture(autouse=True)
def small_sample(monkeypatch):
    """Queries that are a part of the keys, and several blocks of these."""
    monkeypatch.setattr(index_recall, "QUERIES", 20)
    monkeypatch.setattr(index_recall, "K", 10)
    monkeypatch.setattr(index_recall, "NPROBES", (2, 4))
    monkeypatch.setattr(datastore_module, "BLOCK_BYTES", 4 * 8 * 50)


def nearest_others(keys, own, k):
    """Numbers of the k keys nearest to some of them by squared distance, themselves left out."""
    far = np.square(keys[own][:, None] - keys).sum(-1)
    far[np.arange(len(own)), own] = np.inf
    return np.argsort(far, axis=1)[:, :k]


@pytest.mark.parametrize("factory", ["IVF7,SQ4", "RR8,IVF3,Flat", "SQ4"])
def test_against_brute_force(make_store, factory):
    """Row numbers and key numbers differ, as some rows have no key."""
    store, keys, _ = make_store(masked=MASKED)
    building = IndexBuilding(store, factory, "l2")
    manifest = json.loads(building.run().with_name(f"{building.path.name}.json").read_text())
    recall = manifest["recall"]
    assert recall == building.recall
    assert (recall["queries"], recall["k"]) == (20, 10)
    nprobes = [None] if "IVF" not in factory else [2, 3 if "IVF3" in factory else 4]
    assert [found["nprobe"] for found in recall["of"]] == nprobes
    kept = np.setdiff1d(np.arange(300), MASKED)
    own = RecallSample(store, "l2").own
    exact = kept[nearest_others(keys[kept], own, 10)]
    for nprobe, found in zip(nprobes, recall["of"], strict=True):
        search = Search(factory, nprobe=nprobe or 1)
        rows = open_retriever(store, search).search(keys[kept[own]], 11).rows
        others = [[row for row in of if row != kept[me]] for of, me in zip(rows, own, strict=True)]
        shares = [len({*a[:10]} & {*b}) / 10 for a, b in zip(others, exact.tolist(), strict=True)]
        assert found["recall"] == pytest.approx(np.mean(shares), abs=1e-4)
        assert 0.2 < found["recall"] < 1.0 or "Flat" in factory
    if nprobes[-1] == 3:  # all lists
        assert recall["of"][-1]["recall"] == 1.0


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_exact_search_finds_all(make_store, metric):
    building = IndexBuilding(make_store()[0], "Flat", metric)
    building.run()
    assert building.recall["of"] == [{"nprobe": None, "recall": 1.0}]


def test_an_interruption_does_not_change_it(make_store):
    def interrupt(stage, done, total):
        if done == 150:
            raise KeyboardInterrupt

    whole = IndexBuilding(make_store(name="whole")[0], "IVF7,SQ4", "l2")
    whole.run()
    cut = make_store(name="cut")[0]
    with pytest.raises(KeyboardInterrupt):
        IndexBuilding(cut, "IVF7,SQ4", "l2").run(interrupt)
    again, stages = IndexBuilding(cut, "IVF7,SQ4", "l2"), []
    again.run(lambda *stage: stages.append(stage))
    assert ("measuring", 150, 150) in stages
    assert again.recall == whole.recall


def test_of_two_keys_and_of_one(make_store):
    for rows, k in ((2, 1), (1, 0)):
        building = IndexBuilding(make_store(rows, name=str(rows))[0], "Flat", "l2")
        building.run()
        assert building.recall["k"] == k
    assert building.recall["of"] == []


def test_each_shard_says_its_own_and_the_builder_prints_it(make_store, tmp_path, capsys):
    sharded = deal_again(make_store(rows=400)[0], tmp_path / "sharded", 2)
    IndexBuilder(sharded.path, Search("IVF4,SQ4")).build()
    said = [line for line in capsys.readouterr().out.splitlines() if "finds" in line]
    for number, line in enumerate(said):
        path = sharded.shard(number).path / "IVF4_SQ4-l2.faiss.json"
        few, most = (found["recall"] for found in json.loads(path.read_text())["recall"]["of"])
        assert line == (
            f"index IVF4,SQ4, shard {number}: finds {few:.3f} (nprobe 2), {most:.3f} (nprobe 4) "
            "of the 10 nearest of 20 stored keys"
        )
    assert len(said) == 2
