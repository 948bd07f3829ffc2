"""The index is built when the datastore is there, once, and only where there is one to build."""

import json
import shutil
import threading

import numpy as np
import pytest

from neighborlm.callbacks.index_builder import IndexBuilder
from neighborlm.common.errors import InputError
from neighborlm.retrieval.search import Search
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import open_retriever
from neighborlm.retrieval.search.sharded_retriever import ShardedRetriever
from neighborlm.retrieval.store.datastore import Datastore, DatastoreBuilder
from neighborlm.retrieval.store.maintenance import deal_again

FACTORY = "IVF4,SQ8"


@pytest.fixture
def builder(filled) -> DatastoreBuilder:
    """A datastore of 120 keys, unfinished."""
    return filled("train", 120)


@pytest.fixture
def store(builder) -> Datastore:
    """The complete datastore."""
    return builder.finish()


def indexes(path):
    """Names of the index files."""
    return sorted(p.name for p in path.iterdir() if ".faiss" in p.name and p.name[0] != ".")


def test_built_after_prediction_and_not_twice(builder):
    callback = IndexBuilder(
        builder.path, Search(FACTORY, "ip")
    )  # made before the datastore is there
    with pytest.raises(InputError, match="unfinished"):
        callback.on_predict_end(None, None)
    store = builder.finish()
    callback.on_predict_end(None, None)
    assert indexes(store.path) == ["IVF4_SQ8-ip.faiss", "IVF4_SQ8-ip.faiss.json"]
    assert callback.seconds["train"] > 0
    assert callback.seconds["add"] > 0
    retriever = open_retriever(store, Search(FACTORY, "ip", 4))
    assert retriever.index.ntotal == 120

    made = {p: p.stat().st_mtime_ns for p in store.path.iterdir() if "lock" not in p.name}
    again = IndexBuilder(store.path, Search(FACTORY, "ip"))
    again.build()
    assert again.seconds == {}
    assert {p: p.stat().st_mtime_ns for p in made} == made


@pytest.mark.parametrize("index", ["flat", "auto", "elsewhere/some.faiss"])
def test_nothing_to_build(store, index):
    """So few keys are searched exactly under `auto`; a path is somebody else's index."""
    IndexBuilder(store.path, Search(index, "l2")).build()
    assert indexes(store.path) == []


def test_another_seed_is_refused_and_not_built_over(store):
    IndexBuilder(store.path, Search(FACTORY, "l2"), seed=1).build()
    with pytest.raises(InputError, match="its seed is 1, but 2 is expected"):
        IndexBuilder(store.path, Search(FACTORY, "l2"), seed=2).build()


def test_of_several_ranks_one_builds(store, check_one_works):
    check_one_works(IndexBuilding, IndexBuilder(store.path, Search(FACTORY, "l2")).build)


# -- a datastore in shards -----------------------------------------------------------------------


@pytest.fixture
def sharded(store, tmp_path) -> Datastore:
    """The same keys in three shards."""
    return deal_again(store, tmp_path / "sharded", 3)


def test_each_shard_has_an_index_and_all_begin_with_one(sharded, store):
    builder = IndexBuilder(sharded.path, Search(FACTORY, "l2"))
    builder.build()
    assert builder.seconds["train"] > 0
    assert builder.seconds["add"] > 0
    name = "IVF4_SQ8-l2.faiss"
    assert indexes(sharded.path) == [f"{name}.trained", f"{name}.trained.json"]
    trained = json.loads((sharded.path / f"{name}.trained.json").read_text())
    for number in range(3):
        shard = sharded.shard(number)
        assert indexes(shard.path) == [name, f"{name}.json"]
        described = json.loads((shard.path / f"{name}.json").read_text())
        assert described["trained"] == trained["fingerprint"]
        assert described["datastore"] == shard.fingerprint

    # Not twice, and to find what one index of the same keys finds.
    made = {p: p.stat().st_mtime_ns for p in sharded.path.rglob("*.faiss*") if p.name[0] != "."}
    again = IndexBuilder(sharded.path, Search(FACTORY, "l2"))
    again.build()
    assert again.seconds == {}
    assert {p: p.stat().st_mtime_ns for p in made} == made
    IndexBuilder(store.path, Search(FACTORY, "l2")).build()
    queries = np.random.default_rng(2).normal(size=(9, 4)).astype(np.float32)
    whole, shards = (open_retriever(s, Search(FACTORY, "l2", nprobe=2)) for s in (store, sharded))
    assert isinstance(shards, ShardedRetriever)
    np.testing.assert_array_equal(shards.search(queries, 12)[1], whole.search(queries, 12)[1])

    with pytest.raises(InputError, match="trained: its seed is 1, but 2 is expected"):
        IndexBuilder(sharded.path, Search(FACTORY, "l2"), seed=2).build()


