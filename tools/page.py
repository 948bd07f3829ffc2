"""A page that shows what was retrieved for a text, from a cache and without the model.

    neighborlm page --cache DIR/test --output page.html

One pass of `evaluate.py --knnlm --knn.cache DIR` makes the cache; what its neighbours say is mixed
with the model by `--lmbda` and `--temperature`, or by the best of both for DIR/valid, which a pass
with `--knn.lmbda auto` keeps beside it.
"""

from argparse import Namespace
from pathlib import Path

from neighborlm.common.errors import InputError
from neighborlm.datamodules.binarized import CorpusSettings
from neighborlm.programs.arguments import OneSentence
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.page import check_choice, compared_with, kept_tokens, write_page
from neighborlm.programs.places import check_writable
from neighborlm.retrieval.memories.cache import RetrievalCache
from neighborlm.retrieval.memories.tuning import tune


def parsed(args: list[str] | None) -> Namespace:
    """The command line, and all about it that can be wrong before the cache is opened."""
    parser = OneSentence(
        "neighborlm page",
        description="Writes one HTML file that shows, for every token of a text, what the model "
        "and its neighbours say of it, from a cache of evaluate.py --knnlm --knn.cache DIR.",
    )
    add = parser.add_argument
    add("--cache", type=Path, required=True, help="DIR/<split> of --knn.cache DIR")
    add("--output", type=Path, required=True, help="the .html file to write")
    add("--tokens", default="2000", help="a number, a range such as 100:600, or gains:2000")
    add("--neighbors", type=int, default=16, help="of a token, at most (default: 16)")
    add("--lmbda", type=float, help="weight of p_kNN (default: the best for DIR/valid)")
    add("--temperature", type=float, help="divides scores (default: the best for DIR/valid)")
    add("--against", type=Path, help="--token_scores of another evaluation, to compare with")
    options = parser.parse_args(args)
    check_choice(options.tokens)
    if options.neighbors < 1:
        raise InputError(f"--neighbors is {options.neighbors}; expected at least 1")
    if (options.lmbda is None) != (options.temperature is None):
        raise InputError("--lmbda and --temperature: one is missing; expected both or none")
    if options.lmbda is not None and not 0 <= options.lmbda <= 1:
        raise InputError(f"--lmbda is {options.lmbda}; expected a number from 0 to 1")
    if options.temperature is not None and not options.temperature > 0:
        raise InputError(f"--temperature is {options.temperature}; expected more than 0")
    check_writable(options.output, "--output")
    return options


def best_of_valid(cache: RetrievalCache) -> tuple[float, float]:
    """The best lmbda and temperature for the validation split, from the cache beside this one.

    Raises:
        InputError: there is none, or it is this one.
    """
    beside = cache.path.parent / "valid"
    if beside.resolve() == cache.path.resolve() or not RetrievalCache.is_complete(beside):
        raise InputError(
            f"{beside}: is no other cache to tune on; expected --lmbda and --temperature"
        )
    tuned = tune(RetrievalCache.open(beside).nearest(cache.k))
    return tuned.lmbda, tuned.temperature


def corpus_of(cache: RetrievalCache) -> CorpusDataModule:
    """The text that a cache is of.

    Raises:
        InputError: the cache does not say which.
    """
    text = cache.manifest.get("text")
    if not text:
        raise InputError(
            f"{cache.path}: does not say where its text is, as it was made by an earlier version; "
            "remove it and evaluate anew with --knn.cache"
        )
    known = CorpusSettings.__dataclass_fields__.keys() - {"window", "threshold"}
    settings = {name: text[name] for name in known & text.keys()}
    return CorpusDataModule(**settings, threshold=int(text["threshold"]), tokens_per_sample=None)


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    options = parsed(args)
    cache = RetrievalCache.open(options.cache)
    data = corpus_of(cache)
    given = (options.lmbda, options.temperature)
    lmbda, temperature = best_of_valid(cache) if options.lmbda is None else given
    page = kept_tokens(cache, data, options.tokens, options.neighbors, lmbda, temperature)
    if options.against is not None:
        page = compared_with(page, options.against)
    title = f"{data.name}: knn, {cache.manifest['made_from']['split']} split"
    made = f"from {cache.path}; lmbda {lmbda:.3g}, temperature {temperature:.3g}"
    write_page(options.output, page, data, title, made)
    print(f"page: {options.output}, {len(page.positions)} tokens")
