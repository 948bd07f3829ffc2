"""Where memories help and where they hurt: perplexities of several ways of predicting one text, how
sure their differences are, and what they gain by what a token is.

All of it is arithmetic on columns that an evaluation keeps of every token, in the order of the text
(`Evaluated.scores`). A *loss* is -log p of a token, in nats.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

BLOCK, SAMPLES = 500, 1000
"""Tokens of a block, and bootstrap samples."""
MARGIN = 0.01
"""Nats by which a token's loss must change to count as helped or hurt."""
FEWEST_BLOCKS = 10
"""Blocks that must have tokens of a class: of fewer, samples say little of the text's chance."""


# -- how sure a difference is --------------------------------------------------------------------


class Interval(NamedTuple):
    """A figure, and the interval that holds most bootstrap samples of it."""

    value: float
    low: float
    high: float


class Compared(NamedTuple):
    """A way of predicting.

    Attributes:
        ppl: its perplexity.
        relative: its perplexity over that of the first way.
    """

    ppl: Interval
    relative: Interval


def compared(
    losses: Mapping[str, np.ndarray],
    block: int = BLOCK,
    samples: int = SAMPLES,
    level: float = 0.95,
    seed: int = 1,
) -> dict[str, Compared]:
    """Perplexities with paired bootstrap intervals. A sample draws blocks of the text with
    replacement, as tokens of a passage are alike (Künsch, Annals of Statistics 1989), and the same
    ones for all ways of predicting, so that what is hard for all does not blur their ratio (Koehn,
    EMNLP 2004).

    Args:
        losses: by way of predicting, `[n]`, finite; the first is what others are relative to.
        block: tokens of a block; the last one has what is left.
        samples: how many are drawn.
        level: share of samples within an interval.
        seed: of what is drawn.

    Raises:
        ValueError: there is no token, or a loss is not finite.
    """
    table = np.stack([np.asarray(column, dtype=np.float64) for column in losses.values()])
    if not table.size or not np.isfinite(table).all():
        raise ValueError("losses of no token, or some that are not finite")
    starts = np.arange(0, table.shape[1], block)
    sums = np.add.reduceat(table, starts, axis=1)
    sizes = np.diff(starts, append=table.shape[1])
    drawn = _drawn(len(starts), samples, seed)
    means = drawn @ sums.T / (drawn @ sizes)[:, None]
    whole = table.mean(axis=1)
    tails = [(1 - level) / 2, (1 + level) / 2]

    def interval(value: float, of_samples: np.ndarray) -> Interval:
        return Interval(*np.exp([value, *np.quantile(of_samples, tails)]).tolist())

    return {
        name: Compared(
            interval(whole[i], means[:, i]),
            interval(whole[i] - whole[0], means[:, i] - means[:, 0]),
        )
        for i, name in enumerate(losses)
    }


