"""Putting an interrupt off until nothing would be left half done."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def interrupts_held() -> Iterator[list[int]]:
    """Keeps interrupts from ending what would be left half done; those that came are in the list it
    gives, for the one who holds them to raise KeyboardInterrupt where that does no harm."""
    held: list[int] = []
    before = {}
    if in_main_thread():  # signals reach no other
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield held
    finally:
        for number, handler in reversed(before.items()):  # SIGINT last, as it may raise here
            signal.signal(number, handler)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def thread_pool(threads: int, initializer: Callable | None = None) -> ThreadPoolExecutor:
    """Threads, the first of which runs: where an interrupt comes while that one starts, nobody
    would ever end it, and the process would wait for it for good. (It tells later ones to end.)"""
    workers = ThreadPoolExecutor(threads, initializer=initializer)
    with interrupts_held() as held:
        workers.submit(int).result()
    if held:
        signal.raise_signal(held[0])  # for whoever holds interrupts, if anybody does
    return workers
