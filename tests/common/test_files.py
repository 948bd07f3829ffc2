"""Files and folders that appear complete, leftovers of killed processes, locks and digests."""

import errno
import os
import subprocess
import sys
from hashlib import blake2b

import pytest
from filelock import FileLock, Timeout

from neighborlm.common.errors import InputError
from neighborlm.common.files import Lock, digest_of, publishing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with publishing(path) as making:
        making.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["x.json"]


def test_so_does_a_folder(tmp_path):
    with publishing(tmp_path / "corpus") as making:
        (making / "train").mkdir(parents=True)
        (making / "train" / "tokens").write_text("a b")
        assert not (tmp_path / "corpus").exists()
    assert (tmp_path / "corpus" / "train" / "tokens").read_text() == "a b"
    assert names(tmp_path) == ["corpus"]


@pytest.mark.parametrize("make", ["write_text", "mkdir"])
def test_nothing_is_left_of_what_failed(tmp_path, make):
    (tmp_path / "x").write_text("old")

    def interrupted():
        with publishing(tmp_path / "x") as making:
            making.mkdir() if make == "mkdir" else making.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "x").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_what_killed_processes_left_is_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    alive, other = f"x.making-{os.getppid()}", f"xy.making-{process.pid}"
    for name in (f"x.making-{process.pid}", "x.making", alive, other):
        (tmp_path / name).write_text("half")
    with publishing(tmp_path / "x") as making:
        making.write_text("whole")
    assert names(tmp_path) == sorted(["x", alive, other])


def test_a_lock_is_held_by_one(tmp_path):
    with Lock(tmp_path / "x.lock"), pytest.raises(Timeout):
        Lock(tmp_path / "x.lock").acquire(timeout=0)
    with Lock(tmp_path / "x.lock"):
        pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOLCK, errno.EOPNOTSUPP])
def test_what_cannot_be_locked_is_said_in_a_sentence(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    said = rf"x\.lock: cannot be locked \({os.strerror(number)}\)"
    with pytest.raises(InputError, match=said):
        Lock(tmp_path / "x.lock").acquire(timeout=0)


def test_digests_are_of_the_content(tmp_path):
    (tmp_path / "x").write_bytes(b"some" * 1_000_000)
    expected = blake2b(b"some" * 1_000_000, digest_size=8).hexdigest()
    assert digest_of(tmp_path / "x") == digest_of(b"some" * 1_000_000) == expected
    assert digest_of("so", "me", size=4) == blake2b(b"some", digest_size=4).hexdigest()
