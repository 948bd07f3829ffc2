"""Language models with a memory: everything of this project is imported under this one name.

In a checkout the rooms (`models/`, `retrieval/`, ...) lie beside this folder; in an installed wheel
they lie in it. Either way `from neighborlm.retrieval.store.datastore import Datastore` finds the
same code.
"""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "common").is_dir():
    __path__.append(str(_here.parent))

from neighborlm.common import before_numpy  # noqa: E402, F401  (before anyone loads numpy)
from neighborlm.common.extras import module_of_extra  # noqa: E402


def with_memory(model: Any, run: Path | str, lmbda: float | None = None) -> Any:
    """Gives a model of transformers the memories of a run; see `programs.with_memory`."""
    module = module_of_extra("neighborlm.programs.with_memory", "hf", "with_memory")
    return module.with_memory(model, run, lmbda)
