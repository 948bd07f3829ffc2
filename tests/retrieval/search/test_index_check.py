"""Index files that do not say what they were built from: those of other keys or for another metric
are refused, and those that would end this process end another one."""

import shutil
import struct

import faiss
import numpy as np
import pytest
from small import without_digests

from neighborlm.common.errors import InputError
from neighborlm.retrieval.neighbors.codec import FeatureCodec
from neighborlm.retrieval.search import Search, building, index_check, open_retriever
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import read_index
from neighborlm.retrieval.store import datastore as datastore_module


@pytest.fixture
def store(new_builder, tmp_path):
    """Keys of several lengths, so that metrics differ, in some clusters; row 7 has none."""
    return make(new_builder, tmp_path / "store", 0)


def make(new_builder, path, seed):
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(400, 16)) + 3 * rng.normal(size=(9, 16))[rng.integers(0, 9, 400)]
    builder = new_builder(path, 400, 16, masked=[7])
    builder.write(np.arange(400), keys.astype(np.float32), np.zeros(400, np.int64))
    builder.sync()
    return builder.finish()


@pytest.fixture
def untried(monkeypatch):
    """Files are not tried out, which takes a process each."""
    monkeypatch.setattr(index_check, "_try_out", lambda *_: None)


def alone(path, place):
    """A copy of an index without its manifest."""
    place.parent.mkdir(exist_ok=True)
    return shutil.copy(path, place)


def opened(store, path, metric="l2"):
    return open_retriever(store, Search(str(path), metric, 7))


