"""What kNN-LM gains over its model by classes of tokens, with bootstrap intervals: the figures, and
how people read them, as Markdown; `gains_picture` draws them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from neighborlm.common.errors import InputError
from neighborlm.programs.calibration import Favourites, calibration, calibration_error
from neighborlm.programs.kept_text import FREQUENCIES
from neighborlm.programs.reports import as_markdown
from neighborlm.retrieval.memories.slices import (
    FEWEST_BLOCKS,
    MARGIN,
    Interval,
    Slices,
    compared,
    gain_intervals,
    gains,
)

LM = "LM"
"""What gains are over."""
RARE = 0.2
"""Share of a text that its rarest tokens are to make up, as nearly as the bands allow."""


class Way(NamedTuple):
    """A kNN-LM.

    Attributes:
        lmbda: weight of p_kNN.
        temperature: divides the scores.
        losses: fp64 `[n]`, of every token, in nats.
        favourites: its most probable tokens; None where they are not known.
    """

    lmbda: float
    temperature: float
    losses: np.ndarray
    favourites: Favourites | None = None


# -- what is found -------------------------------------------------------------------------------


def findings(
    of_lm: np.ndarray,
    ways: Mapping[str, Way],
    classes: Sequence[Slices],
    block: int,
    favourites: Favourites | None = None,
) -> dict[str, Any]:
    """The figures of a report, JSON-able.

    Args:
        of_lm: fp64 `[n]`, losses of the model.
        ways: one or two, by name, of the same n tokens.
        classes: of these tokens, those by frequency first.
        block: tokens of a block that the bootstrap draws.
        favourites: of the model; None where they are not known.

    Raises:
        InputError: a way gives a token probability 0.
    """
    losses = {LM: of_lm} | {name: way.losses for name, way in ways.items()}
    for name, loss in losses.items():
        if not np.isfinite(loss).all():
            zeros = int((~np.isfinite(loss)).sum())
            raise InputError(
                f"{name} gives {zeros:,} of {len(loss):,} tokens probability 0; expected --lmbda "
                "below 1"
            )
    sure = -(-len(losses[LM]) // block) >= FEWEST_BLOCKS
    whole = Slices("all tokens", ["all tokens"], np.zeros(len(losses[LM]), dtype=np.int64))
    rows = [
        {"by": slices.name, **row}
        for slices in (whole, *classes)
        for row in rows_of(losses, slices, block)
    ]
    perplexities = compared(losses, block)
    found: dict[str, Any] = {"tokens": len(losses[LM]), "block": block}
    found["ways"] = {LM: {"ppl": as_figures(perplexities[LM].ppl, sure)}}
    for name, way in ways.items():
        figures = {
            key: as_figures(value, sure) for key, value in perplexities[name]._asdict().items()
        }
        found["ways"][name] = {"lmbda": way.lmbda, "temperature": way.temperature, **figures}
    if len(ways) == 2:
        one, other = ways
        ratio = compared({one: losses[one], other: losses[other]}, block)[other].relative
        found["against"] = {"of": other, "over": one, "relative": as_figures(ratio, sure)}
    found["slices"] = rows
    found["long_tail"] = long_tail(losses, classes[0], block)
    known = {LM: favourites} | {name: way.favourites for name, way in ways.items()}
    found["calibration"] = {
        name: {"error": calibration_error(parts), "parts": [part._asdict() for part in parts]}
        for name, of in known.items()
        if of is not None
        for parts in [calibration(of)]
    }
    return found


def rows_of(losses: Mapping[str, np.ndarray], slices: Slices, block: int) -> list[dict[str, Any]]:
    """A row for each class that has tokens."""
    intervals = gain_intervals(losses, slices, block)
    return [
        {
            "label": found.label,
            "share": found.share,
            "ppl": float(np.exp(found.loss)),
            "gains": {
                name: {**intervals[name][i]._asdict(), "helped": gain.helped, "hurt": gain.hurt}
                for name, gain in found.gains.items()
            },
        }
        for i, found in enumerate(gains(losses, slices))
        if found.share
    ]


def as_figures(interval: Interval, sure: bool) -> dict[str, float]:
    """An interval; one that was drawn from too few blocks has no ends."""
    ends = interval[1:] if sure else (np.nan, np.nan)
    return dict(zip(Interval._fields, (interval.value, *ends), strict=True))


def long_tail(losses: Mapping[str, np.ndarray], bands: Slices, block: int) -> list[dict[str, Any]]:
    """Whether rare or frequent tokens gain: what kNN-LM gains was found to go to frequent ones
    (Nishida et al., 2025, "Long-Tail Crisis in Nearest Neighbor Language Models").

    Args:
        losses: by way of predicting; the model's first.
        bands: the same tokens by frequency, see `FREQUENCIES`.
        block: tokens of a block that the bootstrap draws.

    Returns:
        For each way the row of the rare tokens and that of all others; none where one band has all
        tokens.
    """
    below = np.cumsum(np.bincount(bands.which, minlength=len(FREQUENCIES)))[:-1] / len(bands.which)
    inside = (below > 0) & (below < 1)
    if not inside.any():
        return []
    cut = int(np.where(inside, np.abs(below - RARE), np.inf).argmin()) + 1
    labels = [f"fewer than {FREQUENCIES[cut]:,} times", f"{FREQUENCIES[cut]:,} times or more"]
    halves = Slices("", labels, (bands.which >= cut).astype(np.int64))
    rare, frequent = rows_of(losses, halves, block)
    return [
        {"way": name, "rarer_than": FREQUENCIES[cut], "share": rare["share"]}
        | {"rare": rare["gains"][name], "frequent": frequent["gains"][name]}
        for name in rare["gains"]
    ]


# -- what is shown -------------------------------------------------------------------------------


def in_words(interval: Mapping[str, float], form: str) -> str:
    """A figure with its interval, where there is one.

    >>> in_words({"value": 0.5, "low": 0.25, "high": float("nan")}, "+.2f")
    '+0.50'
    """
    value, low, high = (format(interval[name], form) for name in Interval._fields)
    return f"{value} ({low} to {high})" if np.isfinite(interval["high"]) else value


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What the figures say: of the long tail, of two caches, of classes that lose."""
    said = []
    for tail in found["long_tail"]:
        rare, frequent = tail["rare"], tail["frequent"]
        if rare["high"] < frequent["low"]:
            verdict = "so the gain goes to frequent tokens (as Nishida et al. found in 2025)"
        elif frequent["high"] < rare["low"]:
            verdict = "so the gain goes to the long tail (unlike Nishida et al., 2025)"
        elif np.isfinite([rare["high"], frequent["high"]]).all():
            verdict = "and as these intervals overlap, neither kind clearly gains more"
        else:
            verdict = "but the text has too few blocks to say how sure that is"
        said.append(
            f"Long tail, {tail['way']}: tokens that the training text has fewer than "
            f"{tail['rarer_than']:,} times ({tail['share']:.0%} of this text) gain "
            f"{in_words(rare, '+.3f')} nats each, all others {in_words(frequent, '+.3f')}, "
            f"{verdict}."
        )
    if not found["long_tail"]:
        said.append("Long tail: all tokens are in one band of frequency.")
    for name in [name for name in found["ways"] if name != LM]:
        lost = [
            f"{row['by']}: {row['label']} ({in_words(row['gains'][name], '+.3f')})"
            for row in found["slices"]
            if row["gains"][name]["high"] < 0
        ]
        said.append(f"Classes that surely lose by {name}: {'; '.join(lost) or 'none'}.")
    if "against" in found:
        of = found["against"]
        said.append(
            f"The perplexity of {of['of']} is {in_words(of['relative'], '.4f')} times that of "
            f"{of['over']}."
        )
    return said


