"""How a program ends: one sentence on stderr and an exit status for all that can go wrong."""

import functools
import signal
import sys
from collections.abc import Callable

import torch.distributed as dist

from neighborlm.common.errors import InputError, LostRank, behind
from neighborlm.common.interrupts import in_main_thread
from neighborlm.retrieval.cluster import rank_watch


def exit_with_one_sentence(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates a program's `main`: an InputError ends it with its sentence and exit status 2, an
    interrupt (SIGINT or SIGTERM) with status 130, the loss of another rank with a sentence about
    that and status 1; everything else is a defect of ours and keeps its traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        if in_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
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


def reason_of_others(error: Exception) -> str | None:
    """One sentence where an error comes of other ranks: one is lost, or none can be reached."""
    lost = behind(error, LostRank)
    if lost is not None:
        return str(lost)
    reason = rank_watch.reason_to_stop()
    if reason is None and isinstance(error, getattr(dist, "DistError", ())):
        said = " ".join(str(error).split()).split(". ")[0]
        reason = f"the ranks of this run cannot reach one another: {said}"
    return reason
