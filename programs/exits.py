"""How a program begins and ends: it heeds interrupts from its first moment, and one sentence on
stderr and an exit status tell of all that can go wrong."""

import functools
import os
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

from neighborlm.common.aborts import explain_aborts
from neighborlm.common.errors import (
    InputError,
    LostRank,
    behind,
    causes,
    disk_is_full,
    memory_is_full,
    place_is_refused,
    sentence_about_disk,
    sentence_about_memory,
)
from neighborlm.common.interrupts import (
    INTERRUPTED,
    SENTENCE,
    came,
    end_at_once,
    end_silently,
    interrupts_do,
    interrupts_raise,
)
from neighborlm.common.log import end_log, log
from neighborlm.retrieval.cluster.ending import ENDING


class Ended(SystemExit):
    """The end of a program about which all is said."""


def run_program(module: str, *args: list[str]) -> None:
    """Runs a program as this process's own: an interrupt ends it while its libraries are still
    being loaded, and it ends with its starter where it is one rank of several.

    Args:
        module: below `neighborlm`, with a `main`.
        args: of `main`.
    """
    interrupts_do(end_at_once)
    threading.excepthook = _tell_of_thread
    ENDING.follow_starter()
    try:
        explain_aborts()
        main = import_module(f"neighborlm.{module}").main
    except (MemoryError, ImportError, OSError, RuntimeError, SystemError) as error:
        # A SystemError is what the interpreter makes of a module that has failed without a word.
        if not isinstance(error, SystemError) and not any(map(memory_is_full, causes(error))):
            raise
        os.write(sys.__stderr__.fileno(), b"error: out of memory for the libraries\n")
        os._exit(2)  # there is none to clean up by, either
    try:
        exit_with_one_sentence(main)(*args)
    except Ended as ended:
        if ended.code != INTERRUPTED:
            raise
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(INTERRUPTED)  # threads of libraries may still be at work on what would be freed


def _tell_of_thread(error: threading.ExceptHookArgs) -> None:
    """A disk that is full comes up where the thread's work is asked for."""
    if not disk_is_full(error.exc_value):
        threading.__excepthook__(error)


def exit_with_one_sentence(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates a program's `main`: an InputError, a full disk, a place that cannot be written and
    a want of memory end it with a sentence and exit status 2, an interrupt (SIGINT or SIGTERM) with
    status 130, the loss of another rank with a sentence about that and status 1; everything else is
    a defect of ours and keeps its traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            interrupts_raise()
            main(*args, **kwargs)
        except Exception as error:
            said, status = explanation(error)
            ENDING.leave("stop")
            if said is None and came:  # as a compiler makes of it
                _end_interrupted()
            if said is None:
                raise
            log(f"error: {said}", make=False)
            print(f"error: {said}", file=sys.stderr)
            raise Ended(status) from error
        except (KeyboardInterrupt, SystemExit) as stop:
            # Lightning turns an interrupt into SystemExit once it has shut down.
            if isinstance(stop, Ended) or not interrupted(stop):
                ENDING.leave("stop")
                raise
            _end_interrupted()
        else:
            ENDING.leave("end")
        finally:
            end_log()

    return run


def _end_interrupted() -> NoReturn:
    interrupts_do(end_silently)
    ENDING.leave("stop")
    log(SENTENCE, make=False)
    print(SENTENCE, file=sys.stderr)
    raise Ended(INTERRUPTED) from None


def interrupted(stop: BaseException) -> bool:
    """Whether an interrupt ends the program."""
    return isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt)


def explanation(error: Exception) -> tuple[str | None, int]:
    """The sentence about an error and the exit status; no sentence where it is a defect."""
    wrong = behind(error, InputError)
    if wrong is not None:
        return str(wrong), 2
    for cause in causes(error):
        if disk_is_full(cause):
            return sentence_about_disk(cause), 2
        if memory_is_full(cause):
            return sentence_about_memory(cause), 2
        if place_is_refused(cause):
            said = f"{cause.filename}: {cause.strerror}; expected a place to read and write at"
            return f"{said}; the same command goes on from what is on disk", 2
    return reason_of_others(error), 1


def reason_of_others(error: Exception) -> str | None:
    """One sentence where an error comes of other ranks: one is lost, or none can be reached."""
    lost = behind(error, LostRank)
    if lost is not None:
        return str(lost)
    reason = ENDING.reason_to_stop()
    distributed = sys.modules.get("torch.distributed")
    if reason is None and isinstance(error, getattr(distributed, "DistError", ())):
        said = " ".join(str(error).split()).split(". ")[0]
        reason = f"the ranks of this run cannot reach one another: {said}"
    return reason
