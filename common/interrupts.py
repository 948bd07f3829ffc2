"""Interrupts (SIGINT, SIGTERM): held back while something must not be left half done, and the end
of a program that has nothing to lose."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
"""Exit status of a program that was interrupted, as shells have it."""
came: list[int] = []
"""Signals that have raised KeyboardInterrupt: a library may turn that into another error."""
SENTENCE = "interrupted: the same command continues from here"


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
        for number in NUMBERS:
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


def interrupts_do(action: Callable[[int, FrameType | None], object]) -> None:
    """Sets what SIGINT and SIGTERM do from now on, unless they are ignored, as they are under
    nohup."""
    if in_main_thread():
        for number in NUMBERS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, action)


def interrupts_raise() -> None:
    """Has SIGINT and SIGTERM raise KeyboardInterrupt from now on, unless somebody else heeds
    them."""
    came.clear()
    if in_main_thread():
        for number in NUMBERS:
            heeded = (signal.SIG_DFL, signal.default_int_handler, end_at_once)
            if signal.getsignal(number) in heeded:
                signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    came.append(number)
    raise KeyboardInterrupt


def end_at_once(*_: object) -> None:
    """Ends the process with one sentence and nothing else: where libraries are being loaded, an
    exception could come out of them as another one."""
    os.write(sys.__stderr__.fileno(), f"{SENTENCE}\n".encode())
    os._exit(INTERRUPTED)


def end_silently(*_: object) -> None:
    """Ends the process: what there is to say is said."""
    os._exit(INTERRUPTED)


def wait_for_all(futures: list[Future], give_up: Callable[[], object]) -> None:
    """Waits until all have ended, also where an interrupt comes: what they work on would be freed
    under them.

    Args:
        give_up: called when one comes, so that they end soon.
    """
    try:
        wait(futures)
    except BaseException:
        give_up()
        with interrupts_held():  # a second one would be too soon
            wait(futures)
        raise


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
