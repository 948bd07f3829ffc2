"""Reads the tokens of a page from a cache of what was retrieved, without the model and without a
search."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.programs.kept_text import kept_scores, matched_suffixes
from neighborlm.programs.page.tokens import (
    OCCURRENCES,
    OtherResult,
    PageNeighbors,
    PageTokens,
    chosen,
    compared_with,
    mixture_ranks,
    most_probable,
    most_probable_of_model,
)
from neighborlm.retrieval.memories.cache import RetrievalCache
from neighborlm.retrieval.memories.knn import knn_weights, weighted_scores


def kept_tokens(
    cache: RetrievalCache,
    data: LMDataModule,
    which: str,
    neighbors: int,
    lmbda: float,
    temperature: float,
    suffix_array: Path | None = None,
) -> PageTokens:
    """What a page shows of the model and its neighbours.

    Args:
        cache: of a split.
        data: its corpus.
        which: tokens, see `tokens.chosen`.
        neighbors: of a token, at most.
        lmbda: weight of p_kNN.
        temperature: divides the neighbours' scores.
        suffix_array: of the training text, see `kept_text.matched_suffixes`; None for a page
            without matched suffixes.

    Raises:
        InputError: the cache keeps no rows or no candidates of the model.
    """
    split = cache.manifest["made_from"]["split"]
    if cache.rows is None or cache.top_ids is None:
        raise InputError(
            f"{cache.path}: keeps no rows of neighbours and no candidates of the model, as it "
            "was made by an earlier version; remove it and evaluate anew with --knn.cache"
        )
    positions, of_lm, of_knn = scores = kept_scores(cache, temperature)
    gain = scores.mixture(lmbda) - of_lm
    shown = chosen(which, gain, positions, data.stream(split).line_starts)
    positions = positions[shown]
    targets = cache.targets[positions].astype(np.int64)
    scores, values = torch.from_numpy(cache.scores[positions]), cache.values[positions]
    counts = None if cache.weights is None else cache.weights[positions].astype(np.float32)
    if counts is not None:
        scores = weighted_scores(scores, torch.from_numpy(counts), temperature)
    shares = knn_weights(scores, temperature).numpy()
    knn = most_probable(values.astype(np.int64), shares, targets)
    top_ids = cache.top_ids[positions].astype(np.int64)
    top_log_probs = cache.top_log_probs[positions]
    model = most_probable_of_model(top_ids, top_log_probs, targets)
    mixed = lmbda * np.exp(of_knn[shown]) + (1 - lmbda) * np.exp(of_lm[shown])
    of_model = (1 - lmbda) * np.exp(top_log_probs.astype(np.float64))
    ranks = mixture_ranks(
        *map(torch.from_numpy, (targets, mixed)),
        (torch.from_numpy(top_ids), torch.from_numpy(of_model)),
        [(torch.from_numpy(values.astype(np.int64)), lmbda * torch.from_numpy(shares))],
    )
    alone = cache.alone_log_prob
    page = PageTokens(
        positions,
        targets,
        {"lm": of_lm[shown], "knn": of_knn[shown]},
        {"lm": np.full(len(positions), 1 - lmbda), "knn": np.full(len(positions), lmbda)},
        True,
        {"lm": model, "knn": knn},
        PageNeighbors(
            cache.scores[positions, :neighbors],
            cache.rows[positions, :neighbors].astype(np.int64),
            values[:, :neighbors].astype(np.int64),
            None if counts is None else counts[:, :neighbors],
            temperature,
            cache.k,
        ),
        lm_alone=None if alone is None else alone[positions].astype(np.float64),
        entropy=cache.entropy[positions].astype(np.float64),
        ranks=ranks,
        model_top=top_ids.shape[1],
    )
    if suffix_array is not None:
        array, matches = matched_suffixes(data, split, positions, suffix_array)
        places = array.occurrences(matches, OCCURRENCES)
        page = replace(page, suffix_lengths=matches.lengths, occurrences=places)
    return page.in_classes(data, split)


def compared_with_cache(
    page: PageTokens, cache: RetrievalCache, lmbda: float, temperature: float
) -> PageTokens:
    """The page beside what another cache of the split gives, such as one that was retrieved with
    distances of another kind.

    Args:
        cache: the other one.
        lmbda: weight of its p_kNN.
        temperature: divides its scores.

    Raises:
        InputError: it lacks a token of the page, or has another one there.
    """
    scores = kept_scores(cache, temperature)
    base = "LM" if cache.alone_log_prob is None else "GNN-LM"
    said = {"lm": scores.lm, "knn": scores.knn, "mixture": scores.mixture(lmbda)}
    other = OtherResult(cache.path.parent.name, base, said)
    targets = cache.targets[scores.positions].astype(np.int64)
    return compared_with(page, scores.positions, targets, other)
