"""The table is made when the split's datastore is there, once, and one process makes it."""

import numpy as np
import pytest

from neighborlm.callbacks.index_builder import IndexBuilder
from neighborlm.callbacks.neighbor_table_writer import NeighborTableWriter
from neighborlm.common.errors import InputError
from neighborlm.retrieval.neighbors.tables import NeighborSearch
from neighborlm.retrieval.search import Search
from neighborlm.retrieval.store.datastore import Datastore, DatastoreBuilder


@pytest.fixture
def memory(filled) -> Datastore:
    """120 keys to search."""
    return filled("train", 120).finish()


@pytest.fixture
def queries(filled) -> DatastoreBuilder:
    """A split of 50 tokens, unfinished."""
    return filled("valid", 50)


@pytest.mark.parametrize("index", ["auto", "IVF4,SQ8"])
def test_made_of_a_complete_datastore_and_not_twice(memory, queries, index):
    IndexBuilder(memory.path, Search(index, "l2")).build()
    writer = NeighborTableWriter(queries.path, memory.path, Search(index, "l2", nprobe=4), k=16)
    with pytest.raises(InputError, match="unfinished"):
        writer.build()
    queries.finish()
    table = writer.build()
    assert writer.seconds > 0
    assert table.rows.shape == (50, 16)
    assert table.manifest["index"] == {"auto": "flat"}.get(index, index)
    made = {p: p.stat().st_mtime_ns for p in queries.path.glob("neighbors*.[nj]*")}
    assert len(made) == 2
    smaller = NeighborTableWriter(queries.path, memory.path, Search(index, "l2", nprobe=4), k=8)
    assert smaller.build().path == table.path
    assert smaller.seconds == 0
    assert {p: p.stat().st_mtime_ns for p in queries.path.glob("neighbors*.[nj]*")} == made


def test_a_window_and_a_named_index_file(memory):
    IndexBuilder(memory.path, Search("IVF4,SQ8", "l2")).build()
    path = str(memory.path / "IVF4_SQ8-l2.faiss")
    search = Search(path, "l2", 4)
    table = NeighborTableWriter(memory.path, memory.path, search, 8, exclude_window=3).build()
    assert (table.rows >= 0).all()
    assert (np.abs(table.rows - np.arange(120)[:, None]) >= 3).all()
    assert table.manifest["index"] == "IVF4_SQ8-l2.faiss"


def test_without_its_index_it_is_refused(memory, queries):
    queries.finish()
    with pytest.raises(InputError, match="no such index"):
        NeighborTableWriter(queries.path, memory.path, Search("IVF4,SQ8", "l2", 4), 8).build()


def test_of_several_ranks_one_searches(memory, queries, check_one_works):
    queries.finish()
    writer = NeighborTableWriter(queries.path, memory.path, Search("flat", "l2", 1), 8)
    check_one_works(NeighborSearch, writer.build)
