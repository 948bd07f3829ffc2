"""The log of a run, `log.txt` in its directory: what each stage has said of its progress, and how a
program ended, with the time. It is kept where it can be; nothing depends on it."""

import shlex
import sys
import time
from pathlib import Path

_place: list[Path] = []
"""Of the run that this process works for."""


def keep_log(path: Path) -> None:
    """Has what is logged from now on appended to a file, which is made with its first line."""
    _place[:] = [path.absolute()]


def end_log() -> None:
    """Has nothing more logged: what comes next is no longer of that run."""
    _place.clear()


def log(line: str, make: bool = True) -> None:
    """Appends a line, if there is a log.

    Args:
        make: whether the run's directory is made for it; a command that was refused leaves none.
    """
    if not _place or not (make or _place[0].parent.is_dir()):
        return
    path = _place[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        begins = not path.exists()
        with open(path, "a", encoding="utf-8") as file:
            if begins or path not in _begun:
                file.write(_stamped(f"command: {shlex.join(sys.argv)}", _began))
            file.write(_stamped(line))
        _begun.add(path)
    except OSError:  # a full disk, or a run that others may only read
        _place.clear()


_begun: set[Path] = set()
"""Logs to which this process has written."""
_began = time.localtime()
"""When the command did, about: this is loaded before the libraries."""


def _stamped(line: str, moment: time.struct_time | None = None) -> str:
    moment = moment or time.localtime()
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', moment)} {line}\n"
