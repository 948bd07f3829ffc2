"""What the programs refuse, in one sentence."""


class InputError(ValueError):
    """What the user gave cannot be used. The message is one sentence that names the file or flag,
    what was found and what was expected."""


class Diverged(InputError):
    """A training whose loss, gradient or weights are not finite any more."""


class LostRank(RuntimeError):
    """A process that this one works with has ended or does not answer any more. The message is one
    sentence that names its rank and host."""


def behind(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The error itself or what it was raised from, as a library in between may have wrapped it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kind):
        cause = cause.__cause__
    return cause
