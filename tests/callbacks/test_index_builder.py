"""The index is built when the datastore is there, once, and only where there is one to build."""

import pytest

from callbacks.index_builder import IndexBuilder
from errors import InputError
from retrieval.datastore import Datastore, DatastoreBuilder
from retrieval.index import IndexBuilding, open_retriever

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
    return sorted(p.name for p in path.iterdir() if ".faiss" in p.name and "lock" not in p.name)


def test_built_after_prediction_and_not_twice(builder):
    callback = IndexBuilder(builder.path, FACTORY, "ip")  # made before the datastore is there
    with pytest.raises(InputError, match="unfinished"):
        callback.on_predict_end(None, None)
    store = builder.finish()
    callback.on_predict_end(None, None)
    assert indexes(store.path) == ["IVF4_SQ8-ip.faiss", "IVF4_SQ8-ip.faiss.json"]
    assert callback.seconds["train"] > 0
    assert callback.seconds["add"] > 0
    retriever = open_retriever(store, FACTORY, "ip", 4)
    assert retriever.index.ntotal == 120

    made = {p: p.stat().st_mtime_ns for p in store.path.iterdir() if "lock" not in p.name}
    again = IndexBuilder(store.path, FACTORY, "ip")
    again.build()
    assert again.seconds == {}
    assert {p: p.stat().st_mtime_ns for p in made} == made


@pytest.mark.parametrize("index", ["flat", "auto", "elsewhere/some.faiss"])
def test_nothing_to_build(store, index):
    """So few keys are searched exactly under `auto`; a path is somebody else's index."""
    IndexBuilder(store.path, index, "l2").build()
    assert indexes(store.path) == []


def test_another_seed_is_refused_and_not_built_over(store):
    IndexBuilder(store.path, FACTORY, "l2", seed=1).build()
    with pytest.raises(InputError, match="its seed is 1, but 2 is expected"):
        IndexBuilder(store.path, FACTORY, "l2", seed=2).build()


def test_of_several_ranks_one_builds(store, check_one_works):
    check_one_works(IndexBuilding, IndexBuilder(store.path, FACTORY, "l2").build)
