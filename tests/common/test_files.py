"""Files and folders appear complete or not at all, however the process that makes them ends; those
that are there need no writable place; errors of a disk are one sentence; locks and digests."""

import errno
import os
import resource
import signal
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from neighborlm.common.errors import InputError
from neighborlm.common.files import (
    Lock,
    digest_of,
    needing,
    publish_folder,
    publishing,
    sentences_about,
)


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


# -- folders that one process makes for all ------------------------------------------------------


def fill(folder: Path) -> None:
    (folder / "a.txt").write_text("whole")


def refuse(*args, **kwargs):
    raise AssertionError("must not be called")


def test_made_once(tmp_path):
    publish_folder(tmp_path / "new" / "one", fill, "--place")
    assert (tmp_path / "new" / "one" / "a.txt").read_text() == "whole"
    publish_folder(tmp_path / "new" / "one", refuse, "--place")
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"one", "one.lock"}


def test_what_is_there_needs_neither_lock_nor_place_to_write(tmp_path, monkeypatch):
    publish_folder(tmp_path / "one", fill, "--place")
    (tmp_path / "one.lock").unlink()
    monkeypatch.setattr(FileLock, "_acquire", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    publish_folder(tmp_path / "one", refuse, "--place")


@pytest.mark.parametrize("ending", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_nothing(tmp_path, ending):
    def fail(folder):
        fill(folder)
        raise ending

    with pytest.raises(ending):
        publish_folder(tmp_path / "one", fail, "--place")
    assert [p.name for p in tmp_path.iterdir()] == ["one.lock"]


def test_what_a_killed_process_left_is_swept_when_anything_is_made(tmp_path):
    def killed(folder):
        fill(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        publish_folder(tmp_path / "one", killed, "--place")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = tmp_path / f"one.making-{child}"
    assert (left / "a.txt").is_file()
    assert not (tmp_path / "one").exists()
    for other in ("one", "busy", "unlocked"):  # one as earlier versions left it
        (tmp_path / f"{other}.making").mkdir()
    with Lock(tmp_path / "busy.lock"):  # somebody is making it
        publish_folder(tmp_path / "two", fill, "--place")
    found = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert found == {"two", "busy.making", "unlocked.making"}


def test_a_folder_that_is_not_whole_is_replaced(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "old").touch()
    publish_folder(tmp_path / "one", fill, "--place", lambda folder: (folder / "a.txt").exists())
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["a.txt"]


def refusal(folder: Path, make=refuse) -> str:
    with pytest.raises(InputError) as error:
        publish_folder(folder, make, "--place")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_where_a_folder_is_to_be(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "one", tmp_path / "file" / "deep" / "one"):
        assert "named as --place" in refusal(folder)
        assert str(tmp_path / "file") in refusal(folder)


def test_a_place_without_locks(tmp_path, monkeypatch):
    def no_locks(lock):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "_acquire", no_locks)
    said = refusal(tmp_path / "one")
    assert said.startswith(f"{tmp_path / 'one'}.lock: cannot be locked (No locks available)")
    assert said.endswith("another one named as --place")


def test_a_full_disk_says_what_is_needed_in_a_unit_that_fits(tmp_path):
    def full(folder):
        with needing(2_345_678, folder / "a"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = refusal(tmp_path / "one", full)
    assert message.startswith(f"{tmp_path}: has no more room (")
    assert "about 2.35 MB needed" in message
    assert "--place" in message
    assert [p.name for p in tmp_path.iterdir()] == ["one.lock"]


def test_a_file_that_may_not_grow(tmp_path):
    """As on a full disk: the system refuses a write in the middle of a file."""

    def write(folder):
        (folder / "a").write_bytes(b"x" * 100_000)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        assert "has no more room" in refusal(tmp_path / "one", write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["one.lock"]


def test_errors_of_files_elsewhere_are_not_the_place_s(tmp_path):
    (tmp_path / "place").mkdir()
    with (
        pytest.raises(FileNotFoundError),
        sentences_about(tmp_path / "place", "--place"),
    ):
        (tmp_path / "text.txt").read_text()


# -- locks and digests ---------------------------------------------------------------------------


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
