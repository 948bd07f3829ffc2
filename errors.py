"""How the programs tell their user what is wrong: one sentence on stderr and exit status 2."""

import functools
import sys
from collections.abc import Callable


class InputError(ValueError):
    """What the user gave cannot be used. The message is one sentence that names the file or flag,
    what was found and what was expected."""


def exit_with_one_sentence(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates a program's `main`: an InputError ends it with its sentence and exit status 2, an
    interrupt with status 130; everything else is a defect of ours and keeps its traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, InputError):
                cause = cause.__cause__  # a library between may have wrapped it
            if cause is None:
                raise
            print(f"error: {cause}", file=sys.stderr)
            sys.exit(2)
        except (KeyboardInterrupt, SystemExit) as stop:
            # Lightning turns an interrupt into SystemExit once it has shut down.
            if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            print("interrupted: the same command continues from here", file=sys.stderr)
            sys.exit(130)

    return run
