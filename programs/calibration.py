"""How well a way of predicting knows what it knows: the probability that it gives its favourite,
the most probable next token, against how often that favourite was right (a reliability diagram: Guo
et al., "On Calibration of Modern Neural Networks", ICML 2017)."""

from typing import NamedTuple

import numpy as np

from neighborlm.programs.page.tokens import most_probable
from neighborlm.retrieval.memories.cache import RetrievalCache
from neighborlm.retrieval.memories.knn import knn_weights, weighted_scores

PARTS = 10
"""Parts of the probabilities from 0 to 1 that tokens are sorted into."""


class Favourites(NamedTuple):
    """The most probable next token at each of n places.

    Attributes:
        probs: fp64 `[n]`, what it was given.
        right: bool `[n]`, whether it came.
    """

    probs: np.ndarray
    right: np.ndarray


class Part(NamedTuple):
    """Places whose favourites were given a probability between two bounds.

    Attributes:
        low: of the probability; the upper bound is the next part's.
        share: of all places.
        said: mean probability of the favourite; NaN where there is no place.
        right: share of favourites that came; NaN where there is no place.
    """

    low: float
    share: float
    said: float
    right: float


def favourites(
    cache: RetrievalCache, lmbda: float, temperature: float
) -> tuple[Favourites, Favourites] | None:
    """Those of the model and of kNN-LM; None for a cache that keeps no candidates of the model.

    A token that neighbours name and the model's kept candidates do not counts with its votes alone:
    a little less than its probability, as the model gives it less than the last candidate.

    Args:
        cache: of a split.
        lmbda: weight of p_kNN.
        temperature: divides the neighbours' scores.
    """
    if cache.top_ids is None:
        return None
    columns = []
    for block in cache.blocks(values=True):
        at, targets = block.positions.numpy(), block.targets.numpy()
        ids, scores = cache.top_ids[at].astype(np.int64), block.scores
        probs = np.exp(cache.top_log_probs[at].astype(np.float64))
        if block.weights is not None:
            scores = weighted_scores(scores, block.weights, temperature)
        votes = lmbda * knn_weights(scores.double(), temperature).numpy()
        both = np.hstack([ids, block.values.numpy()]), np.hstack([(1 - lmbda) * probs, votes])
        mixed = most_probable(*both, targets)
        for best, given in ((ids, probs), (mixed.ids, mixed.probs)):
            columns += [given[:, 0], best[:, 0] == targets]
    merged = [np.concatenate(columns[i::4]) for i in range(4)]
    return Favourites(*merged[:2]), Favourites(*merged[2:])


def calibration(of: Favourites) -> list[Part]:
    """Places by the probability of their favourite, in `PARTS` parts of equal width.

    >>> calibration(Favourites(np.array([0.25, 0.125, 0.21875, 1.0]), np.arange(4) < 2))[2]
    Part(low=0.2, share=0.5, said=0.234375, right=0.5)
    """
    which = np.minimum((of.probs * PARTS).astype(np.int64), PARTS - 1)
    counts = np.bincount(which, minlength=PARTS)

    def mean(column: np.ndarray) -> np.ndarray:
        sums = np.bincount(which, weights=column, minlength=PARTS)
        return np.divide(sums, counts, out=np.full(PARTS, np.nan), where=counts > 0)

    lows = np.arange(PARTS) / PARTS
    rows = zip(lows, counts / len(which), mean(of.probs), mean(of.right), strict=True)
    return [Part(*map(float, row)) for row in rows]


def calibration_error(parts: list[Part]) -> float:
    """The expected calibration error: by how much the probability that was said and the share that
    was right differ, over all places (Guo et al., equation 3).

    >>> calibration_error([Part(0.0, 0.25, 0.5, 0.25), Part(0.5, 0.75, 0.6, 0.6)])
    0.0625
    """
    return float(np.nansum([part.share * abs(part.said - part.right) for part in parts]))
