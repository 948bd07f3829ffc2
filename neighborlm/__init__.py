"""Language models with a memory: everything of this project is imported under this one name.

In a checkout the rooms (`models/`, `retrieval/`, ...) lie beside this folder; in an installed wheel
they lie in it. Either way `from neighborlm.retrieval.store.datastore import Datastore` finds the
same code.
"""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "common").is_dir():
    __path__.append(str(_here.parent))

from neighborlm.common import before_numpy  # noqa: E402, F401  (before anyone loads numpy)
