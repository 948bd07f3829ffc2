"""A text as a cache of what was retrieved knows it, without the model and without a search: its
corpus, what the model and its neighbours say of every token, and classes of tokens. Pages and
reports are made of them."""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from neighborlm.common.errors import InputError
from neighborlm.datamodules.binarized import CorpusSettings
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.programs.places import check_folder
from neighborlm.retrieval.memories.cache import RetrievalCache
from neighborlm.retrieval.memories.knn_memory import opinion_from_cache
from neighborlm.retrieval.memories.mixers import mixture
from neighborlm.retrieval.memories.slices import (
    Slices,
    by_bands,
    by_quantiles,
    by_truth,
    in_repeats,
)
from neighborlm.retrieval.memories.suffix_array import Matches, SuffixArray
from neighborlm.retrieval.memories.tuning import tune
from neighborlm.retrieval.store.arrays import token_counts

FREQUENCIES = (0, 1, 10, 100, 1000, 10_000)
"""Where the bands of tokens by frequency in the training text begin."""
REPEATED = 8
"""Tokens of a passage that counts as repeated."""

# -- the corpus, and how it is mixed -------------------------------------------------------------


def corpus_of(cache: RetrievalCache) -> CorpusDataModule:
    """The text that a cache is of.

    Raises:
        InputError: the cache does not say which, or the text has changed since.
    """
    text = cache.manifest.get("text")
    if not text:
        raise InputError(
            f"{cache.path}: does not say where its text is, as it was made by an earlier version; "
            "remove it and evaluate anew with --knn.cache"
        )
    known = CorpusSettings.__dataclass_fields__.keys() - {"window", "threshold"}
    settings = {name: text[name] for name in known & text.keys()}
    data = CorpusDataModule(**settings, threshold=int(text["threshold"]), tokens_per_sample=None)
    made_from = cache.manifest["made_from"]
    if made_from["corpus"] != data.fingerprint(made_from["split"]):
        raise InputError(f"{cache.path}: is of another text than {data.settings.corpus} has now")
    return data


def add_mixture_flags(parser: argparse.ArgumentParser) -> None:
    """`--lmbda` and `--temperature`, and what else is said of a text, see `check_mixture_flags`,
    `mixed_by` and `matched_suffixes`."""
    add = parser.add_argument
    add("--lmbda", type=float, help="weight of p_kNN (default: the best for DIR/valid)")
    add("--temperature", type=float, help="divides scores (default: the best for DIR/valid)")
    add(
        "--suffix_array",
        type=Path,
        help="the suffix array of the training text, such as "
        "datastores/NAME/train-suffix_array, which is made if it is missing: tells how much of "
        "each context the training text has",
    )


def check_mixture_flags(options: argparse.Namespace) -> None:
    """Raises InputError where lmbda and temperature are not both numbers that can be mixed by, or
    both missing, or a suffix array cannot lie where it is said to."""
    if (options.lmbda is None) != (options.temperature is None):
        raise InputError("--lmbda and --temperature: one is missing; expected both or none")
    if options.lmbda is not None and not 0 <= options.lmbda <= 1:
        raise InputError(f"--lmbda is {options.lmbda}; expected a number from 0 to 1")
    if options.temperature is not None and not 0 < options.temperature < np.inf:
        raise InputError(f"--temperature is {options.temperature}; expected more than 0")
    if options.suffix_array is not None:
        check_folder(options.suffix_array, "--suffix_array")


def mixed_by(cache: RetrievalCache, options: argparse.Namespace) -> tuple[float, float]:
    """The lmbda and temperature that are given, or the best of both for the validation split, from
    the cache beside this one.

    Raises:
        InputError: none are given, and there is no such cache.
    """
    if options.lmbda is not None:
        return options.lmbda, options.temperature
    beside = cache.path.parent / "valid"
    if beside.resolve() == cache.path.resolve() or not RetrievalCache.is_complete(beside):
        raise InputError(
            f"{beside}: is no other cache to tune on; expected --lmbda and --temperature"
        )
    tuned = tune(RetrievalCache.open(beside).nearest(cache.k))
    return tuned.lmbda, tuned.temperature


