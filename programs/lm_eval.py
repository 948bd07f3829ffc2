"""`neighborlm lm_eval ...`: the command of lm-evaluation-harness, which then knows the model
`neighborlm`, a model of transformers with the memories of a run.
"""

import sys

from neighborlm.common.extras import module_of_extra
from neighborlm.programs.exits import exit_with_one_sentence

HELP = """\
usage: neighborlm lm_eval --model_args pretrained=DIR,memory=runs/NAME --tasks TASK,TASK [...]

The command of lm-evaluation-harness, with its own flags (lm_eval run --help), and one more model,
neighborlm: its hf with the memories of runs/NAME, which evaluate.py has evaluated with --knnlm.
lmbda=WEIGHT among the arguments of the model takes the place of the weight found there.
"""


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Runs lm_eval, whose flags these are; `--model` is neighborlm unless it is given."""
    given = sys.argv[1:] if args is None else args
    if given[:1] in (["--help"], ["-h"]):
        print(HELP)
        sys.exit(0)
    harness = module_of_extra("neighborlm.programs.lm_eval_model", "lm_eval", "neighborlm lm_eval")
    if given and given[0] in ("run", "ls", "validate"):
        command, *given = given
    else:
        command = "run"
    if command == "run" and not any(flag.split("=")[0] in ("--model", "-M") for flag in given):
        given = ["--model", "neighborlm", *given]
    before, sys.argv = sys.argv, ["lm_eval", command, *given]
    try:
        harness.cli_evaluate()
    finally:
        sys.argv = before
