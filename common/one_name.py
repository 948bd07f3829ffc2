"""Everything is imported as `neighborlm.<room>`. Under its bare name a room is refused: a checkout
would load each of its modules twice, and any other folder of that name could shadow it. The old
commands `python -m retrieval.<module>` are answered with the new ones."""

import sys

MOVED = {f"retrieval.{tool}": tool for tool in ("datastore", "codec", "neighbors", "recall")}
MOVED |= {"retrieval.sweep": "sweep", "retrieval.plan": "plan"}
MOVED |= {"models.fairseq": "convert"}
"""Modules that were programs of their own, and the tools they have become."""


def refuse_bare_name(package: str) -> None:
    """Each room's `__init__.py` calls this first, with its `__name__`.

    Raises:
        ModuleNotFoundError: the room is imported under another name than `neighborlm.<room>`.
        SystemExit: `python -m` is to run one of its modules under its bare name.
    """
    if package.startswith("neighborlm."):
        return
    if sys.argv[:1] != ["-m"]:  # Python sets it while it looks for the module to run
        raise ModuleNotFoundError(f"{package} is imported as neighborlm.{package}", name=package)
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words else package
    if module in MOVED:
        command = f"neighborlm {MOVED[module]}"
        print(f"error: python -m {module} is now {command} (python -m {command})", file=sys.stderr)
    else:
        print(
            f"error: python -m {module} is no command; expected one of those that neighborlm "
            "--help (python -m neighborlm --help) lists",
            file=sys.stderr,
        )
    sys.exit(2)
