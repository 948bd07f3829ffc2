"""Manifests: written whole or not at all, read with one sentence for whatever is wrong."""

import os

import pytest

from neighborlm.common.errors import InputError
from neighborlm.retrieval.store.manifest import read_manifest, refuse_mismatch, write_manifest


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "manifest.json"
    write_manifest(path, "index", 3, {"dim": 8, "made_from": {"model": "m", "window": [1, 2]}})
    manifest = read_manifest(path, "index", 3)
    assert manifest["made_from"] == {"model": "m", "window": [1, 2]}
    assert manifest["command"]
    assert read_manifest(path, "index", 4)["dim"] == 8  # of an older version
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_a_failed_write_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    write_manifest(path, "index", 1, {"dim": 8})
    with pytest.raises(TypeError):
        write_manifest(path, "index", 1, {"dim": 9, "broken": object()})

    def no_replace(*_):
        raise OSError

    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(OSError):  # noqa: PT011
        write_manifest(path, "index", 1, {"dim": 9})
    assert read_manifest(path, "index", 1)["dim"] == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"kind": "index"', "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[1, 2]", r"describes \[1, 2\]"),
        (b"{}", "describes None"),
        (b'{"kind": "datastore", "version": 1}', "describes 'datastore'"),
        (b'{"kind": "index", "version": 3}', "has format version 3; this program reads up to 2"),
    ],
)
def test_what_is_no_such_manifest(tmp_path, content, message):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(path, "index", 2)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing(tmp_path):
    with pytest.raises(InputError, match=r"gone.json: no such file; expected the manifest of a x"):
        read_manifest(tmp_path / "gone.json", "x", 1)


def test_refusals_name_both_sides(tmp_path):
    found = {"key_type": "gnn", "dim": 8, "more": 1}
    refuse_mismatch(tmp_path, found, {"dim": 8})
    refuse_mismatch(tmp_path, found, {})
    with pytest.raises(InputError, match="its key type is gnn, but last_hidden is expected"):
        refuse_mismatch(tmp_path, found, {"dim": 8, "key_type": "last_hidden"})
    with pytest.raises(InputError, match="its metric is None, but l2 is expected"):
        refuse_mismatch(tmp_path, found, {"metric": "l2"})


def test_without_a_version(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text('{"kind": "index"}')
    with pytest.raises(InputError):
        read_manifest(path, "index", 1)
