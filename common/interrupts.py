"""Putting an interrupt off until nothing would be left half done."""

import signal
import threading
from collections.abc import Iterator
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
