"""Products on disk: manifests written whole or not at all and refused in one sentence, rows filled
up to a mark, work shared by several processes."""

import os
import threading

import faiss
import numpy as np
import pytest

import neighborlm
from neighborlm.common.errors import InputError
from neighborlm.retrieval.store.arrays import Layout
from neighborlm.retrieval.store.artifact import Artifact, Format, Job, refuse_mismatch, share_out

INDEX = Format("index", 2, ("dim",), ("faiss",))


@pytest.fixture
def product(tmp_path) -> Artifact:
    """An index that is not there yet."""
    return Artifact.file(INDEX, tmp_path / "keys.faiss")


def test_what_is_written_is_read(product, tmp_path):
    assert not product.exists()
    assert not product.is_complete()
    made_from = {"model": "m", "window": (1, 2)}
    product.write({"dim": 8, "made_from": made_from}, complete=False)
    assert [p.name for p in tmp_path.iterdir()] == ["keys.faiss.json"]
    manifest = product.read()
    assert manifest["made_from"] == {"model": "m", "window": [1, 2]}
    assert manifest["command"]
    libraries = {"neighborlm": neighborlm.__version__, "faiss": faiss.__version__}
    assert manifest["libraries"] == libraries
    assert product.says({"made_from": made_from})
    assert not product.says({"made_from": made_from, "seed": None})
    assert not product.is_complete({"dim": 8})
    with pytest.raises(InputError, match=r"keys.faiss: is unfinished; repeat the command"):
        product.open()
    product.write({"dim": 8}, complete=True)
    assert product.is_complete({"dim": 8})
    assert product.open({"dim": 8})["dim"] == 8
    for use in (product.open, product.is_complete):
        with pytest.raises(InputError, match=r"keys.faiss: its dim is 8, but 9 is expected"):
            use({"dim": 9})


def test_an_older_version_is_read(product):
    product.write({"dim": 8, "version": 1}, complete=True)
    assert product.open()["version"] == 1


def test_manifests_of_old_say_less(product):
    product.manifest.write_text('{"kind": "index", "version": 1, "dim": 8}')
    assert product.is_complete()
    assert product.open()["dim"] == 8


def test_a_failed_write_leaves_the_old_one(product, monkeypatch, tmp_path):
    product.write({"dim": 8}, complete=True)
    with pytest.raises(TypeError):
        product.write({"dim": 9, "broken": object()}, complete=True)

    def no_replace(*_):
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_replace)
        with pytest.raises(OSError):  # noqa: PT011
            product.write({"dim": 9}, complete=True)
    assert product.open()["dim"] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["keys.faiss.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"kind": "index"', "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[1, 2]", r"describes \[1, 2\]"),
        (b"{}", "describes None"),
        (b'{"kind": "datastore", "version": 1}', "describes 'datastore'"),
        (b'{"kind": "index"}', "has format version None"),
        (b'{"kind": "index", "version": 3}', "has format version 3; this program reads up to 2"),
        (b'{"kind": "index", "version": 2}', "lacks dim"),
    ],
)
def test_what_is_no_such_manifest(product, content, message):
    product.manifest.write_bytes(content)
    for use in (product.read, product.open, product.is_complete):
        with pytest.raises(InputError, match=message) as caught:
            use()
        assert str(caught.value).startswith(f"{product.manifest}: ")
        assert "\n" not in str(caught.value)


def test_missing(product):
    with pytest.raises(InputError, match=r"faiss.json: no such file; expected the manifest of a i"):
        product.open()


def test_refusals_name_both_sides(tmp_path):
    found = {"key_type": "gnn", "dim": 8, "more": 1}
    refuse_mismatch(tmp_path, found, {"dim": 8})
    refuse_mismatch(tmp_path, found, {})
    with pytest.raises(InputError, match="its key type is gnn, but last_hidden is expected"):
        refuse_mismatch(tmp_path, found, {"dim": 8, "key_type": "last_hidden"})
    with pytest.raises(InputError, match="its metric is None, but l2 is expected"):
        refuse_mismatch(tmp_path, found, {"metric": "l2"})


# -- filling -------------------------------------------------------------------------------------


def squares(first: int, last: int) -> tuple[np.ndarray]:
    return (np.arange(first, last) ** 2,)


@pytest.mark.parametrize("stop_at", [0, 3, 6, 9])
def test_filling_goes_on_where_it_stopped(product, stop_at):
    """Rows that were done are not computed again, and blocks begin where they would have."""
    layouts, fields = {"squares.npy": Layout(np.dtype(np.int64), (10,))}, {"dim": 1, "rows": 10}
    begun = []

    def interrupted(first, last):
        if first == stop_at:
            raise KeyboardInterrupt
        return squares(first, last)

    with pytest.raises(KeyboardInterrupt):
        product.fill(fields, layouts, 3, interrupted)
    assert product.read()["done"] == stop_at
    assert not product.is_complete()
    product.fill(fields, layouts, 3, squares, lambda done, rows: begun.append(done))
    assert begun == [done for done in (0, 3, 6, 9, 10) if done >= stop_at]
    filled = np.load(product.manifest.parent / "squares.npy")
    assert filled.tolist() == [n * n for n in range(10)]
    assert product.open()["done"] == 10
    product.fill(fields, layouts, 3, interrupted)  # complete: nothing is computed


# -- sharing -------------------------------------------------------------------------------------


def test_several_share_work_and_wait_for_what_others_do(tmp_path):
    done, by, gate = set(), {}, threading.Event()

    def jobs() -> list[Job]:
        def job(number: int) -> Job:
            def work() -> None:
                assert number not in by
                by[number] = threading.current_thread().name
                if number == 0:
                    assert gate.wait(timeout=20)
                done.add(number)
                if len(done) == 2:
                    gate.set()

            artifact = Artifact.file(INDEX, tmp_path / str(number))
            return Job(artifact.lock(), lambda: number in done, work)

        return [job(number) for number in range(3)]

    def share() -> None:
        share_out(jobs())
        assert done == {0, 1, 2}

    ranks = [threading.Thread(target=share, name=str(rank)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=20)
        assert not rank.is_alive()
    assert by[1] == by[2] != by[0]


def test_what_is_there_needs_no_lock(tmp_path):
    """As where nobody can write."""
    lock = Artifact.file(INDEX, tmp_path / "nowhere" / "x").lock()
    share_out([Job(lock, lambda: True, lambda: pytest.fail("made again"))])
    assert not (tmp_path / "nowhere").exists()
