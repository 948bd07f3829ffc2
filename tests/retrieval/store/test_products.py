"""Products of every kind that are complete: found where nobody can write, and as earlier versions
wrote them."""

import json

import numpy as np
import pytest
from small import without_digests

from neighborlm.callbacks.index_builder import IndexBuilder
from neighborlm.callbacks.neighbor_table_writer import NeighborTableWriter
from neighborlm.common.errors import InputError
from neighborlm.common.files import Lock
from neighborlm.originals.raw_datastore import import_datastore
from neighborlm.retrieval.memories.cache import RetrievalCache
from neighborlm.retrieval.memories.cache_builder import RetrievalCacheBuilder
from neighborlm.retrieval.neighbors.codec import build_codes
from neighborlm.retrieval.search import Search
from neighborlm.retrieval.search.index import open_retriever
from neighborlm.retrieval.store import Datastore
from neighborlm.retrieval.store.maintenance import deal_again

FACTORY = "IVF4,SQ8"


@pytest.fixture
def made(make_store, tmp_path):
    """Makes what is missing of every kind of product, and opens it all."""
    store, keys, values = make_store(masked=[3, 299])
    dealt = deal_again(store, tmp_path / "dealt", 2)
    keys.tofile(tmp_path / "raw_keys.npy")
    values.tofile(tmp_path / "raw_vals.npy")
    if not RetrievalCache.is_complete(tmp_path / "cache"):
        builder = RetrievalCacheBuilder(tmp_path / "cache", 4, 2, 50, {"model": "m"})
        builder.finish()

    def make():
        for path in (store.path, dealt.path):
            opened = Datastore.open(path)
            IndexBuilder(path, Search(FACTORY)).build()
            open_retriever(opened, Search(FACTORY, nprobe=4))
            NeighborTableWriter(path, path, Search(FACTORY, nprobe=4), k=3).build()
            build_codes(opened, "SQ8")
        import_datastore(tmp_path / "raw", tmp_path / "imported", 300, 8, vocab_size=50)
        RetrievalCache.open(tmp_path / "cache")

    make()
    return make


def state_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_what_is_complete_is_neither_locked_nor_written(made, tmp_path, monkeypatch):
    monkeypatch.setattr(Lock, "acquire", lambda *_, **__: pytest.fail("locked"))
    before = state_of(tmp_path)
    made()
    assert state_of(tmp_path) == before


def test_manifests_of_earlier_versions(made, tmp_path):
    """They had no versions of libraries, those of indexes no recall. Of raw maps alone a new one
    is written, as the old one did not mask all rows without a key."""
    changed = 0
    for path in tmp_path.rglob("*.json"):
        manifest = without_digests(path)
        assert manifest.pop("libraries")["neighborlm"]
        manifest.pop("recall", None)
        if manifest["kind"] == "trained index":
            del manifest["complete"]
        path.write_text(json.dumps(manifest))
        changed += 1
    assert changed == 17
    before = state_of(tmp_path)
    made()
    after = state_of(tmp_path)
    assert {path for path in before if after[path] != before[path]} == {
        tmp_path / "imported",
        *(tmp_path / "imported" / name for name in ("manifest.json", "masked.npy")),
        tmp_path / "imported" / "checksums.npy",
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda store: IndexBuilder(store.path, Search(FACTORY), seed=2).build(),
        lambda store: build_codes(store, "SQ8", seed=2),
    ],
    ids=["index", "codes"],
)
def test_what_is_made_from_something_else_is_refused_without_a_lock(
    made, tmp_path, monkeypatch, make
):
    monkeypatch.setattr(Lock, "acquire", lambda *_, **__: pytest.fail("locked"))
    with pytest.raises(InputError, match="its seed is 1, but 2 is expected"):
        make(Datastore.open(tmp_path / "store"))


def test_a_kill_before_the_checksums_are_made_does_no_harm(tmp_path, new_builder):
    """Their file is there whole or not at all."""
    new_builder(tmp_path / "s")
    (tmp_path / "s" / "checksums.npy").unlink()
    (tmp_path / "s" / "checksums.npy.making").write_bytes(b"half")
    builder = new_builder(tmp_path / "s")
    keys = np.ones((300, 8), np.float32)
    builder.write(np.arange(300), keys, np.zeros(300, np.int64))
    builder.sync()
    assert len(builder.finish()) == 300
    assert not list((tmp_path / "s").glob("*making*"))
