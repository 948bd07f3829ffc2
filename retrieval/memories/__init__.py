"""What memories say of the next token, and how they are mixed with the language model.

A new memory or mixer is a file here, or anywhere, and one line in `MEMORIES` or `MIXERS`.
"""

from collections.abc import Callable

from neighborlm.common.contracts import Memory, Mixer, Resources
from neighborlm.retrieval.memories.knn_memory import KNNMemory
from neighborlm.retrieval.memories.mixers import ConstantMixer

__all__ = ["MEMORIES", "MIXERS", "ConstantMixer", "KNNMemory"]

MEMORIES: dict[str, Callable[[Resources], Memory]] = {"knn": KNNMemory.of}
"""By the names of `--memories`: what makes each."""
MIXERS: dict[str, Callable[[], Mixer]] = {"constant": ConstantMixer}
"""By the names of `--mixer`."""
