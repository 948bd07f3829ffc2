"""How programs end: heeding interrupts from their first moment, and with one sentence about a disk
or a memory that is full, whatever library says so."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from small import ROOT

from neighborlm.common.errors import InputError, LostRank
from neighborlm.common.files import publishing
from neighborlm.common.log import keep_log, log
from neighborlm.programs.exits import Ended, exit_with_one_sentence
from neighborlm.retrieval.search.index import write_index

PROGRAM = """
import sys
import neighborlm
neighborlm.__path__.append(sys.argv[1])
from neighborlm.programs.exits import run_program
run_program("program")
"""


def run(folder, code: str) -> subprocess.CompletedProcess:
    """A program whose module holds this code, as a process of its own."""
    (folder / "program.py").write_text(f"import os, signal, time\n{code}")
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_while_libraries_are_loaded(tmp_path, name):
    """Also one that loads others so that an exception would be lost."""
    done = run(
        tmp_path,
        f"try:\n    os.kill(os.getpid(), signal.{name})\n    time.sleep(60)\nexcept:\n    pass\n",
    )
    assert done.returncode == 130
    assert done.stderr == "interrupted: the same command continues from here\n"


def test_no_memory_for_the_libraries(tmp_path):
    done = run(tmp_path, "raise MemoryError")
    assert done.returncode == 2
    assert done.stderr == "error: out of memory for the libraries\n"


@pytest.mark.parametrize(
    "body",
    [
        "os.kill(os.getpid(), signal.SIGTERM)",
        # A library that makes another error of it, and a user who does not wait.
        "try:\n        os.kill(os.getpid(), signal.SIGINT)\n    except KeyboardInterrupt:\n"
        "        raise RuntimeError from None",
        "import atexit\n    atexit.register(time.sleep, 60)\n"
        "    os.kill(os.getpid(), signal.SIGINT)",
    ],
    ids=["plain", "converted", "waiting"],
)
def test_an_interrupt_of_a_program(tmp_path, body):
    done = run(tmp_path, f"def main():\n    {body}\n    time.sleep(60)\n")
    assert done.returncode == 130
    assert done.stderr == "interrupted: the same command continues from here\n"


def behind(cause: Exception) -> Exception:
    """An error that a library has wrapped."""
    error = RuntimeError("something went wrong")
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device", "runs/x/log.txt")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("--knn.k is 0; expected more"), 2, ["--knn.k is 0; expected more"]),
        (LostRank("rank 1 on here has ended"), 1, ["rank 1 on here has ended"]),
        (FULL, 2, ["runs/x/log.txt: No space left", "B free", "goes on from"]),
        (behind(FULL), 2, ["runs/x/log.txt: No space left", "goes on from"]),
        (OSError("4096 requested and 12 written"), 2, ["No space left", "B free"]),
        (RuntimeError("write error in f: 0 != 1 (No space left on device)"), 2, ["No space left"]),
        (
            behind(OSError(errno.EROFS, "Read-only file system", "stores/train")),
            2,
            ["stores/train: Read-only file system; expected a place"],
        ),
        (MemoryError(), 2, ["out of memory;", "--data.max_tokens", "goes on from"]),
        (behind(MemoryError("std::bad_alloc")), 2, ["out of memory (std::bad_alloc);"]),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, ["out of memory"]),
        (RuntimeError("can't start new thread"), 2, ["out of memory (can't start new thread)"]),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            2,
            ["out of memory (DataLoader worker (pid 7) is killed", "--data.num_workers"],
        ),
    ],
)
def test_what_can_go_wrong_is_said_in_one_sentence(capsys, error, status, words):
    @exit_with_one_sentence
    def main() -> None:
        raise error

    with pytest.raises(Ended) as end:
        main()
    assert end.value.code == status
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "ask", [lambda: np.empty(1 << 60, np.uint8), lambda: torch.empty(1 << 60, dtype=torch.uint8)]
)
def test_libraries_that_get_no_memory(capsys, ask):
    with pytest.raises(Ended):
        exit_with_one_sentence(ask)()
    assert "out of memory (" in capsys.readouterr().err


def save_array(file: str) -> None:
    with open(file, "wb") as opened:
        np.save(opened, np.zeros(100_000))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize(
    "write",
    [
        save_array,
        lambda file: write_index(faiss.IndexFlatL2(8), Path(file)),  # less than a buffer
        lambda file: Path(file).write_text("a" * 100_000),
    ],
    ids=["numpy", "faiss", "python"],
)
def test_libraries_that_find_a_disk_full(tmp_path, capsys, write):
    """They do not know the place, or call it by a temporary name."""
    path = tmp_path / "product"

    @exit_with_one_sentence
    def main() -> None:
        with publishing(path) as making:
            making.symlink_to("/dev/full")
            write(str(making))

    with pytest.raises(Ended):
        main()
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}"), said
    assert "No space left on device (" in said
    assert "making" not in said


def test_a_library_that_aborts_where_memory_is_limited(tmp_path):
    """As C++ does of what nobody catches; the thread may hold what Python needs."""
    code = "import ctypes\nctypes.PyDLL('libstdc++.so.6')._ZSt9terminatev()\n"
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 45, 1 << 45))\n"
    (tmp_path / "program.py").write_text(f"def main():\n    {code.replace(chr(10), ';')}\n")
    done = subprocess.run(
        [sys.executable, "-c", limit + PROGRAM, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: a library has ended the program, most likely for want")
    assert "ulimit -v allows 35.2 TB" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_defect_keeps_its_traceback():
    @exit_with_one_sentence
    def main() -> None:
        raise OSError(errno.ENOENT, "No such file")

    with pytest.raises(OSError, match="No such file"):
        main()


def test_a_log_is_of_one_program_wherever_it_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    @exit_with_one_sentence
    def main() -> None:
        keep_log(Path("run/log.txt"))
        monkeypatch.chdir(tmp_path / "elsewhere")
        log("of the program")

    main()
    log("of nobody")
    kept = (tmp_path / "run/log.txt").read_text()
    assert "of the program" in kept
    assert "of nobody" not in kept
    assert not list((tmp_path / "elsewhere").iterdir())
