"""Folders appear complete or not at all, however the process that makes them ends; existing ones
need no writable place; and errors of a disk are one sentence."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
from filelock import FileLock

from neighborlm.common.errors import InputError
from neighborlm.datamodules import publishing
from neighborlm.datamodules.publishing import DiskFull, publish, sentences_about


def fill(folder: Path) -> None:
    (folder / "a.txt").write_text("whole")


def refuse(*args, **kwargs):
    raise AssertionError("must not be called")


def test_made_once(tmp_path):
    publish(tmp_path / "new" / "one", fill, "--place")
    assert (tmp_path / "new" / "one" / "a.txt").read_text() == "whole"
    publish(tmp_path / "new" / "one", refuse, "--place")
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"one", "one.lock"}


def test_what_is_there_needs_neither_lock_nor_place_to_write(tmp_path, monkeypatch):
    publish(tmp_path / "one", fill, "--place")
    (tmp_path / "one.lock").unlink()
    monkeypatch.setattr(publishing, "FileLock", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    publish(tmp_path / "one", refuse, "--place")


@pytest.mark.parametrize("ending", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_nothing(tmp_path, ending):
    def fail(folder):
        fill(folder)
        raise ending

    with pytest.raises(ending):
        publish(tmp_path / "one", fail, "--place")
    assert [p.name for p in tmp_path.iterdir()] == ["one.lock"]


def test_what_a_killed_process_left_is_swept_when_anything_is_made(tmp_path):
    def killed(folder):
        fill(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        publish(tmp_path / "one", killed, "--place")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / "one.making" / "a.txt").is_file()
    assert not (tmp_path / "one").exists()
    with FileLock(tmp_path / "busy.lock"):  # somebody is making it
        (tmp_path / "busy.making").mkdir()
        publish(tmp_path / "two", fill, "--place")
    assert (tmp_path / "busy.making").exists()
    assert not (tmp_path / "one.making").exists()


def test_a_folder_that_is_not_whole_is_replaced(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "old").touch()
    publish(tmp_path / "one", fill, "--place", lambda folder: (folder / "a.txt").exists())
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["a.txt"]


def refusal(folder: Path, make=refuse) -> str:
    with pytest.raises(InputError) as error:
        publish(folder, make, "--place")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_where_a_folder_is_to_be(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "one", tmp_path / "file" / "deep" / "one"):
        assert "named as --place" in refusal(folder)
        assert str(tmp_path / "file") in refusal(folder)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(path):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), path)

    monkeypatch.setattr(publishing, "FileLock", no_locks)
    assert f"{tmp_path / 'one'}.lock: {os.strerror(errno.ENOLCK)}" in refusal(tmp_path / "one")


def test_a_full_disk_says_what_is_needed_in_a_unit_that_fits(tmp_path):
    def full(folder):
        raise DiskFull(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2_345_678)

    message = refusal(tmp_path / "one", full)
    assert message.startswith(f"{tmp_path}: has no more room (")
    assert "about 2.35 MB needed" in message
    assert "--place" in message
    assert not (tmp_path / "one.making").exists()


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
