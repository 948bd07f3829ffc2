"""Which tokens of a text gain by their neighbours and which lose, from a cache and without the
model.

    neighborlm report --cache DIR/test --output report.md --output report.json

Prints what kNN-LM gains over the model by classes of tokens, with bootstrap intervals, and whether
rare or frequent tokens gain. With `--against`, another cache of the same text stands beside
it, such as one that was retrieved with `--knn.distances index`.
"""

from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from neighborlm.common.errors import InputError
from neighborlm.programs.arguments import OneSentence
from neighborlm.programs.calibration import favourites
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.gains_picture import picture
from neighborlm.programs.gains_report import Way, findings, markdown
from neighborlm.programs.kept_text import (
    add_mixture_flags,
    check_mixture_flags,
    corpus_of,
    kept_scores,
    matched_suffixes,
    mixed_by,
    slices_of,
)
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.retrieval.memories.cache import RetrievalCache
from neighborlm.retrieval.memories.slices import BLOCK
from neighborlm.retrieval.store.artifact import refuse_mismatch

SUFFIXES = (".md", ".json", ".png")
OF_MODEL = ("model", "dictionary", "corpus", "split", "break_mode", "tokens_per_sample")
OF_MODEL += ("context_window", "drop_long_lines", "precision", "neighbors")
"""What decides on what the model says of a text; two caches must have it in common."""
OF_SEARCH = ("distances", "index", "nprobe", "metric", "similarity", "key_type")
OF_SEARCH += ("rescore_key_type", "min_context", "missing")
"""What decides on the neighbours, and may differ."""

ROUNDING = 0.05
"""Nats by which the same model may differ from itself on other devices and in other batches."""


def parsed(args: list[str] | None) -> Namespace:
    """The command line, and all about it that can be wrong before a cache is opened."""
    parser = OneSentence(
        "neighborlm report",
        description="Says which tokens of a text gain by their neighbours and which lose, with "
        "bootstrap intervals, from a cache of evaluate.py --knnlm --knn.cache DIR.",
    )
    add = parser.add_argument
    add("--cache", type=Path, required=True, help="DIR/<split> of --knn.cache DIR")
    add(
        "--against",
        type=Path,
        help="another cache of the same text and model, to compare with; such as one that was "
        "made with --knn.distances index",
    )
    add(
        "--output",
        type=Path,
        action="append",
        default=[],
        help="a file to write, .md, .json or .png; may be given several times",
    )
    add_mixture_flags(parser)
    add(
        "--block",
        type=int,
        default=BLOCK,
        help=f"tokens of a block that the bootstrap draws (default: {BLOCK})",
    )
    options = parser.parse_args(args)
    check_mixture_flags(options)
    if options.block < 1:
        raise InputError(f"--block is {options.block}; expected at least 1")
    for path in options.output:
        if path.suffix not in SUFFIXES:
            raise InputError(f"--output {path}: expected a name that ends in .md, .json or .png")
        if path.suffix == ".png" and find_spec("matplotlib") is None:
            raise InputError(
                f"--output {path} needs matplotlib, which is not installed; expected it from "
                'pip install -c constraints.txt -e ".[plot]"'
            )
        check_writable(path, "--output")
    return options


def opened(options: Namespace) -> list[RetrievalCache]:
    """The cache, and the one that it is compared with.

    Raises:
        InputError: one cannot be used, or they are not of the same text and model.
    """
    cache = RetrievalCache.open(options.cache)
    if options.against is None:
        return [cache]
    other = RetrievalCache.open(options.against)
    common = {key: cache.manifest["made_from"].get(key) for key in OF_MODEL}
    advice = f"it is compared with {options.cache}"
    refuse_mismatch(f"--against {other.path}", other.manifest["made_from"], common, advice)
    scored = [~np.isnan(of.lm_log_prob) for of in (cache, other)]
    if not np.array_equal(*scored):
        counts = f"{scored[1].sum()} scored tokens, and {options.cache} {scored[0].sum()}"
        raise InputError(
            f"--against {other.path}: has {counts}; expected the same part of the split"
        )
    apart = float(np.nanmax(np.abs(cache.lm_log_prob - other.lm_log_prob), initial=0))
    if apart > ROUNDING:
        raise InputError(
            f"--against {other.path}: the model's log-probabilities differ by up to {apart:.3g} "
            f"from those in {options.cache}; expected the same"
        )
    return [cache, other]


def names_of(caches: Sequence[RetrievalCache]) -> list[str]:
    """`kNN-LM`, with what tells two caches apart: settings of the search, or their places."""
    if len(caches) == 1:
        return ["kNN-LM"]
    settings = [{**cache.manifest["made_from"], "k": cache.k} for cache in caches]
    differing = [key for key in ("k", *OF_SEARCH) if settings[0].get(key) != settings[1].get(key)]
    if not differing:
        if caches[0].path.resolve() == caches[1].path.resolve():
            raise InputError(f"--against {caches[1].path}: is --cache itself; expected another")
        return [f"kNN-LM, {cache.path}" for cache in caches]
    described = (
        ", ".join(f"{key.replace('_', ' ')} {of.get(key)}" for key in differing) for of in settings
    )
    return [f"kNN-LM, {which}" for which in described]


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    options = parsed(args)
    caches = opened(options)
    names = names_of(caches)
    data, split = corpus_of(caches[0]), caches[0].manifest["made_from"]["split"]
    ways = {}
    for name, cache in zip(names, caches, strict=True):
        lmbda, temperature = mixed_by(cache, options)
        scores = kept_scores(cache, temperature)
        of_model, own = favourites(cache, lmbda, temperature) or (None, None)
        ways[name] = Way(lmbda, temperature, -scores.mixture(lmbda), own)
    cache = caches[0]
    lm, positions = cache.lm_log_prob[scores.positions].astype(np.float64), scores.positions
    nearest = -cache.scores[positions, 0].astype(np.float64)
    entropy = None if cache.entropy is None else cache.entropy[positions]
    targets = cache.targets[positions].astype(np.int64)
    lengths = None
    if options.suffix_array is not None:
        _, matches = matched_suffixes(data, split, positions, options.suffix_array)
        lengths = matches.lengths
    classes = slices_of(data, targets, split, positions, nearest, entropy, lengths)
    about = {"cache": options.cache, "corpus": data.name, "split": split}
    if options.against is not None:
        about["other_cache"] = options.against
    found = about | findings(-lm, ways, classes, options.block, of_model)
    text = markdown(found)
    print(text)
    making = {".md": text.encode, ".json": lambda: as_json(found), ".png": lambda: picture(found)}
    write_all({path: making[path.suffix]() for path in options.output})
    if options.output:
        print(f"report: {', '.join(map(str, options.output))}")