@pytest.mark.parametrize("factory", ["Flat", "IVF7,SQ8", "IVF7,PQ4x4", "RR16,IVF7,RaBitQfs"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_of_the_datastore_it_must_be(store, new_builder, tmp_path, untried, factory, metric):
    path = IndexBuilding(store, factory, metric).run()
    copy = alone(path, tmp_path / "elsewhere" / "x.faiss")
    assert (opened(store, copy, metric).search(store.keys[:3], 2).rows >= 0).all()
    other = make(new_builder, tmp_path / "other", 1)
    with pytest.raises(InputError, match=r"x.faiss: is not an index of .*other: the neighbours"):
        opened(other, copy, metric)
    overwritten = IndexBuilding(other, factory, metric).run()
    shutil.copy(path, overwritten)
    with pytest.raises(InputError, match=r"is damaged|were written"):
        opened(other, overwritten, metric)
    without_digests(overwritten.with_name(f"{overwritten.name}.json"))
    with pytest.raises(InputError, match="is not an index of"):
        opened(other, overwritten, metric)


@pytest.mark.parametrize(("built", "wanted"), [("ip", "cosine"), ("cosine", "ip")])
@pytest.mark.parametrize("factory", ["Flat", "IVF7,SQ8", "RR16,IVF7,RaBitQfs"])
def test_the_metric_must_be_the_one_that_it_was_built_for(
    store, tmp_path, untried, factory, built, wanted
):
    copy = alone(IndexBuilding(store, factory, built).run(), tmp_path / "x" / "x.faiss")
    opened(store, copy, built)
    with pytest.raises(InputError, match=f"--knn.metric {built}, but {wanted} is expected"):
        opened(store, copy, wanted)


def test_an_index_whose_ids_count_rows(store, tmp_path):
    """As those of the original program do, with the rows that hold no key."""
    index = faiss.index_factory(16, "IVF7,Flat")
    keys = np.array(store.keys[:])
    keys[7] = 0
    index.train(keys)
    index.add_with_ids(keys, np.arange(400))
    faiss.write_index(index, str(tmp_path / "x.index"))
    assert 7 not in opened(store, tmp_path / "x.index").search(keys[7:8], 400).rows
    order = np.arange(400)[::-1].copy()
    index.reset()
    index.add_with_ids(keys, order)
    faiss.write_index(index, str(tmp_path / "x.index"))
    with pytest.raises(InputError, match="is not an index of"):
        opened(store, tmp_path / "x.index")


def test_lists_are_those_beside_the_index(store, tmp_path, monkeypatch):
    """Wherever it was built; without them it is refused."""
    monkeypatch.setattr(building, "PART_BYTES", 1)
    monkeypatch.setattr(datastore_module, "BLOCK_BYTES", 4 * 16 * 100)
    path = IndexBuilding(store, "IVF7,SQfp16", "l2").run()
    lists = path.with_name(f"{path.name}.lists")
    assert str(tmp_path).encode() not in path.read_bytes()
    expected = opened(store, path).search(store.keys[:9], 5).rows
    copy = alone(path, tmp_path / "x" / "x.faiss")
    shutil.copy(lists, copy.with_name(lists.name))
    np.testing.assert_array_equal(opened(store, copy).search(store.keys[:9], 5).rows, expected)
    whole = lists.read_bytes()
    copy.with_name(lists.name).write_bytes(whole[:-9])
    with pytest.raises(InputError, match=f"has {len(whole) - 9} bytes, but {len(whole)} were wr"):
        opened(store, copy)
    copy.with_name(lists.name).unlink()
    with pytest.raises(InputError, match=r"its lists are missing, .*x/IVF7_SQfp16-l2.faiss.lists"):
        opened(store, copy)


@pytest.mark.parametrize("factory", ["IVF7,SQ8", "IVF7,SQfp16", "IVF7,PQ4x4"])
@pytest.mark.parametrize(
    ("number", "said"),
    [(40.0, "does not fit the centroid of its list, 3"), (np.inf, "of list 3 is not finite")],
)
def test_a_damaged_centroid(store, tmp_path, untried, factory, number, said):
    """Its list would be visited for the wrong queries, and no query be refused."""
    copy = alone(IndexBuilding(store, factory, "l2").run(), tmp_path / "x" / "x.faiss")
    index = opened(store, copy).index
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    centroids = faiss.downcast_index(ivf.quantizer).reconstruct_n(0, 7)
    data, before = copy.read_bytes(), centroids.tobytes()
    centroids[3, 5] = number
    copy.write_bytes(data.replace(before, centroids.tobytes()))
    with pytest.raises(InputError, match=f"x.faiss: is damaged.*{said}"):
        opened(store, copy)


LARGE = struct.pack("<q", 1 << 60)


@pytest.mark.parametrize(
    ("place", "put", "said"),
    [
        (0, b"none", "cannot be read as a faiss index"),
        (8, LARGE, "cannot be read as a faiss index"),  # number of keys
        (-8, LARGE, "has keys of number .*; expected 0 to 398"),  # the last id
        (-8, struct.pack("<q", -5), "has keys of number -5 to .*; expected 0 to 398"),
        (37, LARGE, "cannot be read as a faiss index"),  # number of lists
        (None, None, "cannot be read as a faiss index"),  # half of it
    ],
)
def test_numbers_that_cannot_be_right(store, tmp_path, place, put, said):
    """Faiss would believe them."""
    path = IndexBuilding(store, "IVF7,SQ8", "l2").run()
    copy = alone(path, tmp_path / "x" / "x.faiss")
    data = path.read_bytes()
    if place is None:
        copy.write_bytes(data[: len(data) // 2])
    else:
        place %= len(data)
        copy.write_bytes(data[:place] + put + data[place + len(put) :])
    with pytest.raises(InputError, match=f"x.faiss: .*{said}"):
        opened(store, copy)


def test_what_ends_the_process_ends_another(store, tmp_path, monkeypatch, capsys):
    """And a file is tried out once, but for what this program has written; where no other process
    can be started, it is used untried."""
    path = IndexBuilding(store, "IVF7,SQ8", "l2").run()
    copy = alone(path, tmp_path / "x" / "x.faiss")
    program = tmp_path / "dies.py"
    program.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(index_check.index_file, "__file__", str(program))
    with pytest.raises(InputError, match=r"x.faiss: cannot .* \(faiss ends with SIGSEGV\)"):
        read_index(copy)
    read_index(path)
    program.write_text("")
    read_index(copy)
    program.write_text("raise SystemExit(1)")
    read_index(copy)
    with pytest.raises(InputError, match="cannot be read as a codec"):
        FeatureCodec.read(alone(path, tmp_path / "x" / "y.faiss"))
    monkeypatch.setattr(index_check.sys, "executable", str(tmp_path / "none"))
    assert read_index(alone(path, tmp_path / "x" / "z.faiss")).ntotal == store.n_keys
    assert "z.faiss: is opened without having been tried out" in capsys.readouterr().out
