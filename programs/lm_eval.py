"""`neighborlm lm_eval ...`: the command of lm-evaluation-harness with the model `neighborlm`, a
model of transformers with the memories of a run; and what makes that model known to the command
`lm_eval` itself.
"""

import sys
from importlib.util import find_spec
from types import TracebackType

from neighborlm.common.errors import InputError
from neighborlm.common.extras import module_of_extra
from neighborlm.programs.exits import exit_with_one_sentence

MODEL = "neighborlm.programs.lm_eval_model:NeighborLM"

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


def register() -> None:
    """Makes the model known to the program lm_eval, at whose start this is called (setup.py), and
    lets bad input end it with one sentence. The model is imported once it is asked for."""
    if find_spec("lm_eval") is None:
        return
    import lm_eval.models  # noqa: F401  (first: a registry with a name in it is not filled later)
    from lm_eval.api.registry import model_registry

    if "neighborlm" not in model_registry:
        model_registry.register("neighborlm", target=MODEL)
    sys.excepthook = say_in_one_sentence


def say_in_one_sentence(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Reports what ends the program; see `sys.excepthook`."""
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
