"""`MetaKMixer`: meta-k (kNN-MT; Zheng et al., ACL 2021) gives the kNN distributions of the nearest
1, 2, 4, ..., k neighbours a weight each, by the distances of the nearest neighbours and the number
of distinct values among the first i of them.

The language model is meta-k's r = 0. In meta-k the network may also choose the temperature; here
the memory has a fixed one, since a mixer only weighs the distributions of its sources.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from neighborlm.common.contracts import Memory, Metric, Opinion
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.cache import Retrieved
from neighborlm.retrieval.memories.gate import GateMixer
from neighborlm.retrieval.memories.tuning import log_probs_of

NEAREST = 32
"""Neighbours that are told apart, as in the paper's largest setting; all k are one more
distribution."""


class MetaKMixer(GateMixer):
    """The network of meta-k: it reads the nearest neighbours of the memory `knn`, and weighs the
    distributions of the nearest 1, 2, 4, ... of them beside the model and any other memories."""

    def __init__(self) -> None:
        super().__init__(("knn.distances", "knn.distinct"))

    def ask(self, memories: Mapping[str, Memory]) -> None:
        """Has the memory `knn` speak for each number of neighbours; see `Mixer.ask`.

        Raises:
            InputError: there is no such memory.
        """
        if "knn" not in memories:
            raise InputError(
                f"--mixer meta_k: weighs the neighbours of knn, but --memories are "
                f"{','.join(memories)}; expected knn among them"
            )
        memories["knn"].by_k = True


def ks_of(k: int) -> list[int]:
    """The numbers of neighbours, ascending: powers of two up to `NEAREST`, and k.

    >>> ks_of(12), ks_of(1024)
    ([1, 2, 4, 8, 12], [1, 2, 4, 8, 16, 32, 1024])
    """
    return sorted({2**i for i in range(min(k, NEAREST).bit_length())} | {k})


def opinion_by_k(block: Retrieved, temperature: float, similarity: Metric) -> Opinion:
    """log p of the targets by each of `ks_of(k)` neighbours, fp32 `[n, ks]`.

    Features are `distances` fp32 `[n, m]` of the nearest m = min(k, `NEAREST`) neighbours, infinite
    where missing, and `distinct` fp32 `[n, m]`, see `distinct_values`.

    Args:
        block: neighbours with their values, nearest first.
        temperature: divides the scores.
        similarity: that the scores are of.
    """
    k = block.scores.shape[1]
    log_probs = log_probs_of(block, ks_of(k), [temperature])[:, :, 0]
    scores, values = block.scores[:, :NEAREST], block.values[:, :NEAREST]
    sign = -1 if similarity == "l2" else 1
    distances = torch.where(scores.isneginf(), torch.inf, sign * scores)
    return Opinion(log_probs, {"distances": distances, "distinct": distinct_values(scores, values)})


def distinct_values(scores: Tensor, values: Tensor) -> Tensor:
    """The number of distinct values among the first i neighbours, missing ones left out: fp32
    `[n, k]`.

    >>> distinct_values(torch.zeros(1, 4), torch.tensor([[7, 7, 3, 7]])).tolist()
    [[1.0, 1.0, 2.0, 2.0]]
    """
    ordered, places = values.sort(dim=1, stable=True)  # of equal values the nearest is first
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    in_place = torch.zeros_like(is_first).scatter_(1, places, is_first)
    return (in_place & ~scores.isneginf()).cumsum(dim=1).float()
