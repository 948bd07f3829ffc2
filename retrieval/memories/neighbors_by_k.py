"""`NeighborsByK`: the kNN distributions of the nearest 1, 2, 4, ..., k neighbours, each with a
weight of its own, and the features of meta-k (Zheng et al., ACL 2021): the k distances, and the
number of distinct values among the first i neighbours.

The language model is meta-k's r = 0. In meta-k the network may also choose the temperature; here
the memory has a fixed one, since a mixer only weighs the distributions of its sources.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.contracts import Memory, Metric, Neighbors, Opinion, Scored
from neighborlm.retrieval.memories.cache_builder import nearest_first
from neighborlm.retrieval.memories.knn import knn_log_probs, neighbor_scores


class NeighborsByK(Memory):
    """The opinions of the nearest 1, 2, 4, ..., k neighbours of a kNN memory.

    Args:
        knn: a memory with `k`, `temperature`, `similarity` and `neighbors(asked)`, which searches.
            Meta-k was made for a k of 4 to 64.

    Attributes:
        ks: the numbers of neighbours, ascending.
    """

    in_order = False

    def __init__(self, knn: Memory) -> None:
        self.knn = knn
        self.want = knn.want
        self.ks = [2**i for i in range(knn.k.bit_length())]
        if self.ks[-1] != knn.k:
            self.ks.append(knn.k)

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds that the kNN memory spent, by stage."""
        return self.knn.seconds

    def prepare(self) -> None:
        """See `Memory.prepare`."""
        self.knn.prepare()

    def begin_pass(self, text: np.ndarray) -> None:
        """See `Memory.begin_pass`."""
        self.knn.begin_pass(text)

    def end_pass(self) -> None:
        """See `Memory.end_pass`."""
        self.knn.end_pass()

    def say(self, asked: Scored) -> Opinion:
        """log p of the targets, fp32 `[n, ks]`. Features are `distances` fp32 `[n, k]`, nearest
        first and infinite where missing, and `distinct` fp32 `[n, k]`, see `distinct_values`."""
        scores, values = self._nearest_first(asked)
        hits = (values == asked.targets[:, None]) & ~scores.isneginf()
        log_probs = knn_log_probs(scores, hits, self.ks, [self.knn.temperature])[:, :, 0]
        sign = -1 if self.knn.similarity == "l2" else 1
        distances = torch.where(scores.isneginf(), torch.inf, sign * scores)
        features = {"distances": distances, "distinct": distinct_values(scores, values)}
        return Opinion(log_probs, features)

    def distribution(self, asked: Scored) -> tuple[Tensor, Tensor]:
        """The distribution of all k neighbours; see `Memory.distribution`."""
        return self.knn.distribution(asked)

    def _nearest_first(self, asked: Scored) -> tuple[Tensor, Tensor]:
        """Scores fp32 and values int64 of the neighbours `[n, k]`."""
        found: Neighbors = self.knn.neighbors(asked)
        metric: Metric = self.knn.similarity
        scores = neighbor_scores(found.distances, found.rows, metric).numpy()
        scores, values = nearest_first(scores, found.values)
        return torch.from_numpy(scores), torch.from_numpy(values.astype(np.int64))


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
