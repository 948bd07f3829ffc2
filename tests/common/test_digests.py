"""Files are compared with their digests when they are first opened, and again once they have
changed, were moved or copied; where the stamps lie does not matter."""

import os
import shutil

import pytest
import xxhash

from neighborlm.common import digests
from neighborlm.common.digests import (
    check_digests,
    compare_once,
    digest_of_file,
    digests_of,
    keep_stamps,
    path_from,
    stamps_of,
    verification,
)
from neighborlm.common.errors import InputError


@pytest.fixture
def opened(tmp_path):
    """Opens `product/x` as a new process would; tells whether it was read."""
    (tmp_path / "product").mkdir()
    (tmp_path / "product" / "x").write_bytes(b"some" * 1000)

    def open_it(folder=None, forget=True, expected="digest", **settings) -> bool:
        folder, read = folder or tmp_path / "product", []
        if forget:
            digests._compared.clear()
        settings = {"small_bytes": 0, **settings}
        compare_once(folder / ".stamps", {folder / "x": expected}, read.extend, **settings)
        return bool(read)

    return open_it


def test_a_file_is_read_once_and_again_when_it_has_changed(opened, tmp_path):
    assert [opened(), opened()] == [True, False]
    path = tmp_path / "product" / "x"
    before = path.stat()
    path.write_bytes(b"more" * 1000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a tool does that keeps times
    assert [opened(), opened()] == [True, False]


@pytest.mark.parametrize("way", ["copied", "copied over", "replaced"])
def test_another_file_is_read_whatever_its_times_are(opened, tmp_path, way):
    assert opened()
    path, other = tmp_path / "product" / "x", tmp_path / "other"
    if way == "copied":
        shutil.copytree(tmp_path / "product", tmp_path / "copy")
        assert [opened(tmp_path / "copy"), opened(tmp_path / "copy")] == [True, False]
        return
    other.write_bytes(b"else" * 1000)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    shutil.copy2(other, path) if way == "copied over" else os.replace(other, path)
    assert [opened(), opened()] == [True, False]


def test_a_folder_that_is_moved_or_linked_is_the_same(opened, tmp_path):
    assert opened()
    os.rename(tmp_path / "product", tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved", target_is_directory=True)
    assert not opened(tmp_path / "moved")
    assert not opened(tmp_path / "link")


def test_what_is_written_here_is_known(opened, tmp_path):
    path = tmp_path / "product" / "x"
    keep_stamps(path.with_name(".stamps"), stamps_of([path]), {path: "digest"}, small_bytes=0)
    assert not opened()
    assert opened(expected="another")


def test_when_files_are_read_can_be_said(opened):
    assert opened()
    with verification("always"):
        assert opened()
        assert not opened(forget=False)  # once in a process
        assert opened(forget=False, all_of_them=True)
    with verification("never"):
        assert not opened(small_bytes=5000)
        assert opened(all_of_them=True)
    assert not opened()
    assert opened(small_bytes=5000)  # small ones are read by every process


def test_stamps_that_cannot_lie_beside_the_product_are_in_the_user_s_cache(
    opened, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = digests.write_whole

    def write_whole(path, content):
        if path.parent == tmp_path / "product":
            raise PermissionError
        real(path, content)

    monkeypatch.setattr(digests, "write_whole", write_whole)
    assert [opened(), opened()] == [True, False]
    assert os.listdir(tmp_path / "product") == ["x"]
    (kept,) = (tmp_path / "cache").rglob("*.json")
    for damage in (b"", b"[1]", b'{"x": 1}'):
        kept.write_bytes(damage)
        assert opened()
    monkeypatch.setattr(digests, "write_whole", lambda *_: (_ for _ in ()).throw(OSError))
    kept.unlink()
    assert [opened(), opened()] == [True, True]


def test_what_is_damaged_is_named(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"some" * 1_000_000)
    described = digests_of(tmp_path, [path])
    expected = xxhash.xxh3_64_hexdigest(path.read_bytes())
    assert described == {"x": {"bytes": 4_000_000, "xxh3_64": expected}}
    assert digest_of_file(path) == expected

    def refusal() -> str:
        with pytest.raises(InputError) as error:
            check_digests(tmp_path, described, tmp_path / ".stamps", "bring a copy")
        return str(error.value)

    check_digests(tmp_path, described, tmp_path / ".stamps", "bring a copy")
    path.write_bytes(b"more" + b"some" * 999_999)
    assert refusal().startswith(f"{path}: is damaged: its checksum is ")
    assert refusal().endswith(f"had {expected}; bring a copy")
    with verification("never"):
        check_digests(tmp_path, described, tmp_path / ".stamps", "")
        path.write_bytes(b"some")
        assert refusal() == f"{path}: has 4 bytes, but 4000000 were written; bring a copy"
    path.unlink()
    assert refusal() == f"{path}: is missing, but 4000000 were written; bring a copy"


def test_files_elsewhere_are_named_from_where_the_folder_really_is(tmp_path):
    (tmp_path / "deep" / "product").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "product", target_is_directory=True)
    (tmp_path / "raw").write_text("x")
    assert path_from(tmp_path / "link", tmp_path / "link" / "x") == "x"
    name = path_from(tmp_path / "link", tmp_path / "raw")
    for folder in ("link", "deep/product"):
        assert (tmp_path / folder / name).read_text() == "x"
