"""The datastore on disk: complete, resumable, checked."""

import json
import os
import shutil

import numpy as np
import pytest
import xxhash
from small import without_digests

from neighborlm.common.errors import InputError
from neighborlm.retrieval.store.datastore import Datastore, DatastoreBuilder
from neighborlm.retrieval.store.maintenance import verify_datastore
from neighborlm.tools.datastore import main

KEYS = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
VALUES = np.random.default_rng(2).integers(0, 50, 300)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_any_order_in_two_sessions_gives_the_same_bytes(tmp_path, new_builder, dtype):
    whole = new_builder(tmp_path / "whole", dtype=dtype)
    whole.write(np.arange(300), KEYS, VALUES)
    whole.sync()
    whole.finish()

    order = np.random.default_rng(3).permutation(300)
    first = new_builder(tmp_path / "cut", dtype=dtype)
    first.write(order[:100], KEYS[order[:100]], VALUES[order[:100]])
    first.sync()
    first.write(order[100:150], KEYS[order[100:150]] + 1, VALUES[order[100:150]])  # never synced
    del first
    second = new_builder(tmp_path / "cut", dtype=dtype)
    assert second.n_written == 100
    assert second.is_written(order[:100])
    assert not second.is_written(order[:101])
    second.write(order[100:], KEYS[order[100:]], VALUES[order[100:]])
    second.sync()
    store = second.finish()
    np.testing.assert_array_equal(store.values, VALUES)
    for name in ("keys.npy", "values.npy"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "cut" / "written.npy").exists()


def test_unfinished_stores_are_neither_opened_nor_finished(tmp_path, new_builder):
    builder = new_builder(tmp_path / "s")
    builder.write(np.arange(299), KEYS[:299], VALUES[:299])
    builder.sync()
    with pytest.raises(RuntimeError, match="1 rows were never written"):
        builder.finish()
    with pytest.raises(InputError, match="unfinished"):
        Datastore.open(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "its model is m, but other is expected"),
        ({"dim": 9}, "its dim is 8, but 9 is expected"),
        ({"dtype": "fp16"}, "its dtype is fp32, but fp16 is expected"),
        ({"rows": 301}, "its rows is 300, but 301 is expected"),
    ],
)
def test_another_store_in_the_making_is_refused(tmp_path, new_builder, change, message):
    new_builder(tmp_path / "s")
    with pytest.raises(InputError, match=message):
        new_builder(tmp_path / "s", **change)


def test_complete_stores_are_not_written_over(make_store, tmp_path, new_builder):
    make_store()
    with pytest.raises(InputError, match="already holds a complete datastore"):
        new_builder(tmp_path / "store")


def test_disk_space(tmp_path, new_builder, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"needs 34 GB but the disk has 1 MB free"):
        new_builder(tmp_path / "s", rows=10**9)
    assert not (tmp_path / "s" / "keys.npy").exists()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)],
)
def test_values_take_the_smallest_type(tmp_path, vocab_size, dtype):
    builder = DatastoreBuilder(tmp_path / "s", 2, 1, "fp32", vocab_size, {}, np.empty(0, int))
    builder.write(np.arange(2), np.zeros((2, 1), np.float32), np.array([0, vocab_size - 1]))
    builder.sync()
    store = builder.finish()
    assert store.values.dtype == dtype
    assert store.values[1] == vocab_size - 1


def test_half_precision_overflow_is_refused(tmp_path, new_builder):
    builder = new_builder(tmp_path / "s", dtype="fp16")
    with pytest.raises(InputError, match=r"--knn.dtype fp32"):
        builder.write(np.array([0]), np.full((1, 8), 70000.0, np.float32), np.array([1]))


def test_masked_rows_hold_no_key(make_store):
    masked = [0, 1, 7, 8, 9, 299]
    store, _, _ = make_store(masked=masked)
    kept = np.setdiff1d(np.arange(300), masked)
    assert store.n_keys == len(kept)
    assert not store.keys[masked].any()
    np.testing.assert_array_equal(store.rows_of(np.arange(len(kept))), kept)
    assert store.rows_of(np.array([-1])) == -1
    blocks = np.concatenate(list(store.blocks(block_rows=17)))
    np.testing.assert_array_equal(blocks, store.keys[kept])
    rest = np.concatenate(list(store.blocks(start=100, block_rows=17)))
    np.testing.assert_array_equal(rest, store.keys[kept][100:])


