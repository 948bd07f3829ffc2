"""The kNN distribution and its mixture with a language model's (Khandelwal et al., ICLR 2020).

With scores s_j of the k neighbours (-distance for l2, the similarity for ip and cosine), values
v_j and temperature T (eq. 2; T as in later work, 1 in the paper):

    p_kNN(w) = sum over j with v_j = w of exp(s_j / T)  /  sum over all j of exp(s_j / T)
    p(w) = lmbda p_kNN(w) + (1 - lmbda) p_LM(w)                                          (eq. 3)

Missing neighbours (row -1) have score -inf and so no part in either sum.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from neighborlm.retrieval.engine.loops import LIGHTEST, SMALL, add_up
from neighborlm.retrieval.search.retriever import Metric


def neighbor_scores(distances: np.ndarray, rows: np.ndarray, metric: Metric) -> Tensor:
    """Scores of neighbours, larger is nearer and -inf where missing.

    Args:
        distances: fp32 `[Q, k]` as a `Retriever` gives them.
        rows: int64 `[Q, k]`.

    Returns:
        fp32 `[Q, k]`.
    """
    scores = -distances if metric == "l2" else distances.copy()
    if rows.size and rows.min() < 0:
        scores[rows < 0] = -np.inf
    return torch.from_numpy(scores)


def knn_log_prob(scores: Tensor, hits: Tensor, temperature: float = 1.0) -> Tensor:
    """log p_kNN of the target.

    Args:
        scores: fp32 or fp64 `[Q, k]`, on the CPU, -inf where missing.
        hits: bool `[Q, k]`, whether the neighbour's value is the target.
        temperature: divides the scores.

    Returns:
        `[Q]`, -inf where no neighbour carries the target.

    Raises:
        ValueError: the shapes differ.

    >>> scores = torch.tensor([[0.0, 0.0, 0.0, float("-inf")]])
    >>> round(knn_log_prob(scores, torch.tensor([[True, False, True, True]])).exp().item(), 4)
    0.6667
    """
    if scores.shape != hits.shape:
        raise ValueError(f"{tuple(scores.shape)} scores and {tuple(hits.shape)} hits")
    best, weights = _weights(scores, temperature)
    total, of_target = map(torch.from_numpy, add_up(weights.numpy(), hits.numpy()))
    of_target = of_target.log()
    small = (of_target < SMALL) & ~of_target.isneginf()
    if small.any():
        of_hits = scores[small].masked_fill(~hits[small], -torch.inf)
        best_hit, weights = _weights(of_hits, temperature)
        log_weights = weights.mul_(~of_hits.isneginf()).sum(dim=1, keepdim=True).log()
        of_target[small] = ((best_hit - best[small]) / temperature + log_weights).squeeze(1)
    return torch.where(of_target.isneginf(), of_target, of_target - total.log())


def _weights(scores: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The best score of each row `[Q, 1]`, and what all weigh relative to it `[Q, k]`."""
    best = scores.amax(dim=1, keepdim=True).nan_to_num(neginf=0.0)
    below = scores - best  # only differences matter, and these are exact
    if temperature != 1:
        below.div_(temperature)
    return best, below.clamp_(min=LIGHTEST).exp_()


def weighted_scores(scores: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """Scores of neighbours that stand for several entries each, see `store.thinning`: from
    s exp(d / T) = exp((d + T log s) / T).

    Args:
        scores: fp32 or fp64 `[Q, k]`, -inf where missing.
        weights: `[Q, k]`, how many entries each stands for, at least one; any where missing.
        temperature: that divides the scores.

    >>> scores = weighted_scores(torch.zeros(1, 2), torch.tensor([[3, 1]]), temperature=10.0)
    >>> round(knn_log_prob(scores, torch.tensor([[True, False]]), 10.0).exp().item(), 4)
    0.75
    """
    return scores + temperature * weights.to(scores.dtype).log()


class Votes:
    """What the neighbours of tokens say of their targets.

    Args:
        targets: int64 `[Q]`.
        temperature: divides the scores.
        metric: of the distances.
        values_of: gives the values, of the shape of the rows int64; any where missing.

    Attributes:
        said: fp32 `[3, Q]`: log p_kNN of the target, score of the nearest neighbour and of the
            farthest, -inf and inf where there are none.
    """

    def __init__(
        self,
        targets: np.ndarray,
        temperature: float,
        metric: Metric,
        values_of: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        self.targets = targets
        self.temperature = temperature
        self.metric: Metric = metric
        self.values_of = values_of
        self.said = np.empty((3, len(targets)), dtype=np.float32)

    @torch.inference_mode()  # which is a thread's own
    def take(
        self,
        which: np.ndarray | slice,
        distances: np.ndarray,
        rows: np.ndarray,
        values: np.ndarray | None = None,
    ) -> tuple[Tensor, np.ndarray]:
        """Counts the votes for some of the targets.

        Args:
            which: numbers of the targets.
            distances, rows: fp32 and int64 `[n, k]` as a `Retriever` gives them.
            values: of the rows.

        Returns:
            scores fp32 `[n, k]`, and the values.
        """
        if values is None:
            values = self.values_of(rows)
        scores = neighbor_scores(distances, rows, self.metric)
        hits = values == self.targets[which][:, None].astype(values.dtype)
        self.said[:, which] = weigh(scores, torch.from_numpy(hits), self.temperature)
        return scores, values


def weigh(scores: Tensor, hits: Tensor, temperature: float) -> Tensor:
    """What `Votes.said` is, fp32 `[3, Q]`, for scores and hits; see `knn_log_prob`."""
    nearest, farthest = scores.amax(dim=1), scores.amin(dim=1)
    if farthest.isneginf().any():  # some are missing
        farthest = scores.masked_fill(scores.isneginf(), torch.inf).amin(dim=1)
    return torch.stack([knn_log_prob(scores, hits, temperature), nearest, farthest])


def knn_distribution(
    scores: Tensor, values: Tensor, vocab_size: int, temperature: float = 1.0
) -> Tensor:
    """p_kNN over the whole vocabulary.

    Args:
        scores: fp32 `[Q, k]`, -inf where missing.
        values: int64 `[Q, k]`; any valid id where missing.

    Returns:
        fp32 `[Q, vocab_size]`; rows sum to one, or to zero where all neighbours are missing.
    """
    weights = (scores / temperature).softmax(dim=1).nan_to_num(0.0)
    return weights.new_zeros(len(scores), vocab_size).scatter_add_(1, values, weights)


def interpolate(lm_log_prob: Tensor, knn_log_prob: Tensor, lmbda: float | Tensor) -> Tensor:
    """log(lmbda p_kNN + (1 - lmbda) p_LM), in log space; the arguments broadcast.

    Where p_kNN = 0 this is (1 - lmbda) p_LM.
    """
    lmbda = torch.as_tensor(lmbda, dtype=torch.float64)
    return torch.logaddexp(
        lm_log_prob + torch.log1p(-lmbda).to(lm_log_prob),
        knn_log_prob + lmbda.log().to(knn_log_prob),
    )
