"""`neighborlm TOOL ...`: one table of all commands, train.py and evaluate.py among them."""

import sys
from difflib import get_close_matches
from typing import NamedTuple

import neighborlm
from neighborlm.common.one_name import refuse_bare_name
from neighborlm.programs.exits import run_program

refuse_bare_name(__name__)


class Tool(NamedTuple):
    """A command.

    Attributes:
        module: below `neighborlm`, whose `main` takes the command line as a list of strings.
        purpose: what it does, in a line.
    """

    module: str
    purpose: str


TOOLS = {
    "prepare": Tool("tools.prepare", "make a corpus folder from raw text files, split by document"),
    "datastore": Tool("tools.datastore", "list, show, verify, split, merge, assemble datastores"),
    "recall": Tool("tools.recall", "how often the target is among the nearest keys, by any index"),
    "page": Tool("tools.page", "a page of a text with what was retrieved for it, from a cache"),
    "report": Tool("tools.report", "which tokens gain by their neighbours, which lose, by a cache"),
    "runs": Tool("tools.runs", "a table of all trainings and evaluations below a folder"),
    "sweep": Tool("tools.sweep", "kNN-LM's perplexity over k, temperature and lmbda, from a cache"),
    "plan": Tool("tools.plan", "bytes that a datastore will take, and what would make it fit"),
    "codec": Tool("tools.codec", "compare or take over quantised features of a GNN-LM"),
    "neighbors": Tool("tools.neighbors", "take over neighbour tables of the original GNN-LM"),
    "convert": Tool("tools.convert", "convert checkpoints of fairseq to ours and back"),
    "completion": Tool("tools.completion", "what completes tools and flags in bash and zsh"),
    "train": Tool("programs.train", "train a model from a config, as train.py does"),
    "evaluate": Tool("programs.evaluate", "perplexity, plain or with memories, as evaluate.py"),
    "generate": Tool("programs.generate", "text, plain or with memories, as generate.py"),
    "lm_eval": Tool(
        "programs.lm_eval", "lm-evaluation-harness on a pretrained model with memories"
    ),
}


def main(args: list[str] | None = None) -> None:
    """Runs a tool.

    Args:
        args: its name and its own arguments; by default those of the command line.

    Raises:
        SystemExit: with status 2 where there is no such tool; with the tool's own status, which is
            2 for input that cannot be used and 130 for an interrupt.
    """
    name, *rest = (sys.argv[1:] if args is None else args) or [""]
    if name in TOOLS:
        # Loaded by name: torch and faiss take seconds, which help and a slip need not wait for.
        run_program(TOOLS[name].module, rest)
    elif name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"neighborlm {neighborlm.__version__}")
    elif not name:
        print(usage(), file=sys.stderr)
        sys.exit(2)
    else:
        near = get_close_matches(name, TOOLS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(TOOLS)}"
        print(f"error: neighborlm has no tool {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def usage() -> str:
    """The help of `neighborlm` itself."""
    width = max(map(len, TOOLS)) + 2
    lines = (f"  {name:<{width}}{tool.purpose}" for name, tool in TOOLS.items())
    return "\n".join(
        [
            "usage: neighborlm TOOL ...",
            "",
            "Language models with a memory: the commands beside train.py and evaluate.py.",
            "",
            *lines,
            "",
            "neighborlm TOOL --help explains a tool, neighborlm --version says which this is.",
        ]
    )