def damage_keys(path):
    with open(path / "keys.npy", "r+b") as file:
        file.truncate(500)


def change(path, **fields):
    without_digests(path / "manifest.json", **fields)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_keys, r"keys.npy: has 500 bytes, expected more than 9600"),
        (lambda path: (path / "values.npy").unlink(), r"values.npy: no such file"),
        (lambda path: change(path, dtype="fp16"), r"holds float32 .* says float16"),
        (lambda path: change(path, version=99), r"format version 99"),
        (lambda path: change(path, kind="index"), r"describes 'index'"),
        (lambda path: (path / "manifest.json").write_text("{"), r"is not JSON"),
        (lambda path: (path / "manifest.json").unlink(), r"no such file"),
    ],
)
def test_damaged_stores(make_store, damage, message):
    path = make_store()[0].path
    damage(path)
    with pytest.raises(InputError, match=message):
        Datastore.open(path)


def test_show(make_store, capsys):
    store, _, _ = make_store()
    main(["show", "--path", str(store.path)])
    assert json.loads(capsys.readouterr().out)["fingerprint"] == store.fingerprint


def test_masked_stores_resume_to_the_same_bytes(tmp_path, new_builder):
    """What stands in the batches at masked rows does not matter, not even NaN."""
    masked = [0, 1, 64, 65, 299]
    sessions = {"whole": [range(300)], "cut": [range(60, 200), range(60), range(200, 300)]}
    for name, batches in sessions.items():
        for rows in map(np.array, batches):
            builder = new_builder(tmp_path / name, masked=masked)
            keys = KEYS.copy()
            keys[masked] = np.nan
            builder.write(rows, keys[rows], VALUES[rows])
            builder.sync()
            assert builder.is_written(rows)
            assert builder.is_written(np.array(masked))  # from the start
        builder.finish()
    for name in ("keys.npy", "values.npy", "masked.npy"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    store = Datastore.open(tmp_path / "cut")
    kept = np.setdiff1d(np.arange(300), masked)
    np.testing.assert_array_equal(store.keys[kept], KEYS[kept])
    assert not store.keys[masked].any()


def test_ranks_write_into_one_store(tmp_path, new_builder):
    """Rank 1 opens what rank 0 has made; each sees what the other has marked."""
    ranks = [new_builder(tmp_path / "s") for _ in range(2)]
    for start in range(0, 300, 20):
        rows = np.arange(start, start + 20)
        ranks[start // 20 % 2].write(rows, KEYS[rows], VALUES[rows])
    ranks[0].sync()
    assert ranks[1].n_written == 160
    with pytest.raises(RuntimeError, match="140 rows were never written"):
        ranks[0].finish()
    ranks[1].sync()
    store = ranks[0].finish()
    np.testing.assert_array_equal(store.keys, KEYS)
    np.testing.assert_array_equal(store.values, VALUES)


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        ("fp16", 65504.0, 65520.0),
        ("fp16", 0.0, np.nan),
        ("fp32", 1e30, np.inf),
        ("fp32", 0, np.nan),
    ],
)
def test_only_finite_keys_are_stored(tmp_path, new_builder, dtype, good, bad):
    builder = new_builder(tmp_path / "s", dtype=dtype)
    keys = np.full((2, 8), good, np.float32)
    builder.write(np.array([0, 1]), keys, np.array([1, 1]))
    keys[1, 7] = bad
    with pytest.raises(InputError, match=f"infinite or NaN as {dtype}"):
        builder.write(np.array([2, 3]), keys, np.array([1, 1]))
    builder.sync()
    assert builder.is_written(np.array([0, 1]))
    assert not builder.written[2:].any()


