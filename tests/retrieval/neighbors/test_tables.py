"""Neighbour tables: exact against brute force, with a window left out, resumed to the same bytes,
reused for a smaller k, refused."""

import itertools
import json

import numpy as np
import pytest
from small import without_digests

from neighborlm.common.errors import InputError
from neighborlm.originals import neighbor_table
from neighborlm.originals.neighbor_table import import_table, open_imported
from neighborlm.retrieval.neighbors import tables as neighbors_module
from neighborlm.retrieval.neighbors.tables import (
    NeighborSearch,
    NeighborTable,
    TableSettings,
    compacted,
    find_table,
    outside_window,
)
from neighborlm.retrieval.search import Search
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import open_retriever
from neighborlm.retrieval.search.retriever import FlatRetriever
from neighborlm.retrieval.store import arrays, artifact
from neighborlm.retrieval.store.datastore import Datastore


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks for every table, the last one shorter."""
    monkeypatch.setattr(neighbors_module, "QUERIES_AT_ONCE", 64)
    monkeypatch.setattr(neighbor_table, "ROWS_AT_ONCE", 64)


@pytest.fixture
def split(make_split):
    """Queries of 150 rows, some of them masked."""
    return make_split(150, "valid", masked=[0, 70, 71, 149], seed=1)


@pytest.fixture
def make_split(new_builder, tmp_path):
    """Makes a datastore of random keys; with a memory each is like those before it."""

    def make(rows: int, name: str, masked=(), seed: int = 0, memory: float = 0.0) -> Datastore:
        rng = np.random.default_rng(seed)
        keys = rng.normal(size=(rows, 8)).astype(np.float32)
        weights = memory ** np.arange(min(rows, 200))
        keys = np.stack([np.convolve(column, weights)[:rows] for column in keys.T], axis=1)
        builder = new_builder(tmp_path / name, rows, masked=masked, corpus=name)
        builder.write(np.arange(rows), keys, rng.integers(0, 50, rows))
        builder.sync()
        return builder.finish()

    return make


def search(queries, memory, k, metric="l2", **options):
    """The search of an exact table."""
    settings = TableSettings(metric, "flat", 1, k, **options)
    return NeighborSearch(queries, memory, FlatRetriever(memory, metric), settings)


def brute_force(queries, memory, k, metric="l2", window=0):
    """Rows `[N, k]` of the k nearest, -1 where missing, one query at a time."""
    expected = np.full((len(queries), k), -1)
    stored = np.setdiff1d(np.arange(len(memory)), memory.masked)
    for i in np.setdiff1d(np.arange(len(queries)), queries.masked):
        rows = stored[np.abs(stored - i) >= window]
        query, keys = queries.keys[i].astype(np.float64), memory.keys[rows].astype(np.float64)
        far = ((query - keys) ** 2).sum(1) if metric == "l2" else -(keys @ query)
        nearest = rows[np.argsort(far)[:k]]
        expected[i, : len(nearest)] = nearest
    return expected


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_equals_brute_force(make_split, split, metric):
    memory = make_split(300, "train", masked=[5, 6, 299])
    table = search(split, memory, 20, metric).run()
    np.testing.assert_array_equal(table.rows, brute_force(split, memory, 20, metric))
    assert (table.rows[split.masked] == -1).all()
    assert table.rows.dtype == np.int16


@pytest.mark.parametrize("window", [1, 3, 40])
@pytest.mark.parametrize("index", ["flat", "IVF4,Flat"])
def test_window_is_left_out_and_k_are_kept(make_split, monkeypatch, window, index):
    """With the widest one, what some fetch at first lies in it for the most part."""
    memory = make_split(400, "train", masked=[3, 200], memory=0.97)
    if index != "flat":
        IndexBuilding(memory, index, "l2").run()
    retriever = open_retriever(memory, Search(index, "l2", nprobe=4))
    fetched = []
    real = retriever.search
    monkeypatch.setattr(retriever, "search", lambda q, k: fetched.append((len(q), k)) or real(q, k))
    settings = TableSettings("l2", index, 4, 24, exclude_window=window)
    table = NeighborSearch(memory, memory, retriever, settings).run()
    np.testing.assert_array_equal(table.rows, brute_force(memory, memory, 24, window=window))
    again = [count for count, k in fetched if k == 24 + 2 * window - 1]
    if window == 40:
        assert 0 < sum(again) < len(memory)  # only those that lacked some
    else:
        assert sum(again) == memory.n_keys  # at once


def test_more_neighbours_than_keys(make_split):
    memory = make_split(30, "train", masked=[4])
    table = search(memory, memory, 40, exclude_window=5).run()
    np.testing.assert_array_equal(table.rows, brute_force(memory, memory, 40, window=5))
    assert (table.rows[:, -1] == -1).all()


def test_without_a_window_a_split_finds_itself(make_split):
    memory = make_split(100, "train")
    table = search(memory, memory, 3).run()
    np.testing.assert_array_equal(table.rows[:, 0], np.arange(100))


def test_mask_and_compaction():
    rows = np.array([[9, 4, -1, 6, 5, 1], [7, 7, -1, -1, 0, 2]], dtype=np.int16)
    kept = outside_window(rows, np.array([5, 7]), 2)
    assert kept.tolist() == [[1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]]
    assert compacted(rows, kept, 2, -1).tolist() == [[9, 1], [0, 2]]
    assert compacted(rows, kept, 1, -1).tolist() == [[9], [0]]
    wide = compacted(rows, kept, 8, -1)
    assert wide.dtype == np.int16
    assert wide.tolist() == [[9, 1, *[-1] * 6], [0, 2, *[-1] * 6]]
    assert outside_window(rows, np.array([5, 7]), 0).tolist() == (rows >= 0).tolist()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, "kill"])
def test_resumed_table_has_the_same_bytes(make_split, monkeypatch, stop):
    """An interrupt keeps what is done; before a kill it was marked from time to time."""
    memory = make_split(400, "train", memory=0.97)
    whole = make_split(400, "train-again", memory=0.97)
    options = {"exclude_window": 30}
    expected = search(whole, whole, 24, **options).run()

    half = search(memory, memory, 24, **options)
    real, calls = half.retriever.search, itertools.count()

    def interrupted(queries, k):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return real(queries, k)

    monkeypatch.setattr(half.retriever, "search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        half.run()
    manifest = json.loads(half.path.read_text())
    assert manifest["done"] in (64, 128, 192, 256)
    assert not manifest["complete"]
    with pytest.raises(InputError, match="unfinished"):
        NeighborTable.open(half.path)
    assert find_table(memory, memory, TableSettings("l2", "flat", 1, 24, 30)) is None
    if stop == "kill":  # after the rows were written and before they were marked
        without_digests(half.path, done=manifest["done"] - 64)

    stages = []
    again = search(memory, memory, 24, **options).run(lambda *stage: stages.append(stage))
    done = manifest["done"] - (64 if stop == "kill" else 0)
    assert stages[0] == ("searching", done, 400)
    assert stages[-1] == ("searching", 400, 400)
    made, once = (folder.path / "neighbors-k24.npy" for folder in (memory, whole))
    assert made.read_bytes() == once.read_bytes()
    assert again.manifest["complete"]
    np.testing.assert_array_equal(again.rows, expected.rows)


def test_marks_are_set_while_it_runs(make_split, monkeypatch):
    monkeypatch.setattr(artifact, "SYNC_SECONDS", 0.0)
    memory = make_split(300, "train")
    making = search(memory, memory, 4)
    marks = []

    def report(stage, done, total):
        marks.append((json.loads(making.path.read_text())["done"], done))

    making.run(report)
    assert marks == [(0, 0), (0, 64), (64, 128), (128, 192), (192, 256), (256, 300)]


def test_a_larger_table_serves_smaller_k(make_split, split):
    memory = make_split(300, "train")
    for k in (16, 32):
        search(split, memory, k).run()

    def find(k, memory=memory, metric="l2", index="flat", **options):
        return find_table(split, memory, TableSettings(metric, index, 1, k, **options))

    table = find(10)
    assert table.manifest["k"] == 16
    np.testing.assert_array_equal(table.nearest(10), brute_force(split, memory, 10))
    assert np.shares_memory(table.nearest(10), table.rows)
    assert find(17).manifest["k"] == 32
    assert find(33) is None
    assert find(10, exclude_window=1) is None
    assert find(10, metric="ip") is None
    assert find(10, index="IVF4,Flat") is None
    assert find(10, make_split(300, "other")) is None
    with pytest.raises(InputError, match="has 16 neighbours a token; 17 are expected"):
        table.nearest(17)
    before = table.path.stat().st_mtime_ns
    search(split, memory, 16).run()
    assert table.path.stat().st_mtime_ns == before  # complete: nothing is written


def test_tables_of_a_sweep_lie_side_by_side(make_split, split):
    memory = make_split(300, "train")
    IndexBuilding(memory, "IVF8,Flat", "l2").run()
    settings = {nprobe: TableSettings("l2", "IVF8,Flat", nprobe, 12) for nprobe in (1, 2, 8)}
    for nprobe, how in settings.items():
        retriever = open_retriever(memory, Search("IVF8,Flat", "l2", nprobe))
        NeighborSearch(split, memory, retriever, how).run()
    names = sorted(path.name for path in split.path.glob("neighbors-k12*.npy"))
    assert len(names) == 3
    assert names[-1] == "neighbors-k12.npy"
    tables = {nprobe: find_table(split, memory, how) for nprobe, how in settings.items()}
    assert all(tables[nprobe].manifest["nprobe"] == nprobe for nprobe in tables)
    np.testing.assert_array_equal(tables[8].rows, brute_force(split, memory, 12))
    assert (tables[1].rows != tables[8].rows).any()


def test_row_numbers_take_the_smallest_type():
    types = [neighbors_module._row_type(n).name for n in (1, 1 << 15, (1 << 15) + 1, 1 << 31)]
    assert types == ["int16", "int16", "int32", "int32"]
    assert neighbors_module._row_type((1 << 31) + 1).name == "int64"


def test_what_does_not_fit_is_refused(make_split, split, new_builder, tmp_path, monkeypatch):
    memory = make_split(300, "train")
    with pytest.raises(InputError, match="no such file; expected the manifest of a neighbour"):
        NeighborTable.open(split.path / "neighbors-k8.npy")
    with pytest.raises(ValueError, match="a retriever by l2 for a table by ip"):
        NeighborSearch(
            split, memory, FlatRetriever(memory, "l2"), TableSettings("ip", "flat", 1, 8)
        )
    with pytest.raises(InputError, match=r"has 150 rows and .*train 300; expected the same split"):
        search(split, memory, 8, exclude_window=2)
    wide = new_builder(tmp_path / "wide", 10, dim=9)
    wide.write(np.arange(10), np.ones((10, 9), np.float32), np.zeros(10, np.int64))
    wide.sync()
    with pytest.raises(InputError, match="its dim is 9, but 8 is expected"):
        search(wide.finish(), memory, 8)
    with monkeypatch.context() as patch:
        patch.setattr(arrays.shutil, "disk_usage", lambda _: type("", (), {"free": 99}))
        with pytest.raises(InputError, match=r"its neighbour table needs .* free"):
            search(split, memory, 8).run()
    assert not list(split.path.glob("neighbors*"))

    table = search(split, memory, 8).run()
    assert NeighborTable.open(split.path / "neighbors-k8.npy").path == table.path
    file = split.path / "neighbors-k8.npy"
    whole = file.read_bytes()
    without_digests(table.path)
    file.write_bytes(whole[:-2])
    with pytest.raises(InputError, match=r"neighbors-k8.npy: has"):
        NeighborTable.open(table.path)
    np.save(file, np.zeros((150, 9), np.int16))
    with pytest.raises(InputError, match=r"holds int16 \[150, 9\], but the manifest says"):
        NeighborTable.open(table.path)
    file.unlink()
    with pytest.raises(InputError, match=r"neighbors-k8.npy: no such file"):
        NeighborTable.open(table.path)
    table.path.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        search(split, memory, 8)


def test_raw_table_of_the_original_in_place(make_split, split, tmp_path):
    memory = make_split(300, "train")
    rows = np.random.default_rng(0).integers(-1, 300, (150, 8))
    raw = tmp_path / "neighbors.mmap.8"
    rows.tofile(raw)
    table = import_table(raw, 8, split, memory)
    np.testing.assert_array_equal(table.rows, rows)
    assert NeighborTable.open(table.path).nearest(3).shape == (150, 3)
    made_in = TableSettings("l2", "flat", 1, 4)
    assert find_table(split, memory, made_in) is None  # nobody knows how it was made
    own = search(split, memory, 8).run()
    assert own.path != table.path
    assert import_table(raw, 8, split, memory).path == table.path
    for k in (8, 3):
        assert open_imported(split, memory, k).path == table.path
    with pytest.raises(
        InputError, match=r"has imported tables of \[8\] neighbours; expected one of 9"
    ):
        open_imported(split, memory, 9)
    with pytest.raises(InputError, match=r"has 9600 bytes of data, expected 8400 for int64"):
        import_table(raw, 7, split, memory)
    said = "holds rows from -1 to 299 for tokens 0 to 63; expected -1 or below the 100"
    with pytest.raises(InputError, match=said):
        import_table(raw, 8, split, make_split(100, "small"))
    with pytest.raises(InputError, match="no such file"):
        import_table(tmp_path / "nowhere", 8, split, memory)
    raw.write_bytes(raw.read_bytes()[:-8])
    with pytest.raises(
        InputError, match=r"neighbors.mmap.8: has 9592 bytes, but 9600 were written"
    ):
        NeighborTable.open(table.path)


@pytest.mark.parametrize("bad", [300, -2])
def test_every_row_of_a_raw_table_is_checked(make_split, tmp_path, bad):
    split, memory = make_split(1000, "test"), make_split(300, "train")
    rows = np.random.default_rng(0).integers(-1, 300, (1000, 3))
    rows[499, 1] = bad  # between those that a sample of 256 takes
    raw = tmp_path / "neighbors.mmap.3"
    rows.tofile(raw)
    with pytest.raises(InputError, match=rf"from .*{bad} .*for tokens 448 to 511; expected -1 or"):
        import_table(raw, 3, split, memory)
    assert not list(split.path.glob("neighbors*"))
    rows[499, 1] = 299
    rows.tofile(raw)
    stages = []
    import_table(raw, 3, split, memory, lambda *stage: stages.append(stage))
    assert stages[-1] == ("checking", 1000, 1000)
