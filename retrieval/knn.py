"""The kNN distribution and its mixture with a language model's (Khandelwal et al., ICLR 2020).

With scores s_j of the k neighbours (-distance for l2, the similarity for ip and cosine), values
v_j and temperature T (eq. 2; T as in later work, 1 in the paper):

    p_kNN(w) = sum over j with v_j = w of exp(s_j / T)  /  sum over all j of exp(s_j / T)
    p(w) = lmbda p_kNN(w) + (1 - lmbda) p_LM(w)                                          (eq. 3)

Missing neighbours (row -1) have score -inf and so no part in either sum.
"""

import faiss
import numpy as np
import torch
from torch import Tensor

from retrieval.datastore import BLOCK_BYTES, Datastore
from retrieval.retriever import Metric, normalized

LIGHTEST = -80.0
"""Logarithm of the least weight, relative to the largest: no sum in fp32 changes by those below it,
whose exponentials would take many times as long."""
SMALL = -50.0
"""Logarithm of what all hits weigh, below which `LIGHTEST` is not light beside it."""


def neighbor_scores(distances: np.ndarray, rows: np.ndarray, metric: Metric) -> Tensor:
    """Scores of neighbours, larger is nearer and -inf where missing.

    Args:
        distances: fp32 `[Q, k]` as a `Retriever` gives them.
        rows: int64 `[Q, k]`.

    Returns:
        fp32 `[Q, k]`.
    """
    scores = -distances if metric == "l2" else distances.copy()
    missing = rows < 0
    if missing.any():
        scores[missing] = -np.inf
    return torch.from_numpy(scores)


def exact_distances(
    queries: np.ndarray, rows: np.ndarray, datastore: Datastore, metric: Metric
) -> np.ndarray:
    """Distances to the stored keys of neighbours that an index found.

    Each distinct row is read once, in ascending order, a bounded number at a time; no `[Q, k, d]`
    array is made.

    Args:
        queries: fp32 `[Q, d]`.
        rows: int64 `[Q, k]`, -1 where missing.

    Returns:
        fp32 `[Q, k]`; what stands at missing neighbours has no meaning.
    """
    queries = normalized(queries, metric)
    flat = rows.reshape(-1)
    # Row and place of each pair in one integer: numpy sorts those much faster than it argsorts.
    bits = max(flat.size - 1, 1).bit_length()
    pairs = flat << bits
    pairs |= np.arange(flat.size)
    pairs.sort()
    pairs = pairs[np.searchsorted(pairs, 0) :]
    order, ascending = pairs & ((1 << bits) - 1), pairs >> bits
    is_first = np.diff(ascending, prepend=-1) > 0
    distinct = ascending[is_first]
    number = np.cumsum(is_first) - 1  # of the distinct row, for each pair
    query = order // rows.shape[1]
    pairwise = (
        faiss.pairwise_indexed_L2sqr if metric == "l2" else faiss.pairwise_indexed_inner_product
    )
    result = np.zeros(flat.shape, dtype=np.float32)
    step = max(BLOCK_BYTES // (4 * datastore.dim), 1)
    for first in range(0, len(distinct), step):
        keys = normalized(datastore.read(distinct[first : first + step]), metric)
        begin, end = np.searchsorted(number, [first, first + step]).tolist()
        out = np.empty(end - begin, dtype=np.float32)
        of_query = np.ascontiguousarray(query[begin:end])
        of_key = number[begin:end] - first
        pairwise(
            datastore.dim,
            end - begin,
            faiss.swig_ptr(queries),
            faiss.swig_ptr(of_query),
            faiss.swig_ptr(keys),
            faiss.swig_ptr(of_key),
            faiss.swig_ptr(out),
        )
        result[order[begin:end]] = out
    return result.reshape(rows.shape)


def knn_log_prob(scores: Tensor, hits: Tensor, temperature: float = 1.0) -> Tensor:
    """log p_kNN of the target.

    Args:
        scores: fp32 `[Q, k]`, -inf where missing.
        hits: bool `[Q, k]`, whether the neighbour's value is the target.
        temperature: divides the scores.

    Returns:
        fp32 `[Q]`, -inf where no neighbour carries the target.

    >>> scores = torch.tensor([[0.0, 0.0, 0.0, float("-inf")]])
    >>> round(knn_log_prob(scores, torch.tensor([[True, False, True, True]])).exp().item(), 4)
    0.6667
    """
    best, weights = _weights(scores, temperature)
    total = weights.sum(dim=1)
    of_target = weights.mul_(hits).sum(dim=1).log()
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
    below = (scores - best).div_(temperature)  # only differences matter, and these are exact
    return best, below.clamp_(min=LIGHTEST).exp_()


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
