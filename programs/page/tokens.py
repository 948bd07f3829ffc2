"""What a page shows of its tokens, as arrays, and which tokens it shows."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.programs.kept_text import slices_of
from neighborlm.retrieval.memories.slices import Slices

CANDIDATES = 10
"""Most probable tokens of each source that a page lists."""
MODEL_TOP = 1024
"""Most probable tokens that a model is asked for, so that ranks are known up to about there."""
CELLS = 1 << 22
"""Probabilities that are compared with a target's at a time."""
TIE = 1e-6
"""Share by which one probability must exceed another to count as larger."""
OCCURRENCES = 4
"""Places of the training text that a page shows of a matched suffix."""


class Candidates(NamedTuple):
    """What a source says of n tokens besides their own probability.

    Attributes:
        ids: int64 `[n, CANDIDATES]`, its most probable tokens, the most probable first; -1 where it
            has fewer.
        probs: fp32 `[n, CANDIDATES]`, their probabilities, 0 where it has fewer.
        ranks: int64 `[n]`, place of the target among all tokens, 1 for the most probable; 0 where
            it is not known, or the source gives it no probability.
    """

    ids: np.ndarray
    probs: np.ndarray
    ranks: np.ndarray


class PageNeighbors(NamedTuple):
    """The neighbours of n tokens, nearest first.

    Attributes:
        scores: fp32 `[n, k]`, larger is nearer, -inf where missing.
        rows: int64 `[n, k]`, of the training text, -1 where missing.
        values: int64 `[n, k]`, the tokens that followed.
        counts: fp32 `[n, k]`, how many entries each stands for; None where all for themselves.
        temperature: divides the scores.
        k: neighbours that were evaluated with; the page has the nearest of them.
    """

    scores: np.ndarray
    rows: np.ndarray
    values: np.ndarray
    counts: np.ndarray | None
    temperature: float
    k: int


class OtherResult(NamedTuple):
    """What another evaluation says of n tokens.

    Attributes:
        name: what it is called.
        base: `LM` or `GNN-LM`, what its memories are mixed with.
        log_probs: natural-log probability of each token by source, and under `mixture` by all,
            fp64 `[n]`.
    """

    name: str
    base: str
    log_probs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PageTokens:
    """The tokens of a page, in the order of the text. The sources are the model, under `lm`, and
    the memories.

    Attributes:
        positions: int64 `[n]`, in the split.
        targets: int64 `[n]`, the tokens.
        log_probs: by source, fp64 `[n]`, natural-log probability of each token.
        weights: by source, fp64 `[n]`, as evaluated.
        constant: whether the weights are the same for all tokens.
        candidates: by source.
        neighbors: of the memory `knn`, if it is there.
        suffix_lengths: int64 `[n]`, tokens of the longest suffix of the context that the training
            text has; None without n-grams.
        occurrences: int64 `[n, OCCURRENCES]`, rows of the training text that follow that suffix.
        lm_alone: fp64 `[n]`, of the LM on which a graph network stands.
        entropy: fp64 `[n]`, of the model's distribution, in nats.
        ranks: int64 `[n]`, place of the token under the mixture, see `mixture_ranks`.
        model_top: most probable tokens that the model was asked for.
        slices: classes of the tokens.
        other: another result for the same tokens, to compare with.
    """

    positions: np.ndarray
    targets: np.ndarray
    log_probs: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    constant: bool
    candidates: Mapping[str, Candidates]
    neighbors: PageNeighbors | None = None
    suffix_lengths: np.ndarray | None = None
    occurrences: np.ndarray | None = None
    lm_alone: np.ndarray | None = None
    entropy: np.ndarray | None = None
    ranks: np.ndarray | None = None
    model_top: int = 0
    slices: Sequence[Slices] = field(default_factory=tuple)
    other: OtherResult | None = None

    def in_classes(self, data: LMDataModule, split: str | None) -> "PageTokens":
        """The same page with classes of its tokens, see `programs.kept_text.slices_of`.

        Args:
            data: the corpus.
            split: that they are of; None for a text of its own.
        """
        nearest = None if self.neighbors is None else -self.neighbors.scores[:, 0]
        positions = None if split is None else self.positions
        known = (nearest, self.entropy, self.suffix_lengths)
        return replace(self, slices=slices_of(data, self.targets, split, positions, *known))


