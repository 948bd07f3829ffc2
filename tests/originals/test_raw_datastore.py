"""Raw datastores of the original programs: opened in place, checked, with zero rows masked."""

import json

import numpy as np
import pytest

from neighborlm.common.errors import InputError
from neighborlm.originals import raw_datastore
from neighborlm.originals.raw_datastore import import_datastore
from neighborlm.retrieval.search.retriever import FlatRetriever
from neighborlm.retrieval.search.torch_retriever import TorchRetriever
from neighborlm.retrieval.store.datastore import Datastore


@pytest.fixture
def raw(tmp_path):
    """Prefix of 40 fp32 keys and int64 values, the last 3 rows zero."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(40, 8)).astype(np.float32)
    values = rng.integers(4, 300, (40, 1))
    keys[-3:], values[-3:] = 0, 0
    keys.tofile(tmp_path / "store_keys.npy")
    values.tofile(tmp_path / "store_vals.npy")
    return tmp_path / "store", keys, values[:, 0]


def test_in_place_with_zero_rows_masked(raw, tmp_path):
    source, keys, values = raw
    store = import_datastore(source, tmp_path / "out", 40, 8, vocab_size=300)
    np.testing.assert_array_equal(store.keys, keys)
    np.testing.assert_array_equal(store.values, values)
    assert store.masked.tolist() == [37, 38, 39]
    assert sum(f.stat().st_size for f in (tmp_path / "out").iterdir()) < 2000  # nothing copied
    _, rows, _ = FlatRetriever(store, "l2").search(np.zeros((1, 8), np.float32), 40)
    assert sorted(rows[0]) == [-1, -1, -1, *range(37)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_that_hold_no_key_are_masked_wherever_they_are(tmp_path, dtype):
    """Zeros in front, in the middle and at the end, and what is not finite."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(40, 8)).astype(dtype)
    keys[[0, 1, 20, 39]] = 0
    keys[5, 3], keys[30, 0] = np.nan, -np.inf
    keys.tofile(tmp_path / "s_keys.npy")
    rng.integers(4, 300, 40).tofile(tmp_path / "s_vals.npy")
    store = import_datastore(tmp_path / "s", tmp_path / "out", 40, 8)
    assert store.masked.tolist() == [0, 1, 5, 20, 30, 39]
    for retriever in (FlatRetriever(store, "l2"), TorchRetriever(store, "l2", "cpu")):
        found = retriever.search(np.zeros((1, 8), np.float32), 40)
        kept = np.setdiff1d(np.arange(40), store.masked)
        distances = np.square(keys[kept].astype(np.float64)).sum(axis=1)
        np.testing.assert_array_equal(found.rows[0, :34], kept[np.argsort(distances)])
        assert (found.rows[0, 34:] == -1).all()
    np.zeros((40, 8), dtype).tofile(tmp_path / "s_keys.npy")
    with pytest.raises(InputError, match=r"s_keys.npy: holds nothing but zeros"):
        import_datastore(tmp_path / "s", tmp_path / "new", 40, 8)


def test_maps_are_read_once(raw, tmp_path, monkeypatch):
    import_datastore(raw[0], tmp_path / "out", 40, 8)
    monkeypatch.setattr(raw_datastore, "_read", lambda *_: pytest.fail("read again"))
    import_datastore(raw[0], tmp_path / "out", 40, 8)


def test_half_precision_and_info_json(tmp_path):
    folder = tmp_path / "gnn"
    folder.mkdir()
    keys = np.random.default_rng(1).normal(size=(20, 4)).astype(np.float16)
    keys.tofile(folder / "keys.npy")
    np.arange(4, 24, dtype=np.int32).tofile(folder / "vals.npy")
    info = {"dstore_size": 20, "hidden_size": 4, "vocab_size": 50, "dstore_fp16": True}
    (folder / "info.json").write_text(json.dumps(info))
    store = import_datastore(folder, tmp_path / "out")
    np.testing.assert_array_equal(store.keys, keys)
    np.testing.assert_array_equal(store.values, np.arange(4, 24))


def test_numpy_files_with_header(tmp_path):
    keys = np.ones((5, 4), np.float32)
    np.save(tmp_path / "s_keys.npy", keys)
    np.save(tmp_path / "s_vals.npy", np.arange(5, dtype=np.int16))
    store = import_datastore(tmp_path / "s", tmp_path / "out", 5, 4)
    np.testing.assert_array_equal(store.keys, keys)
    np.testing.assert_array_equal(store.values, np.arange(5))


def test_wrapped_values_are_refused(tmp_path):
    np.ones((3, 4), np.float16).tofile(tmp_path / "s_keys.npy")
    np.array([5, 40000, 6]).astype(np.int16).tofile(tmp_path / "s_vals.npy")
    with pytest.raises(InputError, match=r"s_vals.npy.*int16.*wrapped"):
        import_datastore(tmp_path / "s", tmp_path / "out", 3, 4)
    np.array([5, 4, 6]).astype(np.int16).tofile(tmp_path / "s_vals.npy")
    with pytest.raises(InputError, match="wrapped"):
        import_datastore(tmp_path / "s", tmp_path / "out", 3, 4, vocab_size=40000)


@pytest.mark.parametrize(
    ("size", "dim", "vocab_size", "message"),
    [
        (41, 8, 300, r"store_keys.npy: has 1280 bytes of data, expected 1312"),
        (40, 9, 300, r"store_keys.npy: has 1280 bytes"),
        (40, 8, 100, r"store_vals.npy: holds the value \d+, but the dictionary has only 100"),
        (None, None, 300, r"--knn.size and --knn.dim"),
    ],
)
def test_what_does_not_fit(raw, tmp_path, size, dim, vocab_size, message):
    with pytest.raises(InputError, match=message):
        import_datastore(raw[0], tmp_path / "out", size, dim, vocab_size=vocab_size)


def test_negative_values_of_a_wide_type_are_not_called_wrapped(raw, tmp_path):
    values = np.fromfile(f"{raw[0]}_vals.npy", np.int64)
    values[3] = -7
    values.tofile(f"{raw[0]}_vals.npy")
    with pytest.raises(InputError, match="holds the value -7; expected token ids from 0 on"):
        import_datastore(raw[0], tmp_path / "out", 40, 8)


@pytest.mark.parametrize("text", ["", "[]", '{"dstore_size": 20}', '{"dstore_size": 0}'])
def test_an_info_json_that_describes_no_datastore(tmp_path, text):
    (tmp_path / "info.json").write_text(text)
    with pytest.raises(InputError, match=r"info.json: does not describe a datastore"):
        import_datastore(tmp_path, tmp_path / "out")


def test_truncated_later(raw, tmp_path):
    import_datastore(raw[0], tmp_path / "out", 40, 8)
    with open(f"{raw[0]}_keys.npy", "r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match=r"store_keys.npy: has 100 bytes"):
        Datastore.open(tmp_path / "out")
