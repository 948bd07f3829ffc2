"""One worker thread beside Lightning's loop: searching and writing overlap the next step."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs tasks one after another in a thread of its own.

    Args:
        ahead: how many tasks may wait; `submit` blocks beyond that, so memory stays bounded.
    """

    def __init__(self, ahead: int = 2) -> None:
        self.ahead = ahead
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.tasks: deque[Future] = deque()

    def submit(self, task: Callable, *args) -> None:
        """Queues `task(*args)`; raises what an earlier task raised."""
        while len(self.tasks) >= self.ahead:
            self.tasks.popleft().result()
        self.tasks.append(self.pool.submit(task, *args))

    def drain(self) -> None:
        """Waits for all tasks; raises what one of them raised."""
        while self.tasks:
            self.tasks.popleft().result()