def most_probable(ids: np.ndarray, probs: np.ndarray, targets: np.ndarray) -> Candidates:
    """The candidates of a memory that says of each token only some ids, possibly several times.

    Args:
        ids: int64 `[n, m]`.
        probs: fp32 `[n, m]`, which add up where an id stands several times.
        targets: int64 `[n]`.
    """
    n, m = ids.shape
    order = np.argsort(ids, axis=1, kind="stable")
    ids, probs = np.take_along_axis(ids, order, 1), np.take_along_axis(probs, order, 1)
    begins = np.ones((n, m), dtype=bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    group = np.cumsum(begins.ravel()) - 1
    sums = np.bincount(group, weights=probs.ravel().astype(np.float64), minlength=group.size)
    summed = np.where(begins, sums[group].reshape(n, m), 0.0)
    best = np.argsort(-summed, axis=1, kind="stable")[:, :CANDIDATES]
    top, top_ids = np.take_along_axis(summed, best, 1), np.take_along_axis(ids, best, 1)
    own = np.where(ids == targets[:, None], summed, 0.0).max(axis=1, initial=0.0)
    ranks = np.where(own > 0, 1 + (summed > own[:, None]).sum(axis=1), 0)
    width = ((0, 0), (0, CANDIDATES - top.shape[1]))
    top_ids = np.pad(np.where(top > 0, top_ids, -1), width, constant_values=-1)
    return Candidates(top_ids, np.pad(top, width).astype(np.float32), ranks)


def most_probable_of_model(
    ids: np.ndarray, log_probs: np.ndarray, targets: np.ndarray
) -> Candidates:
    """The candidates of a model that says only its most probable ones `[n, top]`, in their
    order."""
    same = ids == targets[:, None]
    ranks = np.where(same.any(axis=1), 1 + same.argmax(axis=1), 0)
    probs = np.exp(log_probs.astype(np.float32))
    return Candidates(ids[:, :CANDIDATES], probs[:, :CANDIDATES], ranks)


def mixture_ranks(
    targets: Tensor,
    probs: Tensor,
    model: tuple[Tensor, Tensor],
    memories: Sequence[tuple[Tensor, Tensor]],
) -> np.ndarray:
    """The place of each target among all tokens of the vocabulary under a mixture; ties share one.

    What the model says of a token that is not among its most probable ones is not known, but at
    most what it says of the last of these: where that decides, there is only a lower bound.

    Args:
        targets: int64 `[n]`.
        probs: fp64 `[n]`, theirs under the mixture.
        model: its most probable tokens, int64 `[n, top]`, most probable first, and their
            probabilities times its weight, fp64 `[n, top]`.
        memories: the same of each, `[n, m]`, with all tokens that it does not give probability 0;
            one that stands there several times has the sum, and one of share 0 may be -1.

    Returns:
        int64 `[n]`, 1 for the most probable token; -r where the place is r or larger; 0 for a
        target of probability 0.

    >>> model = torch.tensor([[2, 0]]), torch.tensor([[0.4, 0.2]], dtype=torch.float64)
    >>> memory = torch.tensor([[1, 3]]), torch.tensor([[0.25, 0.15]], dtype=torch.float64)
    >>> mixture_ranks(torch.tensor([1]), torch.tensor([0.45]), model, [memory])
    array([1])
    >>> mixture_ranks(torch.tensor([1]), torch.tensor([0.25]), model, [memory])  # token 3: unknown
    array([-2])
    """
    width = 1 + max(int(ids.max()) for ids in (targets, *(ids for ids, _ in (model, *memories))))
    columns = (targets[:, None], probs[:, None], *model, *(x for of in memories for x in of))
    found = []
    for rows in zip(*(column.split(max(CELLS // width, 1)) for column in columns), strict=True):
        target, own, ids, shares, *others = rows
        mixed = torch.zeros(len(target), width, dtype=torch.float64)
        for of_memory, its_shares in zip(others[::2], others[1::2], strict=True):
            mixed.scatter_add_(1, of_memory.clamp(min=0), its_shares.double())
        mixed.scatter_add_(1, ids, shares)
        unknown = torch.ones(mixed.shape, dtype=torch.bool).scatter_(1, ids, False)
        unknown.scatter_(1, target, False)
        mixed.scatter_(1, target, 0.0)
        limit, rest = own * (1 + TIE), shares[:, -1:]
        least = 1 + (mixed > limit).sum(dim=1, keepdim=True)
        most = 1 + (mixed + rest * unknown > limit).sum(dim=1, keepdim=True)
        is_exact = (least == most) & (rest <= limit)
        found.append(torch.where(is_exact, least, -least) * (own > 0))
    return torch.cat(found)[:, 0].numpy()


def compared_with(
    page: PageTokens, positions: np.ndarray, targets: np.ndarray, other: OtherResult
) -> PageTokens:
    """The page beside another result.

    Args:
        positions: int64 `[m]`, of the other's tokens in the split, ascending.
        targets: int64 `[m]`, these tokens.
        other: what it says of all of them.

    Raises:
        InputError: it lacks a token of the page, or has another one there.
    """
    at = np.searchsorted(positions, page.positions)
    inside = at < len(positions)
    at = np.where(inside, at, 0)
    same = inside & (positions[at] == page.positions) & (targets[at] == page.targets)
    if not same.all():
        missing = int(page.positions[~same][0])
        raise InputError(
            f"{other.name}: lacks token {missing} of the page; expected a result "
            "for the same part of this split"
        )
    of_page = {name: column[at] for name, column in other.log_probs.items()}
    return replace(page, other=other._replace(log_probs=of_page))


def compared_with_scores(page: PageTokens, path: Path) -> PageTokens:
    """The page beside the result of another evaluation.

    Args:
        path: of its `--token_scores`.

    Raises:
        InputError: it cannot be read, or see `compared_with`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        positions, targets, lm = columns["position"], columns["target"], columns["lm_log_prob"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(
            f"{path}: {error}; expected the --token_scores of another evaluation of this split"
        ) from None
    base = "GNN-LM" if "gnn_log_prob" in columns else "LM"
    lm = columns.pop("gnn_log_prob", lm)
    said = {"lm": lm, "mixture": columns.pop("log_prob", lm)}
    for name, column in columns.items():
        if name.endswith("_log_prob") and name != "lm_log_prob" and column.ndim == 1:
            said[name.removesuffix("_log_prob")] = column
    said = {name: column.astype(np.float64) for name, column in said.items()}
    return compared_with(page, positions, targets, OtherResult(path.name, base, said))


# -- which tokens --------------------------------------------------------------------------------

WAYS = (r"[1-9]\d*", r"(\d+):(\d+)", r"gains:([1-9]\d*)")
"""How tokens are chosen, see `chosen`."""


def check_choice(which: str) -> None:
    """Raises InputError where tokens cannot be chosen so."""
    if not any(re.fullmatch(way, which) for way in WAYS):
        raise InputError(
            f"--page_tokens is {which}; expected a number of tokens, a range such as 100:600, or "
            "gains: and a number of tokens"
        )


def chosen(
    which: str, gains: np.ndarray | None, positions: np.ndarray, line_starts: np.ndarray
) -> np.ndarray:
    """Which scored tokens a page shows, bool `[n]`.

    Args:
        which: `N`, the first so many; `A:B`, those from position A to below B; `gains:N`, whole
            lines, those with the largest gains of the mixture, up to so many tokens.
        gains: fp64 `[n]`, nats that the mixture gains over the model; for `gains:N` alone.
        positions: int64 `[n]`, of the scored tokens, ascending.
        line_starts: int64 `[lines + 1]`, of the split.

    Raises:
        InputError: it is none of these, or holds no token.
    """
    check_choice(which)
    first, span, best = (re.fullmatch(way, which) for way in WAYS)
    if first:
        found = np.arange(len(positions)) < int(which)
    elif span:
        found = (positions >= int(span[1])) & (positions < int(span[2]))
    else:
        found = with_largest_gains(gains, positions, line_starts, int(best[1]))
    if not found.any():
        raise InputError(f"--page_tokens {which}: holds none of the {len(positions):,} tokens")
    return found


def with_largest_gains(
    gains: np.ndarray, positions: np.ndarray, line_starts: np.ndarray, most: int
) -> np.ndarray:
    """The tokens of the lines whose gains add up to the most; at least one line."""
    line = np.searchsorted(line_starts, positions, side="right") - 1
    _, line = np.unique(line, return_inverse=True)
    order = np.argsort(-np.bincount(line, weights=gains), kind="stable")
    enough = np.cumsum(np.bincount(line)[order]) <= most
    enough[0] = True
    return np.isin(line, order[enough])
