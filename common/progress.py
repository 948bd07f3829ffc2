"""How far a stage is: bars on a terminal; elsewhere a line when a minute has passed and at its end,
so that a log file tells it too. The log of the run gets the lines in any case."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
)
from rich.table import Column

from neighborlm.common.log import log

Report = Callable[[str, int, int], None]
"""Called with the name of a stage, how much of it is done, and how much there is in all."""
Item = TypeVar("Item")
COUNTED = {
    "adding": "keys",
    "measuring": "keys",
    "encoding": "keys",
    "searching": "tokens",
    "octaves": "tokens",
    "quarter octaves": "tokens",
}
"""What some stages count."""
LINE_SECONDS = 60.0
"""Without a line, where a stage takes long."""


@dataclass
class _Stage:
    """One bar.

    Attributes:
        first: how much was done when it began.
        line_at: when it was last told in a line.
    """

    first: int
    began: float
    line_at: float
    bar: TaskID | None = None
    is_over: bool = False


class Bars:
    """The bars of what is being made.

    Args:
        title: what that is, such as "index IVF1024,SQ8".
        transient: whether they disappear at their end; then there is no line at the end, either.
        shown: whether on the screen; the log of the run is kept all the same.
    """

    def __init__(self, title: str, transient: bool = False, shown: bool = True) -> None:
        self.title = title
        self.transient = transient
        self.shown = shown
        self.stages: dict[str, _Stage] = {}
        # What is asked for on standard output may be a table for another program.
        self.file = sys.stderr if transient else sys.stdout
        console = Console(file=self.file, markup=False)
        self.screen: Progress | None = None
        if shown and console.is_terminal:
            # What comes last is cut off on a narrow screen.
            told = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
            bar = BarColumn(bar_width=12)
            self.screen = Progress(bar, told, console=console, transient=transient)
            self.screen.start()

    def __call__(
        self,
        stage: str,
        done: int,
        total: int,
        unit: str = "",
        more: str = "",
        line: bool | None = None,
    ) -> None:
        """Tells how far a stage is.

        Args:
            stage: its name.
            done: how much of it.
            total: how much there is in all; 0 where nobody knows.
            unit: what is counted, where the name does not say it.
            more: to be told besides.
            line: whether to tell it in a line now; by default where the stage ends. One that takes
                long is told in any case.
        """
        now = time.perf_counter()
        seen = self.stages.setdefault(stage, _Stage(done, now, now))
        amount = f"{done:,} of {total:,}" if total else f"{done:,}"
        amount = "" if total == 1 else f"{amount} {unit or COUNTED.get(stage, '')}".rstrip()
        rate = (now - seen.began) / (done - seen.first) if done > seen.first else 0
        left = f"{duration(rate * (total - done))} left" if rate and done < total else ""
        told = ", ".join(filter(None, (amount, left, more)))
        name = ": ".join(filter(None, (self.title, stage)))
        if self.screen is not None:
            if seen.bar is None:
                seen.bar = self.screen.add_task(name, total=total or None)
            self.screen.update(seen.bar, completed=done, description=f"{name}: {told}")
        ends = done >= total > 0 and not seen.is_over
        seen.is_over |= ends
        if line is None:
            line = ends and not self.transient
        if line or now - seen.line_at >= LINE_SECONDS:
            seen.line_at = now
            took = f"in {duration(now - seen.began)}" if ends else ""
            self.say(f"{name}: {', '.join(filter(None, (told, took)))}")

    def say(self, line: str) -> None:
        """Tells something in a line: on the screen where there are no bars, and to the log."""
        log(line)
        if self.shown and self.screen is None:
            print(line, file=self.file, flush=True)

    def drop(self, stage: str) -> None:
        """Takes a bar from the screen; the stage may come again."""
        seen = self.stages.pop(stage, None)
        if self.screen is not None and seen is not None and seen.bar is not None:
            self.screen.remove_task(seen.bar)

    def close(self) -> None:
        """Leaves the screen as it is, or as it was."""
        if self.screen is not None:
            self.screen.stop()


@contextmanager
def progress_bars(title: str, transient: bool = False) -> Iterator[Bars]:
    """Shows progress bars while the body runs.

    Args:
        title: what is being made, such as "index IVF1024,SQ8".
        transient: whether the bars disappear at the end.

    Yields:
        the function that moves them, a `Report`.
    """
    bars = Bars(title, transient)
    try:
        yield bars
    finally:
        bars.close()


def tracked(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """The items, with a bar that disappears."""
    with progress_bars(title, transient=True) as report:
        report("", 0, total)
        for done, item in enumerate(items, 1):
            yield item
            report("", done, total)


class ReadWithBar:
    """A file that is read from its beginning to its end, with a bar that disappears; close it.

    Args:
        file: to read.
        total: its bytes; 0 where nobody knows.
        title: what is done by it.
    """

    def __init__(self, file: BinaryIO, total: int, title: str) -> None:
        self.file, self.total, self.done = file, total, 0
        self.bars = Bars(title, transient=True)

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        found = self.file.read(size)
        self.done += len(found)
        self.bars("", self.done, self.total, "bytes")
        return found

    def close(self) -> None:
        """Takes the bar away; the file stays open."""
        self.bars.close()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(3723.4), duration(59.6)
    ('1:02:03', '0:01:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
