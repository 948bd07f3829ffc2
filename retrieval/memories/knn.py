"""The kNN distribution (Khandelwal et al., ICLR 2020), in torch; `retrieval.engine.votes` computes
the same in compiled loops, while the search goes on.

With scores s_j of the k neighbours (-distance for l2, the similarity for ip and cosine), values
v_j and temperature T (eq. 2; T as in later work, 1 in the paper):

    p_kNN(w) = sum over j with v_j = w of exp(s_j / T)  /  sum over all j of exp(s_j / T)

A missing neighbour (row -1) has score -inf and adds nothing to either sum.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.contracts import Metric, Votes
from neighborlm.common.errors import InputError
from neighborlm.retrieval.engine import LIGHTEST, SMALL

PART = 1 << 19
"""Neighbours whose weights are computed at a time: they stay in the processor's cache."""


def check_similarity(
    distances: Literal["exact", "index"], similarity: Metric, metric: Metric
) -> None:
    """Refuses to read the distances of an index as another measure than they are.

    Raises:
        InputError: the similarity is not the index's metric, and is not computed from stored keys.
    """
    if distances == "index" and similarity != metric:
        raise InputError(
            f"similarity {similarity}: the distances of the index are {metric}; expected distances "
            "exact, or the same measure"
        )


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
        scores: fp32 or fp64 `[Q, k]`, on the CPU, in any order, -inf where missing.
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
    k = scores.shape[1]
    rows = max(PART // max(k, 1), 1)
    parts = zip(scores.split(rows), hits.split(rows), strict=True)
    return torch.cat([knn_log_probs(*part, [k], [temperature])[:, 0, 0] for part in parts])


def knn_log_probs(
    scores: Tensor, hits: Tensor, ks: Sequence[int], temperatures: Sequence[float]
) -> Tensor:
    """log p_kNN of the target by the nearest k, for every k and temperature. Weights are computed
    once for each temperature.

    Args:
        scores: fp32 or fp64 `[Q, k]`, nearest first unless the only one of `ks` is k; -inf where
            missing.
        hits: bool `[Q, k]`, whether the neighbour's value is the target.
        ks: ascending, the last of them k.
        temperatures: divide the scores.

    Returns:
        `[Q, ks, temperatures]`, -inf where no neighbour carries the target.

    Raises:
        ValueError: the shapes differ.
    """
    if scores.shape != hits.shape:
        raise ValueError(f"{tuple(scores.shape)} scores and {tuple(hits.shape)} hits")
    best = _best(scores)
    below = scores - best  # only differences matter; small ones are exact
    result = scores.new_empty(len(scores), len(ks), len(temperatures))
    for i, temperature in enumerate(temperatures):
        weights = _weights(below, temperature)
        total = _sums(weights, ks).log_()
        of_target = _sums(weights.mul_(hits), ks).log_()
        small = ((of_target < SMALL) & ~of_target.isneginf()).any(dim=1)
        if small.any():  # `LIGHTEST` has cut these weights off: begin again from the best hit
            hit_scores = scores[small].masked_fill(~hits[small], -torch.inf)
            best_hit = _best(hit_scores)
            # The best hit weighs 1, and every k that includes a hit includes the best one.
            weight = _sums(_weights(hit_scores - best_hit, temperature), ks)
            log_weight = weight.log().masked_fill_(weight < 0.5, -torch.inf)
            of_target[small] = (best_hit - best[small]) / temperature + log_weight
        result[:, :, i] = of_target - total
    return result


def _best(scores: Tensor) -> Tensor:
    """The best score of each row, `[Q, 1]`; 0 where all are missing."""
    return scores.amax(dim=1, keepdim=True).nan_to_num(neginf=0.0)


def _weights(below_best: Tensor, temperature: float) -> Tensor:
    """Weights of scores, by how much they lie below the best one, `[Q, k]`."""
    return (below_best / temperature).clamp_(min=LIGHTEST).exp_()


def _sums(weights: Tensor, ks: Sequence[int]) -> Tensor:
    """Sums of the first k weights of each row, `[Q, ks]`."""
    parts = weights.split(np.diff(ks, prepend=0).tolist(), dim=1)
    return torch.stack([part.sum(dim=1) for part in parts], dim=1).cumsum(dim=1)


def votes_of_scores(scores: Tensor, hits: Tensor, temperature: float) -> Votes:
    """The votes for targets, from scores and hits `[Q, k]`; see `knn_log_prob`."""
    nearest, farthest = extremes(scores)
    log_probs = knn_log_prob(scores, hits, temperature)
    return Votes(log_probs.numpy(), nearest.numpy(), farthest.numpy())


def extremes(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of the nearest and of the farthest neighbour that is not missing, `[Q]` each; -inf
    and inf where all are."""
    nearest, farthest = scores.amax(dim=1), scores.amin(dim=1)
    if farthest.isneginf().any():  # some are missing
        farthest = scores.masked_fill(scores.isneginf(), torch.inf).amin(dim=1)
    return nearest, farthest


def knn_weights(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """The share of p_kNN that each neighbour contributes.

    Args:
        scores: fp32 or fp64 `[Q, k]`, -inf where missing.
        temperature: divides the scores.

    Returns:
        `[Q, k]`, of the type of the scores; a row sums to one, or to zero where all neighbours are
        missing.
    """
    return (scores / temperature).softmax(dim=1).nan_to_num(0.0)


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
