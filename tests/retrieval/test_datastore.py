"""The datastore on disk: complete, resumable, checked."""

import json
import shutil

import numpy as np
import pytest

from errors import InputError
from retrieval.datastore import Datastore, DatastoreBuilder, main

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
    with pytest.raises(InputError, match=r"needs 34\.0 GB but the disk has 0\.0 GB free"):
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
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **fields}))


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