def markdown(found: Mapping[str, Any]) -> str:
    """The report as people read it."""
    ways = [name for name in found["ways"] if name != LM]
    rows = [[LM, "", "", in_words(found["ways"][LM]["ppl"], ".2f"), ""]]
    for name in ways:
        of = found["ways"][name]
        setting = (f"{of['lmbda']:.3g}", f"{of['temperature']:.3g}")
        rows.append([name, *setting, in_words(of["ppl"], ".2f"), in_words(of["relative"], ".3f")])
    columns = ["", "lmbda", "temperature", "perplexity", "relative to the LM"]
    lines, before = [], None
    for row in found["slices"]:
        if row["by"] != before and row["by"] != row["label"]:
            lines.append([f"**{row['by']}**", *[""] * (2 + 2 * len(ways))])
        before = row["by"]
        cells = [row["label"], f"{row['share']:.1%}", f"{row['ppl']:,.1f}"]
        for gain in row["gains"].values():
            cells += [in_words(gain, "+.3f"), f"{gain['helped']:.0%}, {gain['hurt']:.0%}"]
        lines.append(cells)
    of_ways = [cell for name in ways for cell in (name, "helped, hurt")]
    return (
        "\n\n".join(
            [
                f"# What neighbours change: {found['corpus']}, {found['split']} split",
                "\n".join(f"* {sentence}" for sentence in sentences(found)),
                as_markdown(columns, rows),
                "Nats by which the loss of a token falls, by what the token is:",
                as_markdown(["", "tokens", "perplexity of the LM", *of_ways], lines),
                f"{found['tokens']:,} tokens. In brackets are 95% intervals of a paired bootstrap "
                f"over blocks of {found['block']} tokens; a class with tokens in fewer than "
                f"{FEWEST_BLOCKS} blocks has none. Helped and hurt are the shares of tokens whose "
                f"loss falls or rises by more than {MARGIN} nats.",
                *calibration_as_markdown(found["calibration"]),
            ]
        )
        + "\n"
    )


def calibration_as_markdown(found: Mapping[str, Any]) -> list[str]:
    """Paragraphs of how often the favourites were right, none where that is not known."""
    if not found:
        return []
    columns = ["probability of the favourite"]
    columns += [cell for name in found for cell in (f"{name}: tokens", "said", "right")]
    parts = list(zip(*(of["parts"] for of in found.values()), strict=True))
    lows = [row[0]["low"] for row in parts]
    rows = [
        [
            f"{low:.1f} to {high:.1f}",
            *(
                format(part[name], form) if part["share"] else ""
                for part in row
                for name, form in (("share", ".1%"), ("said", ".3f"), ("right", ".3f"))
            ),
        ]
        for row, low, high in zip(parts, lows, [*lows[1:], 1.0], strict=True)
    ]
    errors = "; ".join(f"{name} {of['error']:.4f}" for name, of in found.items())
    return [
        "Calibration, the probability that the most probable token was given against how often it "
        "was right:",
        as_markdown(columns, rows),
        "Expected calibration error, by how much the two differ over all tokens (Guo et al., ICML "
        f"2017): {errors}.",
    ]
