"""Progress bars, one per stage, for work outside Lightning's loops."""

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
"""Called with the name of a stage, how much of it is done, and how much there is in all."""


@contextmanager
def progress_bars(title: str, transient: bool = False) -> Iterator[Report]:
    """Shows progress bars while the body runs.

    Args:
        title: what is being made, such as "index IVF1024,SQ8".
        transient: whether the bars disappear at the end.

    Yields:
        the function that moves them.
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
