"""One progress bar a stage, for work that runs outside Lightning's loops and their bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Report = Callable[[str, int, int], None]
"""What is called with a stage, how much of it is done, and how much there is."""


@contextmanager
def progress_bars(title: str, transient: bool = False) -> Iterator[Report]:
    """Shows bars while its body runs.

    Args:
        title: what is made, e.g. "index IVF1024,SQ8".
        transient: whether they go away at its end.

    Yields:
        what moves them.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=transient) as progress:
        bars: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(f"{title}: {stage}", total=total)
            progress.update(bars[stage], completed=done)

        yield report
