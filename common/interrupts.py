"""Delays interrupts (SIGINT, SIGTERM) while something must not be left half done."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def interrupts_held() -> Iterator[list[int]]:
    """Records SIGINT and SIGTERM instead of acting on them, while the body runs.

    Yields:
        the numbers of the signals that have come; the body raises KeyboardInterrupt where that is
        safe.
    """
    held: list[int] = []
    before = {}
    if in_main_thread():  # no other thread receives signals
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield held
    finally:
        for number, handler in reversed(before.items()):  # SIGINT last, as it may raise here
            signal.signal(number, handler)


def in_main_thread() -> bool:
    """Whether the calling thread is the main one."""
    return threading.current_thread() is threading.main_thread()


def thread_pool(threads: int, initializer: Callable | None = None) -> ThreadPoolExecutor:
    """A pool of threads, the first of which is already running.

    An interrupt while a pool starts its first thread would leave a thread that nothing ends, and
    the process would wait for it for ever; so interrupts are held until it runs. (That thread
    passes the order to end on to later ones.)
    """
    workers = ThreadPoolExecutor(threads, initializer=initializer)
    with interrupts_held() as held:
        workers.submit(int).result()
    if held:
        signal.raise_signal(held[0])  # now it does no harm
    return workers