def _drawn(blocks: int, samples: int, seed: int) -> np.ndarray:
    """How often each sample has each block, int64 `[samples, blocks]`."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(blocks, np.full(blocks, 1 / blocks), size=samples)


# -- what a token is -----------------------------------------------------------------------------


class Slices(NamedTuple):
    """Classes of tokens.

    Attributes:
        name: what tells them apart.
        labels: of the classes.
        which: int64 `[n]`, the class of each token.
    """

    name: str
    labels: Sequence[str]
    which: np.ndarray


def by_bands(name: str, values: np.ndarray, edges: Sequence[int]) -> Slices:
    """Tokens by whole numbers `[n]`, from each edge to below the next one, and from the last one
    on; the first edge is the smallest number that there can be.

    >>> by_bands("count", np.array([0, 3, 9, 1]), [0, 1, 4])
    Slices(name='count', labels=['0', '1 to 3', '4 or more'], which=array([0, 1, 2, 1]))
    """
    ends = [edge - 1 for edge in edges[1:]]
    labels = [
        f"{first:,}" if first == last else f"{first:,} to {last:,}"
        for first, last in zip(edges, ends, strict=False)
    ]
    labels.append(f"{edges[-1]:,} or more")
    return Slices(name, labels, np.searchsorted(edges, values, side="right") - 1)


def by_quantiles(name: str, values: np.ndarray, parts: int = 4) -> Slices:
    """Tokens by numbers `[n]`, in parts of about as many tokens; equal numbers stay together, and
    those that are not finite have a class of their own, where there are any."""
    finite = np.isfinite(values)
    inner = np.quantile(values[finite], np.arange(1, parts) / parts) if finite.any() else []
    edges = np.unique(inner)
    which = np.searchsorted(edges, np.where(finite, values, 0), side="right")
    ends = [f"{edge:.3g}" for edge in edges]
    labels = [f"{low} to {high}" for low, high in itertools.pairwise(ends)]
    labels = [f"below {ends[0]}", *labels, f"{ends[-1]} or more"] if ends else ["any"]
    if not finite.all():
        which = np.where(finite, which, len(labels))
        labels = [*labels, "none"]
    return Slices(name, labels, which)


def by_truth(name: str, values: np.ndarray, no: str, yes: str) -> Slices:
    """Tokens by bool `[n]`."""
    return Slices(name, [no, yes], values.astype(np.int64))


def in_repeats(text: np.ndarray, length: int = 8) -> np.ndarray:
    """Which tokens lie in a passage of at least `length` tokens that the same text has had before,
    bool `[N]`.

    Args:
        text: integers `[N]`.

    >>> in_repeats(np.array([5, 6, 7, 8, 5, 6, 7, 9]), length=3).astype(int)
    array([0, 0, 0, 0, 1, 1, 1, 0])
    """
    if len(text) < length:
        return np.zeros(len(text), dtype=bool)
    _, first, numbers = np.unique(text, return_index=True, return_inverse=True)
    covered = 1
    while covered < length:  # a number for every passage of so many tokens, from those of two parts
        step = min(covered, length - covered)
        pairs = numbers[: len(numbers) - step] * len(text) + numbers[step:]
        _, first, numbers = np.unique(pairs, return_index=True, return_inverse=True)
        covered += step
    starts = first[numbers] < np.arange(len(numbers))
    begun = np.append(0, np.cumsum(starts))
    at = np.arange(len(text))
    last = np.minimum(at + 1, len(starts))
    return begun[last] > begun[np.minimum(np.maximum(at - length + 1, 0), last)]


# -- what is gained ------------------------------------------------------------------------------


class Gain(NamedTuple):
    """What a way of predicting changes for the tokens of a class.

    Attributes:
        nats: by which it lowers their mean loss.
        helped: share of them whose loss it lowers by more than the margin.
        hurt: share of them whose loss it raises by more than the margin.
    """

    nats: float
    helped: float
    hurt: float


class Slice(NamedTuple):
    """A class of tokens.

    Attributes:
        label: of the class.
        share: of all tokens.
        loss: the mean loss of the first way of predicting; NaN for a class without tokens.
        gains: by the other ways.
    """

    label: str
    share: float
    loss: float
    gains: Mapping[str, Gain]


def gains(losses: Mapping[str, np.ndarray], slices: Slices, margin: float = MARGIN) -> list[Slice]:
    """What every way of predicting gains over the first one, class by class.

    Args:
        losses: by way of predicting, `[n]`.
        slices: of the same tokens.
    """
    count = len(slices.labels)
    tokens = np.bincount(slices.which, minlength=count)

    def mean(column: np.ndarray) -> np.ndarray:
        sums = np.bincount(slices.which, weights=column.astype(np.float64), minlength=count)
        return np.divide(sums, tokens, out=np.full(count, np.nan), where=tokens > 0)

    base, *others = losses
    lowered = {name: losses[base].astype(np.float64) - losses[name] for name in others}
    columns = {
        name: (mean(by), mean(by > margin), mean(by < -margin)) for name, by in lowered.items()
    }
    of_base = mean(losses[base])
    return [
        Slice(
            label,
            tokens[i] / max(tokens.sum(), 1),
            float(of_base[i]),
            {name: Gain(*(float(column[i]) for column in of)) for name, of in columns.items()},
        )
        for i, label in enumerate(slices.labels)
    ]


def gain_intervals(
    losses: Mapping[str, np.ndarray],
    slices: Slices,
    block: int = BLOCK,
    samples: int = SAMPLES,
    level: float = 0.95,
    seed: int = 1,
) -> dict[str, list[Interval]]:
    """How sure the nats of `gains` are, by way of predicting and class; from the same samples of
    blocks as `compared` draws. Ends are NaN for a class with tokens in fewer than `FEWEST_BLOCKS`
    blocks, and all is NaN for one without tokens.

    Args:
        losses: by way of predicting, `[n]`, finite; others are compared with the first.
        slices: of the same tokens.
        block: tokens of a block; the last one has what is left.
        samples: how many are drawn.
        level: share of samples within an interval.
        seed: of what is drawn.
    """
    classes, n = len(slices.labels), len(slices.which)
    blocks = -(-n // block)
    cells = np.arange(n) // block * classes + slices.which

    def summed(column: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(cells, column, blocks * classes).reshape(blocks, classes)

    sizes, drawn = summed(), _drawn(blocks, samples, seed)
    tokens = drawn @ sizes
    tails = [(1 - level) / 2, (1 + level) / 2]
    base, *others = losses
    found = {}
    for name in others:
        lowered = summed(losses[base].astype(np.float64) - losses[name])
        means = np.full(tokens.shape, np.nan)
        np.divide(drawn @ lowered, tokens, out=means, where=tokens > 0)
        ends = np.full((2, classes), np.nan)
        enough = (sizes > 0).sum(axis=0) >= FEWEST_BLOCKS
        ends[:, enough] = np.nanquantile(means[:, enough], tails, axis=0)
        whole = np.full(classes, np.nan)
        np.divide(lowered.sum(axis=0), sizes.sum(axis=0), out=whole, where=sizes.sum(axis=0) > 0)
        found[name] = [Interval(*row) for row in np.vstack([whole, ends]).T.tolist()]
    return found
