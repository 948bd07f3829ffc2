"""How the programs tell their user what is wrong: one sentence on stderr and exit status 2; and how
they put an interrupt off."""

import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rank_watch


class InputError(ValueError):
    """What the user gave cannot be used. The message is one sentence that names the file or flag,
    what was found and what was expected."""


class LostRank(RuntimeError):
    """A process that this one works with has ended or says nothing any more. The message is one
    sentence that names its rank and host."""


def exit_with_one_sentence(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates a program's `main`: an InputError ends it with its sentence and exit status 2, an
    interrupt (SIGINT or SIGTERM) with status 130, the loss of another rank with a sentence about
    that and status 1; everything else is a defect of ours and keeps its traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        if _in_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            main(*args, **kwargs)
        except Exception as error:
            wrong = behind(error, InputError)
            lost = None if wrong else reason_of_others(error)
            rank_watch.leave("stop")
            if wrong is None and lost is None:
                raise
            print(f"error: {wrong or lost}", file=sys.stderr)
            sys.exit(2 if wrong else 1)
        except (KeyboardInterrupt, SystemExit) as stop:
            rank_watch.leave("stop")
            # Lightning turns an interrupt into SystemExit once it has shut down.
            if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            print("interrupted: the same command continues from here", file=sys.stderr)
            sys.exit(130)
        rank_watch.leave("end")

    return run


def behind(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The error itself or what it was raised from, as a library between may have wrapped it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kind):
        cause = cause.__cause__
    return cause


def reason_of_others(error: Exception) -> str | None:
    """One sentence where an error comes of other ranks: one is lost, or none can be reached."""
    import torch.distributed as dist  # here, as most commands that use this file need no torch

    lost = behind(error, LostRank)
    if lost is not None:
        return str(lost)
    reason = rank_watch.reason_to_stop()
    if reason is None and isinstance(error, getattr(dist, "DistError", ())):
        said = " ".join(str(error).split()).split(". ")[0]
        reason = f"the ranks of this run cannot reach one another: {said}"
    return reason


@contextmanager
def interrupts_held() -> Iterator[list[int]]:
    """Keeps interrupts from ending what would be left half done; those that came are in the list it
    gives, for the one who holds them to raise KeyboardInterrupt where that does no harm."""
    held: list[int] = []
    before = {}
    if _in_main_thread():  # signals reach no other
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield held
    finally:
        for number, handler in reversed(before.items()):  # SIGINT last, as it may raise here
            signal.signal(number, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
