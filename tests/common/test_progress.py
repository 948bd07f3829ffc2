"""Lines about long stages where there is no terminal, and the log of a run."""

import io
import re

import pytest

from neighborlm.common import log, progress
from neighborlm.common.progress import Bars, ReadWithBar, progress_bars, tracked


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, to be set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """What the log of a run says, without times."""
    monkeypatch.setattr(log, "_place", [])
    log.keep_log(tmp_path / "run/log.txt")

    def lines() -> list[str]:
        found = (tmp_path / "run/log.txt").read_text().splitlines()
        stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
        assert all(re.match(stamp, line) for line in found)
        assert re.sub(stamp, "", found[0]).startswith("command: ")
        return [re.sub(stamp, "", line) for line in found[1:]]

    return lines


def test_a_line_a_minute_and_at_the_end(capsys, clock, logged):
    with progress_bars("index IVF8") as report:
        for minute, done in enumerate(range(0, 400, 100)):
            for second in (1, 31):
                clock[0] = 60 * minute + second
                report("adding", done, 300)
                report("adding", done, 300)
    lines = [
        "index IVF8: adding: 100 of 300 keys, 0:02:00 left",
        "index IVF8: adding: 200 of 300 keys, 0:01:00 left",
        "index IVF8: adding: 300 of 300 keys, in 0:03:00",
    ]
    assert capsys.readouterr().out.splitlines() == lines
    assert logged() == lines


def test_what_disappears_leaves_standard_output_alone(capsys, clock, logged):
    assert list(tracked(range(3), "counting words", 3)) == [0, 1, 2]
    file = ReadWithBar(io.BytesIO(b"abcdef"), 6, "unpacking")
    assert file.read(4) == b"abcd"
    clock[0] = 61
    assert file.read() == b"ef"
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "unpacking: 6 of 6 bytes, in 0:01:01\n"


def test_what_is_not_shown_is_logged(capsys, logged):
    bars = Bars("", shown=False)
    bars("training", 20, 100, "updates", "loss 4.000", line=True)
    assert capsys.readouterr() == ("", "")
    assert logged() == ["training: 20 of 100 updates, loss 4.000"]


def test_a_log_that_cannot_be_kept_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "_place", [])
    (tmp_path / "file").touch()
    log.keep_log(tmp_path / "file/log.txt")
    log.log("a line")
    log.log("another one")
