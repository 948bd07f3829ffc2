"""The errors that the programs report in one sentence."""


class InputError(ValueError):
    """An input cannot be used. The message is one sentence that names the file or flag, what was
    found and what was expected."""


class Diverged(InputError):
    """A training whose loss, gradient or weights are not finite any more."""


class LostRank(RuntimeError):
    """Another rank has ended or no longer answers. The message is one sentence that names the rank
    and its host."""


def behind(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The first error of a kind in the chain of causes, the error itself included; None if there is
    none. A library in between may have wrapped it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kind):
        cause = cause.__cause__
    return cause
