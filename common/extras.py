"""What stands on libraries of an extra, which not everyone has installed."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from neighborlm.common.errors import InputError

EXTRAS = {
    "hf": ("transformers", "tokenizers", "datasets", "safetensors"),
    "lm_eval": ("lm_eval", "transformers"),
}
"""By what is wanted of the extra hf of pyproject.toml, the packages that modules of ours import for
it."""


def module_of_extra(module: str, extra: str, flag: str) -> ModuleType:
    """A module of ours that imports the packages of an extra, imported now: nobody else waits for
    these, or needs them.

    Args:
        module: its full name.
        extra: a name of `EXTRAS`.
        flag: what asks for it, for the message.

    Raises:
        InputError: a package of the extra is not installed.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{flag}: needs {', '.join(missing)}, not installed; expected the extra hf (make setup "
            "HF=1, or pip install 'neighborlm[hf]')"
        )
    return import_module(module)
