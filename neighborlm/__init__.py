"""Language models with a memory: everything of this project is imported under this one name.

In a checkout the rooms (`models/`, `retrieval/`, ...) lie beside this folder; in an installed wheel
they lie in it. Either way `from neighborlm.retrieval.store import Datastore` finds the same code.
"""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

from neighborlm.common import before_numpy  # noqa: E402, F401  (before anyone loads numpy)