@pytest.mark.parametrize("short", [0, 1])
def test_disk_space_is_counted_in_bytes(tmp_path, monkeypatch, short):
    """700 keys of 16 halves, values of two bytes, a mark each, and a page for headers."""
    needed = 700 * (16 * 2 + 2 + 1) + 4096
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - short)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    arguments = (tmp_path / "s", 700, 16, "fp16", 300, {}, np.empty(0, np.int64))
    if short:
        with pytest.raises(InputError, match="kB free"):
            DatastoreBuilder(*arguments)
    else:
        assert DatastoreBuilder(*arguments).keys.nbytes == 700 * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 51}, "its vocab size is 50, but 51 is expected"),
        ({"vocab_size": 257}, "its value dtype is uint8, but uint16 is expected"),
        ({"masked": np.array([3])}, "its masked is 0, but 1 is expected"),
        ({"made_from": {"model": "m", "window": 3}}, "its window is None, but 3 is expected"),
        ({"made_from": {}}, "its made from is {'model': 'm'}, but {} is expected"),
    ],
)
def test_a_builder_that_differs_anywhere_is_refused(tmp_path, new_builder, change, message):
    new_builder(tmp_path / "s")
    same = {"vocab_size": 50, "made_from": {"model": "m"}, "masked": np.empty(0, np.int64)}
    with pytest.raises(InputError, match=message):
        DatastoreBuilder(tmp_path / "s", 300, 8, "fp32", **{**same, **change})


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_keys_against_counting(tmp_path, new_builder, seed):
    rng = np.random.default_rng(seed)
    masked = np.flatnonzero(rng.random(300) < [0.02, 0.5, 0.95, 0.0][seed])
    builder = new_builder(tmp_path / "s", masked=masked)
    builder.write(np.arange(300), KEYS, VALUES)
    builder.sync()
    store = builder.finish()
    rows = [row for row in range(300) if row not in set(masked.tolist())]
    asked = rng.integers(-1, len(rows), (5, 7))
    expected = [[rows[n] if n >= 0 else -1 for n in line] for line in asked.tolist()]
    assert store.rows_of(asked).tolist() == expected
    for start, size in ((0, 1000), (0, 1), (len(rows) // 2, 3), (len(rows), 4)):
        blocks = list(store.blocks(start, size))
        assert all(block.dtype == np.float32 and 0 < len(block) <= size for block in blocks)
        found = np.concatenate([np.empty((0, 8)), *blocks])
        np.testing.assert_array_equal(found, KEYS[rows][start:])


def cut_in_the_middle(path, new_builder, **settings):
    """A store that is half written."""
    builder = new_builder(path, **settings)
    builder.write(np.arange(150), KEYS[:150], VALUES[:150])
    builder.sync()


def test_truncated_keys_are_not_resumed(tmp_path, new_builder):
    cut_in_the_middle(tmp_path / "s", new_builder)
    damage_keys(tmp_path / "s")
    with pytest.raises(InputError, match=r"keys.npy: has 500 bytes"):
        new_builder(tmp_path / "s")


@pytest.mark.parametrize("name", ["keys.npy", "values.npy", "written.npy"])
def test_missing_files_are_not_resumed(tmp_path, new_builder, name):
    cut_in_the_middle(tmp_path / "s", new_builder)
    (tmp_path / "s" / name).unlink()
    with pytest.raises(InputError, match=name):
        new_builder(tmp_path / "s")


def test_other_masked_rows_are_refused(tmp_path, new_builder):
    cut_in_the_middle(tmp_path / "s", new_builder, masked=[3, 4])
    with pytest.raises(InputError):
        new_builder(tmp_path / "s", masked=[200, 201])


def test_values_beyond_the_vocabulary_are_refused(tmp_path, new_builder):
    with pytest.raises((InputError, ValueError, OverflowError)):
        new_builder(tmp_path / "s").write(np.array([0]), KEYS[:1], np.array([300]))


@pytest.mark.parametrize(
    "fields", [{}, {"complete": True}, {"complete": True, "rows": 1, "dim": 1, "dtype": "fp8"}]
)
def test_manifests_without_fields(tmp_path, fields):
    content = json.dumps({"kind": "datastore", "version": 1, **fields})
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError):
        Datastore.open(tmp_path)


def test_room_is_taken_at_once(tmp_path, new_builder):
    new_builder(tmp_path / "s", rows=20_000)
    status = (tmp_path / "s" / "keys.npy").stat()
    assert status.st_blocks * 512 >= status.st_size


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 32 of the rows above."""
    monkeypatch.setattr("neighborlm.retrieval.store.checksums.CHUNK_BYTES", 32 * 8 * 4)


def sums_of(path):
    keys, values = np.load(path / "keys.npy"), np.load(path / "values.npy")
    blocks = [slice(first, first + 32) for first in range(0, 300, 32)]
    hashed = xxhash.xxh3_64_intdigest
    return [[hashed(array[b].tobytes()) for array in (keys, values)] for b in blocks]


def test_checksums_are_taken_while_rows_are_written(tmp_path, new_builder, small_chunks):
    """Of each chunk once its last row is marked, whoever marked the others; of masked chunks at the
    end; in one written before there were checksums, at the end too."""
    masked = np.arange(64, 100)
    order = np.random.default_rng(4).permutation(300)
    first = new_builder(tmp_path / "s", masked=masked)
    (tmp_path / "s" / "checksums.npy").unlink()
    first.write(order[:200], KEYS[order[:200]], VALUES[order[:200]])
    first.sync()
    ranks = [new_builder(tmp_path / "s", masked=masked) for _ in range(2)]
    for rank, rows in zip(ranks, np.split(order[200:], 2), strict=True):
        rank.write(rows, KEYS[rows], VALUES[rows])
        rank.sync()
    sums = np.load(tmp_path / "s" / "checksums.npy")
    done = [chunk for chunk in range(10) if chunk != 2]
    assert sums[done].tolist() == [sums_of(tmp_path / "s")[chunk] for chunk in done]
    assert not sums[2].any()
    store = ranks[0].finish()
    assert np.load(tmp_path / "s" / "checksums.npy").tolist() == sums_of(tmp_path / "s")
    assert store.manifest["checksums"]["rows"] == 32
    verify_datastore(store)


def test_written_rows_do_not_change(tmp_path, new_builder):
    """So that their checksum holds: another machine may round in another way."""
    builder = new_builder(tmp_path / "s")
    builder.write(np.arange(200), KEYS[:200], VALUES[:200])
    builder.sync()
    builder.write(np.arange(300), KEYS + 1, VALUES)
    np.testing.assert_array_equal(builder.keys[:200], KEYS[:200])
    np.testing.assert_array_equal(builder.keys[200:], KEYS[200:] + 1)


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("keys", 70, "keys.npy: rows 64 to 95 are damaged"),
        ("keys", 299, "keys.npy: rows 288 to 299 are damaged"),
        ("values", 31, "values.npy: rows 0 to 31 are damaged"),
        ("masked", 0, "masked.npy: is damaged"),
    ],
)
def test_verify_names_what_is_damaged(make_store, small_chunks, name, row, said, capsys):
    store, _, _ = make_store(masked=[5, 6])
    main(["verify", "--path", str(store.path)])
    with open(store.path / f"{name}.npy", "r+b") as file:
        file.seek(128 + row * getattr(store, name).strides[0])
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(SystemExit):
        main(["verify", "--path", str(store.path)])
    assert said in capsys.readouterr().err


def test_datastores_without_checksums_get_them(make_store, capsys):
    path = make_store()[0].path
    manifest = without_digests(path / "manifest.json")
    before = (path / "checksums.npy").read_bytes()
    (path / "checksums.npy").unlink()
    with pytest.raises(SystemExit):
        main(["verify", "--path", str(path)])
    assert "has no checksums" in capsys.readouterr().err
    main(["verify", "--path", str(path), "--record", "true"])
    assert (path / "checksums.npy").read_bytes() == before
    assert json.loads((path / "manifest.json").read_text())["made_from"] == manifest["made_from"]