# -- its tokens ----------------------------------------------------------------------------------


class KeptScores(NamedTuple):
    """What a cache says of its n scored tokens, in the order of the text.

    Attributes:
        positions: int64 `[n]`, in the split.
        lm: fp64 `[n]`, natural-log probability under the model.
        knn: fp64 `[n]`, under the neighbours, -inf where none has the token.
    """

    positions: np.ndarray
    lm: np.ndarray
    knn: np.ndarray

    def mixture(self, lmbda: float) -> np.ndarray:
        """Log-probabilities fp64 `[n]` under kNN-LM, `lmbda * p_kNN + (1 - lmbda) * p_LM`
        (Khandelwal et al., ICLR 2020, equation 3)."""
        parts = torch.from_numpy(self.lm), torch.from_numpy(self.knn)
        return mixture(parts, (1 - lmbda, lmbda)).numpy()


def kept_scores(cache: RetrievalCache, temperature: float) -> KeptScores:
    """Reads a cache block by block.

    Raises:
        InputError: it has no scored token.
    """
    if cache.n_scored == 0:
        raise InputError(f"{cache.path}: holds no scored token; expected some")
    similarity = cache.manifest["made_from"]["similarity"]
    columns = []
    for block in cache.blocks():
        knn = opinion_from_cache(block, temperature, similarity).log_probs.double()
        columns.append((block.positions.numpy(), block.lm_log_prob.double().numpy(), knn.numpy()))
    return KeptScores(*map(np.concatenate, zip(*columns, strict=True)))


def matched_suffixes(
    data: LMDataModule, split: str, positions: np.ndarray, path: Path
) -> tuple[SuffixArray, Matches]:
    """The longest suffix of each context that the training text has, followed by a token.

    Args:
        data: the corpus.
        split: of the tokens.
        positions: int64 `[n]`, of the tokens in the split.
        path: of the training text's suffix array, which is built unless it is there.

    Raises:
        InputError: what lies there is of another text.
    """
    made_from = {"corpus": data.fingerprint("train"), "dictionary": data.dictionary.fingerprint}
    train = data.stream("train").tokens
    array = SuffixArray.ensure(path, train, data.vocab_size, made_from)
    return array, array.longest(np.asarray(data.stream(split).tokens).reshape(-1), positions)


def slices_of(
    data: LMDataModule,
    targets: np.ndarray,
    split: str | None = None,
    positions: np.ndarray | None = None,
    nearest: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
    suffix_lengths: np.ndarray | None = None,
) -> list[Slices]:
    """Classes of n tokens; those by frequency in the training text come first.

    Args:
        data: the corpus.
        targets: int64 `[n]`, the tokens.
        split: that they are of; None for a text of its own.
        positions: int64 `[n]`, of the tokens in the split; None for a text of its own.
        nearest: `[n]`, distance of the nearest neighbour, infinite where there is none.
        entropy: `[n]`, of the model's distribution, in nats.
        suffix_lengths: int64 `[n]`, tokens of the longest suffix of the context that the training
            text has.
    """
    counts = token_counts(data.stream("train").tokens, data.vocab_size)[targets]
    found = [by_bands("times in the training text", counts, FREQUENCIES)]
    if suffix_lengths is not None:
        edges = [0, 2, 3, 5, 9]
        found.append(by_bands("longest suffix in the training text", suffix_lengths, edges))
    if nearest is not None:
        found.append(by_quantiles("nearest distance", nearest))
    if entropy is not None:
        found.append(by_quantiles("entropy of the model, nats", entropy))
    if split is None:
        return found
    stream = data.stream(split)
    line = np.searchsorted(stream.line_starts, positions, side="right") - 1
    place = positions - stream.line_starts[line]
    found.append(by_bands("place in its line", place, [0, 1, 8, 32, 128]))
    repeated = in_repeats(np.asarray(stream.tokens), REPEATED)[positions]
    name = f"in a passage of {REPEATED} tokens that the text has had before"
    return [*found, by_truth(name, repeated, "no", "yes")]
