"""Everything is imported as `neighborlm.<room>`: refuses a room under its bare name, under which a
checkout would give a second copy of each of its modules and a folder of the same name elsewhere
could take its place. Commands of the form `python -m retrieval.<module>` are told the new one."""

import sys

MOVED = {f"retrieval.{tool}": tool for tool in ("datastore", "codec", "neighbors", "recall")}
MOVED |= {"retrieval.sweep": "sweep", "retrieval.plan": "plan"}
MOVED |= {"models.fairseq": "convert"}
"""Modules that were programs of their own, and the tools they have become."""


def refuse_bare_name(package: str) -> None:
    """Called by each room first of all, with its `__name__`.

    Raises:
        ImportError: it is imported by another name than `neighborlm.<room>`.
        SystemExit: so is a module of it that is to be run by `python -m`.
    """
    if package.startswith("neighborlm."):
        return
    if sys.argv[:1] != ["-m"]:  # as long as Python looks for the module that it is to run
        raise ImportError(f"{package} is imported as neighborlm.{package}", name=package)
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
