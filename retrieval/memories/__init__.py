"""Memories, each of which gives the next token a probability, and mixers, which weigh them with the
language model.

This room's door is `MEMORIES` and `MIXERS`: by the names of `--memories` and `--mixer`, what makes
each. A new one is a file, here or anywhere, and one line there; `contracts.Memory` and
`contracts.Mixer` say which methods it has.
"""

from collections.abc import Callable

from neighborlm.common.contracts import Memory, Mixer, Resources
from neighborlm.retrieval.memories.adaptive import AdaptiveMemory
from neighborlm.retrieval.memories.automaton import AutomatonMemory
from neighborlm.retrieval.memories.buckets import BucketMixer
from neighborlm.retrieval.memories.closed_forms import DrozdovMixer, NestMixer
from neighborlm.retrieval.memories.gate import GateMixer
from neighborlm.retrieval.memories.knn_memory import KNNMemory
from neighborlm.retrieval.memories.mixers import ConstantMixer
from neighborlm.retrieval.memories.neighbors_by_k import MetaKMixer
from neighborlm.retrieval.memories.ngram import NGramMemory
from neighborlm.retrieval.memories.recent import RecentMemory

__all__ = ["MEMORIES", "MIXERS"]

MEMORIES: dict[str, Callable[[Resources], Memory]] = {
    "knn": KNNMemory.of,
    "ngram": NGramMemory.of,
    "recent": RecentMemory.of,
    "automaton": AutomatonMemory.of,
    "adaptive": AdaptiveMemory.of,
}
"""By the names of `--memories`: makes the memory from what it is made of."""
MIXERS: dict[str, Callable[[], Mixer]] = {
    "constant": ConstantMixer,
    "buckets": BucketMixer,
    "gate": GateMixer,
    "drozdov": DrozdovMixer,
    "nest": NestMixer,
    "meta_k": MetaKMixer,
}
"""By the names of `--mixer`: makes the mixer, not fitted yet."""
