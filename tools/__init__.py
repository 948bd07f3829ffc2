"""The commands beside the programs: `neighborlm TOOL ...`, one table from names to functions."""

import sys
from importlib import import_module

TOOLS = {
    "prepare": ("tools.prepare", "a corpus folder from raw text files, split by document"),
    "datastore": ("tools.datastore", "list, show, verify, split, merge and assemble datastores"),
    "recall": ("tools.recall", "how often an index finds what the exact search finds"),
    "sweep": ("tools.sweep", "perplexity over k, temperature and lmbda, from a cache"),
    "codec": ("tools.codec", "what quantised features lose"),
    "neighbors": ("tools.neighbors", "take over the original program's neighbour tables"),
    "plan": ("tools.plan", "bytes that a memory takes, before anything is run"),
    "convert": ("tools.convert", "checkpoints of fairseq to ours and back"),
    "train": ("programs.training", "train.py"),
    "evaluate": ("programs.evaluation", "evaluate.py"),
}
"""Where the `main` of each command is, and what it does."""


def main() -> None:
    """Runs the tool that the command line names."""
    name, *_ = sys.argv[1:] or [""]
    if name not in TOOLS:
        lines = (f"  {tool:<10} {says}" for tool, (_, says) in TOOLS.items())
        known = "\n".join(["usage: neighborlm TOOL ...", "", *lines])
        if name in ("", "-h", "--help"):
            print(known)
            return
        sys.exit(f"error: {name} is no tool of neighborlm; expected one of {', '.join(TOOLS)}")
    sys.argv = [f"neighborlm {name}", *sys.argv[2:]]
    import_module(f"neighborlm.{TOOLS[name][0]}").main()
