"""`Mixture`: adds up what a model's distribution mixed with the kNN distribution says of tokens."""

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from neighborlm.callbacks.token_scores import ScoreTable
from neighborlm.common.contracts import Metric, Votes
from neighborlm.models.metrics import TokenLoss
from neighborlm.retrieval.memories.mixers import mixture


class Mixture:
    """The loss of the mixture, and means over tokens of what was retrieved.

    Args:
        lmbda: weight of p_kNN.
        similarity: what the scores are made of.
        keep_scores: keep the per-token log-probabilities, in `table`.
    """

    def __init__(self, lmbda: float, similarity: Metric, keep_scores: bool = False) -> None:
        self.lmbda = lmbda
        self.similarity = similarity
        self.table = ScoreTable() if keep_scores else None
        self.loss = TokenLoss()
        self.means = MetricCollection(
            {
                "nearest_distance": MeanMetric(),
                "kth_distance": MeanMetric(),
                "target_among_neighbors": MeanMetric(),
            },
            compute_groups=False,
        )

    def add(self, positions: Tensor, lm_log_prob: Tensor, votes: Votes) -> None:
        """Adds tokens.

        Args:
            positions: int64 `[n]`, of the tokens in the split.
            lm_log_prob: fp32 `[n]`, the model's own.
            votes: of the neighbours.
        """
        knn, nearest, farthest = map(torch.from_numpy, votes)
        # torch computes single numbers and vectors by functions that differ in the last digit:
        # in fp32 the figure of a token would depend on how many come with it.
        log_probs = [lm_log_prob.double(), knn.double()]
        mixed = mixture(log_probs, [1 - self.lmbda, self.lmbda])
        self.loss.update(mixed)
        self.means["target_among_neighbors"].update((~knn.isneginf()).float())
        some = ~nearest.isneginf()  # of a token without neighbours there is no distance
        sign = -1 if self.similarity == "l2" else 1
        self.means["nearest_distance"].update(sign * nearest[some])
        self.means["kth_distance"].update(sign * farthest[some])
        if self.table is not None:
            self.table.add(
                position=np.asarray(positions),
                knn_log_prob=knn.numpy(),
                log_prob=mixed.float().numpy(),
            )

    def to(self, device: torch.device) -> None:
        """Where ranks add up their parts."""
        self.loss.to(device)
        self.means.to(device)

    def statistics(self) -> dict[str, float]:
        """Means over all tokens and ranks: distances of the nearest and the k-th neighbour, share
        of tokens whose target is among the neighbours."""
        return {name: mean.item() for name, mean in self.means.compute().items()}
