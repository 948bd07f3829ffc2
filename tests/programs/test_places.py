"""Where a command writes: whole files, and JSON that every reader takes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from neighborlm.common.errors import InputError
from neighborlm.programs import places
from neighborlm.programs.places import as_json, as_npz, check_writable, own_folder, write_all


def test_json_has_null_for_what_is_not_finite():
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = as_json({"ppl": math.inf, "of": [math.nan, 1.5, {"x": -math.inf}]})
    found = json.loads(content, parse_constant=refuse)
    assert found == {"ppl": None, "of": [None, 1.5, {"x": None}]}


def test_what_can_be_written_is_and_the_rest_is_named(tmp_path):
    columns = {"position": np.arange(3), "log_prob": np.zeros(3, np.float32)}
    (tmp_path / "file").touch()
    impossible = tmp_path / "file/b.json"
    good = tmp_path / "new/a.npz"
    with pytest.raises(InputError, match=r"b\.json .*could not be written"):
        write_all({impossible: b"{}", good: as_npz(columns)})
    found = np.load(good)
    assert list(found) == ["position", "log_prob"]
    np.testing.assert_array_equal(found["position"], columns["position"])
    assert [path.name for path in good.parent.iterdir()] == ["a.npz"]


def test_a_device_is_written_and_stays(monkeypatch):
    """A rename would put a file in its place."""
    monkeypatch.setattr(places, "write_whole", None)
    check_writable(Path("/dev/null"), "--output")
    write_all({Path("/dev/null"): b"{}"})


def test_nothing_is_made_by_looking(tmp_path):
    check_writable(tmp_path / "a/b/c.json", "--output")
    check_writable(tmp_path / "a/b", "--knn.cache", "folder")
    assert list(tmp_path.iterdir()) == []


def test_each_command_has_a_folder_of_its_own(tmp_path):
    """What is in use stays, what a killed command has left is removed, other files are let be."""
    left, file = tmp_path / "retrieved-left", tmp_path / "retrieved-file"
    left.mkdir()
    (left / "keys.npy").touch()
    file.touch()
    with own_folder(tmp_path, "retrieved") as first:
        assert not left.exists()
        with own_folder(tmp_path, "retrieved") as second:
            assert first.is_dir()
            assert second not in (first, file)
        assert not second.exists()
        assert first.is_dir()
    assert [path for path in tmp_path.iterdir() if path.name[0] != "."] == [file]
