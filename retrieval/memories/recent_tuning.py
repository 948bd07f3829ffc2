"""Finds the window size and the temperature with which the recent tokens help a language model
most, from the keys and log-probabilities that one pass over a text has collected.

For every size, temperature and lmbda of a grid, the loss of the mixture p = (1 - lmbda) p_LM +
lmbda p_recent is added up over the tokens; all come from one set of matrix products.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.contracts import Scored
from neighborlm.retrieval.engine import LIGHTEST
from neighborlm.retrieval.memories.tuning import octave_of
from neighborlm.retrieval.memories.window import Block, Window

SIZES = (250, 500, 1000, 2000, 4000)
NEARLY = 1e-3
"""Nats a token by which a smaller window, which takes less time, may be worse than the best."""
LMBDAS = torch.arange(20, dtype=torch.float64) / 20
OCTAVES = range(-6, 1)
"""Temperatures to try first, in octaves above the spread of the scores; half an octave below and
above the best of them follows."""
TOKENS_AT_ONCE, TOKENS_OF_SPREAD = 8192, 4096
"""Tokens of the text that are compared at a time, and those whose scores measure the spread."""


class RecentTuning(NamedTuple):
    """What `tune_recent` found.

    Attributes:
        size: the smallest that is nearly as good as the best.
        temperature: the best for this size.
        lmbda: the best weight beside the language model for both.
        loss: of that mixture, nats a token.
        sizes, temperatures: the grid.
        losses: float64 `[sizes, temperatures]`, each with its best weight.
    """

    size: int
    temperature: float
    lmbda: float
    loss: float
    sizes: Sequence[int]
    temperatures: Sequence[float]
    losses: np.ndarray


def tune_recent(
    heard: Scored,
    key_type: str,
    new_window: Callable[[int], Window],
    sizes: Sequence[int] | None = None,
    temperatures: Sequence[float] | None = None,
) -> RecentTuning:
    """Finds the size and the temperature for a text.

    Args:
        heard: the text, in its order, with keys and the language model's log-probabilities.
        key_type: of the keys that are compared.
        new_window: makes a window of some size at the beginning of the text.
        sizes: to try, ascending; `SIZES` by default.
        temperatures: to try; by default octaves above the spread of the scores.
    """
    sizes = SIZES if sizes is None else sizes
    losses: dict[float, Tensor] = {}

    def blocks(size: int) -> Iterator[tuple[Scored, Block]]:
        return blocks_of(heard, key_type, new_window(size))

    def try_out(temperatures: Sequence[float]) -> None:
        total = total_losses(blocks(sizes[-1]), sizes, temperatures)
        losses.update(zip(temperatures, total / len(heard.positions), strict=True))

    if temperatures is not None:
        try_out(temperatures)
    else:
        above, count = spread(blocks(sizes[0])).tolist()
        octave = octave_of(above / count)
        try_out([2.0 ** (octave + more) for more in OCTAVES])
        best = min(losses, key=lambda temperature: losses[temperature].min())
        try_out([best * 2**-0.5, best * 2**0.5])
    tried = sorted(losses)
    table = torch.stack([losses[temperature] for temperature in tried], dim=1)
    by_size = table.flatten(start_dim=1).amin(dim=1)
    row = int(torch.nonzero(by_size <= by_size.min() + NEARLY)[0])
    column, weight = np.unravel_index(int(table[row].argmin()), table[row].shape)
    found = (sizes[row], tried[column], LMBDAS[weight].item(), by_size[row].item())
    return RecentTuning(*found, sizes, tried, table.amin(dim=2).numpy())


def parts_of(heard: Scored) -> Iterator[Scored]:
    """The tokens, `TOKENS_AT_ONCE` at a time, with keys and log-probabilities alone."""
    for first in range(0, len(heard.positions), TOKENS_AT_ONCE):
        part = slice(first, first + TOKENS_AT_ONCE)
        keys = {name: key[part] for name, key in heard.keys.items()}
        yield Scored(heard.positions[part], heard.targets[part], heard.log_probs[part], keys)


def blocks_of(heard: Scored, key_type: str, window: Window) -> Iterator[tuple[Scored, Block]]:
    """The tokens, block by block, each with the positions that it looks back at."""
    for part in parts_of(heard):
        keys = window.prepared(part.keys[key_type])
        for block in window.look(keys, part.targets):
            columns = (part.positions, part.targets, part.log_probs)
            yield Scored(*(column[block.tokens] for column in columns)), block
        window.append(keys, part.targets)


def spread(blocks: Iterator[tuple[Scored, Block]]) -> Tensor:
    """How far the best score lies above the mean score, summed over the first tokens that look back
    at any position, and the number of these tokens; float64 `[2]`."""
    total = torch.zeros(2, dtype=torch.float64)
    for _, block in blocks:
        if total[1] >= TOKENS_OF_SPREAD:
            break
        missing = block.scores.isneginf()
        some = ~missing.all(dim=1)
        scores, missing = block.scores[some], missing[some]
        below = (scores.amax(dim=1, keepdim=True) - scores).masked_fill_(missing, 0.0)
        above = (below.sum(dim=1) / (~missing).sum(dim=1)).sum()
        total += torch.tensor([above.item(), float(len(scores))], dtype=torch.float64)
    return total


def total_losses(
    blocks: Iterator[tuple[Scored, Block]], sizes: Sequence[int], temperatures: Sequence[float]
) -> Tensor:
    """Summed negative log-likelihoods, float64 `[temperatures, sizes, LMBDAS]`."""
    total = torch.zeros(len(temperatures), len(sizes), len(LMBDAS), dtype=torch.float64)
    for asked, block in blocks:
        targets = asked.targets.to(block.scores.device)
        recent = log_probs_by_size(block, targets, sizes, temperatures).double().cpu()
        lm = asked.log_probs.double()[:, None, None]
        # log p = log(1 - lmbda + lmbda p_recent / p_LM) + log p_LM
        mixed = (1 - LMBDAS + LMBDAS * (recent - lm).exp()[..., None]).log()
        total -= mixed.sum(dim=0) + lm.sum()
    return total


def log_probs_by_size(
    block: Block, targets: Tensor, sizes: Sequence[int], temperatures: Sequence[float]
) -> Tensor:
    """log p of the targets `[n]` by windows of several sizes, fp32 `[n, temperatures, sizes]`.

    Args:
        sizes: numbers of the newest positions, ascending; the last is that of all positions.
    """
    widths = np.diff(sizes, prepend=0).tolist()[::-1]
    n, stretches = len(targets), len(widths)
    # The positions between two sizes are weighed relative to the best among them, and their votes
    # for the target to the best of those, so that no small sum is lost beside a larger one.
    best = torch.stack([part.amax(dim=1) for part in block.scores.split(widths, dim=1)], dim=1)
    repeats = torch.tensor(widths, device=targets.device)
    below = block.scores - best.nan_to_num(neginf=0.0).repeat_interleave(repeats, dim=1)
    hit = (block.columns == block.column_of(targets)[:, None]) & ~block.scores.isneginf()
    rows, columns = torch.nonzero(hit, as_tuple=True)
    cell = rows * stretches + torch.searchsorted(repeats.cumsum(dim=0), columns, right=True)
    hit_scores = block.scores[rows, columns]
    best_hit = hit_scores.new_full((n * stretches,), -torch.inf)
    best_hit.scatter_reduce_(0, cell, hit_scores, "amax")
    below_hit = hit_scores - best_hit[cell]

    def weights(below: Tensor, temperature: float) -> Tensor:
        return (below / temperature).clamp_(min=LIGHTEST).exp_()

    result = []
    for temperature in temperatures:
        parts = weights(below, temperature).split(widths, dim=1)
        sums = torch.stack([part.sum(dim=1) for part in parts], dim=1)
        hits = torch.zeros_like(best_hit).scatter_add_(0, cell, weights(below_hit, temperature))
        total = sums.log() + best / temperature
        of_target = (hits.log() + best_hit / temperature).view(n, stretches)
        newest = [x.flip(1).logcumsumexp(dim=1) for x in (of_target, total)]
        result.append(torch.where(newest[0].isneginf(), -torch.inf, newest[0] - newest[1]))
    return torch.stack(result, dim=1)
