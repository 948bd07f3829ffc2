"""Learning rates as functions of the number of updates: the schedules of fairseq, which the papers
use."""

import math


def cosine(
    update: int,
    *,
    peak: float,
    floor: float,
    warmup_updates: int,
    warmup_init: float,
    period: int,
    t_mult: float,
    shrink: float,
) -> float:
    """Linear warm-up to `peak`, then cosine annealing with restarts (Loshchilov & Hutter, ICLR
    2017, eq. 5): period i is `t_mult**i` times as long as the first, and its peak and floor are
    `shrink**i` times the first ones."""
    if update < warmup_updates:
        return warmup_init + (peak - warmup_init) * update / warmup_updates
    done = update - warmup_updates
    if t_mult == 1:
        i = done // period
        length, begin = period, i * period
    else:
        i = math.floor(math.log(1 - done / period * (1 - t_mult), t_mult))
        # A logarithm rounded down would give the first update of a period the floor of the last.
        i += done >= period * (1 - t_mult ** (i + 1)) / (1 - t_mult)
        length = period * t_mult**i
        begin = period * (1 - t_mult**i) / (1 - t_mult)
    low, high = floor * shrink**i, peak * shrink**i
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * (done - begin) / length))


def inverse_sqrt(update: int, *, peak: float, warmup_updates: int, warmup_init: float) -> float:
    """Linear warm-up to `peak`, then decay with the inverse square root of the number of updates
    (Vaswani et al., 2017, eq. 3)."""
    if update < warmup_updates:
        return warmup_init + (peak - warmup_init) * update / warmup_updates
    return peak * math.sqrt(max(warmup_updates, 1) / max(update, 1))
