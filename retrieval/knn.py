"""The kNN distribution and its mixture with a language model's (Khandelwal et al., ICLR 2020).

With scores s_j of the k neighbours (-distance for l2, the similarity for ip and cosine), values
v_j and temperature T (eq. 2; T as in later work, 1 in the paper):

    p_kNN(w) = sum over j with v_j = w of exp(s_j / T)  /  sum over all j of exp(s_j / T)
    p(w) = lmbda p_kNN(w) + (1 - lmbda) p_LM(w)                                          (eq. 3)

Missing neighbours (row -1) have score -inf and so no part in either sum.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from retrieval.datastore import BLOCK_BYTES, Datastore
from retrieval.retriever import Metric, normalized


def neighbor_scores(distances: np.ndarray, rows: np.ndarray, metric: Metric) -> Tensor:
    """Scores of neighbours, larger is nearer and -inf where missing.

    Args:
        distances: fp32 `[Q, k]` as a `Retriever` gives them.
        rows: int64 `[Q, k]`.

    Returns:
        fp32 `[Q, k]`.
    """
    scores = -distances if metric == "l2" else distances
    return torch.from_numpy(np.where(rows < 0, -np.inf, scores).astype(np.float32, copy=False))


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
    best = scores.amax(dim=1, keepdim=True).nan_to_num(neginf=0.0)
    scaled = (scores - best) / temperature  # only differences matter, and these are exact
    of_target = scaled.masked_fill(~hits, -torch.inf).logsumexp(dim=1)
    return torch.where(of_target.isneginf(), of_target, of_target - scaled.logsumexp(dim=1))


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


class Tuning(NamedTuple):
    """What `tune` found.

    Attributes:
        lmbda, temperature: the best pair.
        loss: its mean negative log-likelihood in nats.
        lmbdas, temperatures: the grid.
        losses: float64 `[temperatures, lmbdas]`, all of it.
    """

    lmbda: float
    temperature: float
    loss: float
    lmbdas: np.ndarray
    temperatures: np.ndarray
    losses: np.ndarray


def tune(
    lm_log_prob: Tensor,
    scores: Tensor,
    hits: Tensor,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tuning:
    """The lmbda and temperature that give retrieved tokens the highest likelihood.

    Temperatures are tried by octaves around the spread of the scores, then by quarter octaves
    around the best; each with lmbda from 0 to 0.99 in steps of 0.01.

    Args:
        lm_log_prob: fp32 `[N]`.
        scores: fp32 `[N, k]`, -inf where missing.
        hits: bool `[N, k]`.
        sum_over_ranks: adds up a float64 tensor over the ranks that hold parts of the tokens.
    """
    count = sum_over_ranks(torch.tensor(float(len(lm_log_prob)), dtype=torch.float64))
    spreads = _spread(scores).nan_to_num(0.0).double().sum()
    spread = (sum_over_ranks(spreads) / count).item()
    octave = math.floor(math.log2(spread)) if spread > 0 else 0
    lmbdas = torch.arange(100, dtype=torch.float64) / 100
    losses: dict[float, np.ndarray] = {}

    def try_out(exponents: np.ndarray) -> float:
        for temperature in 2.0**exponents:
            if temperature not in losses:
                total = _total_losses(lm_log_prob, scores, hits, temperature, lmbdas)
                losses[temperature] = (sum_over_ranks(total) / count).numpy()
        return math.log2(min(losses, key=lambda t: losses[t].min()))

    best = try_out(np.arange(octave - 7.0, octave + 6.0))
    try_out(best + np.arange(-3, 4) / 4)
    temperatures = np.array(sorted(losses))
    table = np.stack([losses[t] for t in temperatures])
    row, column = np.unravel_index(table.argmin(), table.shape)
    return Tuning(
        float(lmbdas[column]),
        float(temperatures[row]),
        float(table[row, column]),
        lmbdas.numpy(),
        temperatures,
        table,
    )


def _spread(scores: Tensor) -> Tensor:
    """How far the best score of each token lies above the mean, fp32 `[N]`; NaN without any."""
    finite = scores.masked_fill(scores.isneginf(), torch.nan)
    return scores.amax(dim=1) - finite.nanmean(dim=1)


def _total_losses(
    lm_log_prob: Tensor, scores: Tensor, hits: Tensor, temperature: float, lmbdas: Tensor
) -> Tensor:
    """Summed negative log-likelihood for each lmbda, float64 `[lmbdas]`."""
    total = torch.zeros(len(lmbdas), dtype=torch.float64)
    for lm, s, h in zip(lm_log_prob.split(4096), scores.split(4096), hits.split(4096), strict=True):
        knn = knn_log_prob(s, h, temperature)
        total -= interpolate(lm[:, None], knn[:, None], lmbdas[None]).double().sum(0)
    return total
