"""The loss of a kNN-LM for many k, temperatures and lmbdas at once, from the neighbours that one
pass of retrieval found, and the search for the best pair.

Neighbours come nearest first, so those of a smaller k are the first of a larger (see
`knn.knn_log_probs`).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.errors import InputError
from neighborlm.common.progress import Report, progress_bars
from neighborlm.retrieval.memories.cache import Retrieved
from neighborlm.retrieval.memories.knn import PART, knn_log_probs, weighted_scores
from neighborlm.retrieval.memories.mixers import mixture

# -- the grid ------------------------------------------------------------------------------------


def sweep(
    blocks: Iterable[Retrieved],
    ks: Sequence[int],
    temperatures: Sequence[float],
    lmbdas: Sequence[float],
) -> np.ndarray:
    """Mean negative log-likelihood of every combination, in one pass.

    Args:
        blocks: such as a `RetrievalCache`; each token's neighbours nearest first.
        ks: ascending, at most as many as there are neighbours.
        temperatures: more than 0.
        lmbdas: from 0 to 1.

    Returns:
        float64 `[ks, temperatures, lmbdas]`, nats per token.

    Raises:
        InputError: there is no token.
    """
    weights = torch.as_tensor(lmbdas, dtype=torch.float64)
    total = torch.zeros(len(ks), len(temperatures), len(weights), dtype=torch.float64)
    count = 0
    rows = max(PART // max(ks[-1], len(ks) * len(weights)), 1)
    for block in blocks:
        count += len(block.lm_log_prob)
        for part in parts_of(block, ks[-1], rows):
            of_knn = log_probs_of(part, ks, temperatures)
            lm = part.lm_log_prob[:, None, None]
            for i in range(len(temperatures)):
                mixed = mixture([lm, of_knn[:, :, i, None]], [1 - weights, weights])
                total[:, i] -= mixed.sum(0, dtype=torch.float64)
    check_count(count)
    return (total / count).numpy()


def parts_of(block: Retrieved, k: int, rows: int) -> Iterator[Retrieved]:
    """A block, some tokens at a time, each with its nearest k neighbours."""
    for first in range(0, len(block.positions), rows):
        part = slice(first, first + rows)
        alone = (column[part] for column in block[:3])
        yield Retrieved(*alone, *(x if x is None else x[part, :k] for x in block[3:]))


def log_probs_of(block: Retrieved, ks: Sequence[int], temperatures: Sequence[float]) -> Tensor:
    """log p_kNN of the targets `[n, ks, temperatures]`; see `knn.knn_log_probs`."""
    if block.weights is None:
        return knn_log_probs(block.scores, block.hits, ks, temperatures)
    merged = (weighted_scores(block.scores, block.weights, t) for t in temperatures)
    by_temperature = [
        knn_log_probs(scores, block.hits, ks, [temperature])
        for scores, temperature in zip(merged, temperatures, strict=True)
    ]
    return torch.cat(by_temperature, dim=2)


def spread(blocks: Iterable[Retrieved]) -> tuple[Tensor, int]:
    """How far each token's best score lies above the mean of its scores, missing ones left out:
    the sum over all tokens, to which one without neighbours adds 0, and the number of tokens."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for block in blocks:
        count += len(block.scores)
        missing = block.scores.isneginf()
        below = (block.scores - block.scores.amax(dim=1, keepdim=True)).masked_fill_(missing, 0.0)
        total -= (below.sum(1) / (~missing).sum(1).clamp(min=1)).sum(dtype=torch.float64)
    return total, count


# -- the search for the best pair ----------------------------------------------------------------


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


def tune(blocks: Iterable[Retrieved]) -> Tuning:
    """Finds the lmbda and temperature that give retrieved tokens the highest likelihood.

    Temperatures are tried by octaves around the spread of the scores, then by quarter octaves
    around the best; each with lmbda from 0 to 0.99 in steps of 0.01.

    Args:
        blocks: such as a `RetrievalCache` or a list, gone through three times; neighbours may come
            in any order.

    Raises:
        InputError: there is no token.
    """
    total, count = spread(blocks)
    check_count(count)
    octave = octave_of(total.item() / count)
    k = next(iter(blocks)).scores.shape[1]
    lmbdas = np.arange(100) / 100
    losses: dict[float, np.ndarray] = {}

    def try_out(exponents: np.ndarray, stage: str, report: Report) -> float:
        temperatures = [t for t in (2.0**exponents).tolist() if t not in losses]
        (table,) = sweep(_told(blocks, count, stage, report), [k], temperatures, lmbdas)
        losses.update(zip(temperatures, table, strict=True))
        return math.log2(min(losses, key=lambda t: losses[t].min()))

    with progress_bars("tuning lmbda and temperature", transient=True) as report:
        best = try_out(np.arange(octave - 7.0, octave + 6.0), "octaves", report)
        try_out(best + np.arange(-3, 4) / 4, "quarter octaves", report)
    temperatures = np.array(sorted(losses))
    table = np.stack([losses[t] for t in temperatures])
    row, column = np.unravel_index(table.argmin(), table.shape)
    found = (lmbdas[column], temperatures[row], table[row, column])
    return Tuning(*map(float, found), lmbdas, temperatures, table)


def _told(
    blocks: Iterable[Retrieved], tokens: int, stage: str, report: Report
) -> Iterator[Retrieved]:
    """The blocks; tells how many of all tokens are behind."""
    done = 0
    for block in blocks:
        yield block
        done += len(block.positions)
        report(stage, done, tokens)


def check_count(tokens: int) -> None:
    """Raises InputError where there are none."""
    if tokens == 0:
        raise InputError(
            "lmbda and temperature cannot be tuned on no tokens; expected a split of which some "
            "are retrieved"
        )


def octave_of(spread: float) -> int:
    """The power of two at or below a spread of scores; 0 where there is none."""
    return math.floor(math.log2(spread)) if spread > 0 else 0