def test_ranks_build_different_shards_at_a_time(sharded, monkeypatch):
    """One rank stays with its first shard until the other has built all the rest."""
    real, rest_is_done = IndexBuilding.run, threading.Event()
    built: dict[str, list[str]] = {"slow": [], "fast": []}

    def run(self, report):
        rank = threading.current_thread().name
        if rank == "slow":
            started.set()
            assert rest_is_done.wait(timeout=20)
        built[rank].append(self.path.parent.name)
        real(self, report)
        if len(built["fast"]) == 2:
            rest_is_done.set()

    started = threading.Event()
    monkeypatch.setattr(IndexBuilding, "run", run)
    build = IndexBuilder(sharded.path, Search(FACTORY, "l2")).build
    ranks = [threading.Thread(target=build, name=name) for name in built]
    ranks[0].start()
    assert started.wait(timeout=20)
    ranks[1].start()
    for rank in ranks:
        rank.join(timeout=20)
        assert not rank.is_alive()
    names = [sharded.shard(number).path.name for number in range(3)]
    assert built == {"slow": names[:1], "fast": names[1:]}
    assert (
        open_retriever(sharded, Search(FACTORY, "l2", 4)).search(np.zeros((1, 4)), 5)[1].min() >= 0
    )


def test_a_killed_shard_goes_on(sharded):
    """To the same bytes, beginning with the same trained index."""
    IndexBuilder(sharded.path, Search(FACTORY, "l2")).build()
    shard = sharded.shard(1)
    expected = (shard.path / "IVF4_SQ8-l2.faiss").read_bytes()
    trained = sharded.path / "IVF4_SQ8-l2.faiss.trained"
    for file in shard.path.glob("*.faiss*"):
        file.unlink()

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    building = IndexBuilding(shard, FACTORY, "l2", trained=trained)
    with pytest.raises(KeyboardInterrupt):
        building.run(stop)
    assert building.partial.is_file()
    IndexBuilder(sharded.path, Search(FACTORY, "l2")).build()
    assert building.path.read_bytes() == expected


def test_an_index_that_began_otherwise_is_refused(sharded):
    """A shard's own quantiser sees distances that do not compare with those of the others."""
    IndexBuilder(sharded.path, Search(FACTORY, "l2")).build()
    shard = sharded.shard(2)
    for file in shard.path.glob("*.faiss*"):
        file.unlink()
    IndexBuilding(shard, FACTORY, "l2").run()
    with pytest.raises(InputError, match=r"trained is None, but \w{16} is expected"):
        open_retriever(sharded, Search(FACTORY, "l2", 4))
    with pytest.raises(InputError, match="its trained is None"):
        IndexBuilder(sharded.path, Search(FACTORY, "l2")).build()
    shutil.rmtree(shard.path)
    with pytest.raises(InputError, match="shard 2 of 3 is missing"):
        open_retriever(sharded, Search(FACTORY, "l2", 4))


def test_an_index_of_the_whole_serves(sharded):
    IndexBuilding(sharded, FACTORY, "l2").run()
    IndexBuilder(sharded.path, Search(FACTORY, "l2")).build()
    assert indexes(sharded.shard(0).path) == []
    assert open_retriever(sharded, Search(FACTORY, "l2", 4)).index.ntotal == 120
