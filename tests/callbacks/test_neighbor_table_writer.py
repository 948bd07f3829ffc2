"""The table is made when the split's datastore is there, once, and one process makes it."""

import threading

import numpy as np
import pytest

from callbacks.index_builder import IndexBuilder
from callbacks.neighbor_table_writer import NeighborTableWriter
from errors import InputError
from retrieval.datastore import Datastore, DatastoreBuilder
from retrieval.neighbors import NeighborSearch


def filled(path, rows: int) -> DatastoreBuilder:
    """A datastore that is complete but for its last word."""
    made_from = {"split": path.name}
    builder = DatastoreBuilder(path, rows, 4, "fp32", 9, made_from, np.empty(0, np.int64))
    keys = np.random.default_rng(rows).normal(size=(rows, 4)).astype(np.float32)
    builder.write(np.arange(rows), keys, np.zeros(rows, np.int64))
    builder.sync()
    return builder


@pytest.fixture
def memory(tmp_path) -> Datastore:
    """120 keys to search."""
    return filled(tmp_path / "train", 120).finish()


@pytest.fixture
def queries(tmp_path) -> DatastoreBuilder:
    """A split of 50 tokens, unfinished."""
    return filled(tmp_path / "valid", 50)


@pytest.mark.parametrize("index", ["auto", "IVF4,SQ8"])
def test_made_after_prediction_and_not_twice(memory, queries, index):
    IndexBuilder(memory.path, index, "l2").build()
    callback = NeighborTableWriter(queries.path, memory.path, index, "l2", nprobe=4, k=16)
    with pytest.raises(InputError, match="unfinished"):
        callback.on_predict_end(None, None)
    queries.finish()
    callback.on_predict_end(None, None)
    table = callback.build()
    assert table.rows.shape == (50, 16)
    assert table.manifest["index"] == {"auto": "flat"}.get(index, index)
    made = {p: p.stat().st_mtime_ns for p in queries.path.glob("neighbors*.[nj]*")}
    assert len(made) == 2
    smaller = NeighborTableWriter(queries.path, memory.path, index, "l2", nprobe=4, k=8)
    assert smaller.build().path == table.path
    assert {p: p.stat().st_mtime_ns for p in queries.path.glob("neighbors*.[nj]*")} == made


def test_window_distances_and_a_named_index_file(memory):
    IndexBuilder(memory.path, "IVF4,SQ8", "l2").build()
    path = str(memory.path / "IVF4_SQ8-l2.faiss")
    writer = NeighborTableWriter(
        memory.path, memory.path, path, "l2", 4, 8, exclude_window=3, keep_distances=True
    )
    table = writer.build()
    assert (np.abs(table.rows - np.arange(120)[:, None]) >= 3).all()
    assert (np.diff(table.distances, axis=1) >= 0).all()
    assert table.manifest["index"] == "IVF4_SQ8-l2.faiss"


def test_without_its_index_it_is_refused(memory, queries):
    queries.finish()
    with pytest.raises(InputError, match="no such index"):
        NeighborTableWriter(queries.path, memory.path, "IVF4,SQ8", "l2", 4, 8).build()


def test_of_several_ranks_one_searches(memory, queries, monkeypatch):
    """The others wait until the table is there."""
    queries.finish()
    real, calls, started, gate = NeighborSearch.run, [], threading.Event(), threading.Event()

    def slow(search, report):
        calls.append(search)
        started.set()
        gate.wait(timeout=10)
        return real(search, report)

    monkeypatch.setattr(NeighborSearch, "run", slow)
    writer = NeighborTableWriter(queries.path, memory.path, "flat", "l2", 1, 8)
    ranks = [threading.Thread(target=writer.build) for _ in range(3)]
    for rank in ranks:
        rank.start()
    assert started.wait(timeout=10)
    ranks[0].join(timeout=0.1)
    assert all(rank.is_alive() for rank in ranks)
    gate.set()
    for rank in ranks:
        rank.join(timeout=10)
        assert not rank.is_alive()
    assert len(calls) == 1
