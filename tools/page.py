"""A page that shows what was retrieved for a text, from a cache and without the model.

    neighborlm page --cache DIR/test --output page.html

One pass of `evaluate.py --knnlm --knn.cache DIR` makes the cache; what its neighbours say is mixed
with the model by `--lmbda` and `--temperature`, or by the best of both for DIR/valid, which a pass
with `--knn.lmbda auto` keeps beside it.
"""

from argparse import Namespace
from pathlib import Path

from neighborlm.common.errors import InputError
from neighborlm.programs.arguments import OneSentence
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.kept_text import (
    add_mixture_flags,
    check_mixture_flags,
    corpus_of,
    mixed_by,
)
from neighborlm.programs.page import (
    check_choice,
    compared_with_cache,
    compared_with_scores,
    kept_tokens,
    write_page,
)
from neighborlm.programs.places import check_writable
from neighborlm.retrieval.memories.cache import RetrievalCache


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
    add_mixture_flags(parser)
    add(
        "--against",
        type=Path,
        help="another cache of the same split, or the --token_scores of another evaluation, to "
        "compare with",
    )
    options = parser.parse_args(args)
    check_choice(options.tokens)
    if options.neighbors < 1:
        raise InputError(f"--neighbors is {options.neighbors}; expected at least 1")
    check_mixture_flags(options)
    if options.against is not None and not options.against.exists():
        raise InputError(
            f"--against {options.against}: no such file or folder; expected another cache, or the "
            "--token_scores of another evaluation"
        )
    check_writable(options.output, "--output")
    return options


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    options = parsed(args)
    cache = RetrievalCache.open(options.cache)
    data = corpus_of(cache)
    lmbda, temperature = mixed_by(cache, options)
    against = options.against
    other = RetrievalCache.open(against) if against is not None and against.is_dir() else None
    of_other = None if other is None else mixed_by(other, options)
    shown = (options.tokens, options.neighbors, lmbda, temperature, options.suffix_array)
    page = kept_tokens(cache, data, *shown)
    made = f"from {cache.path}; lmbda {lmbda:.3g}, temperature {temperature:.3g}"
    if other is not None:
        page = compared_with_cache(page, other, *of_other)
        made += f"; beside {other.path}; lmbda {of_other[0]:.3g}, temperature {of_other[1]:.3g}"
    elif against is not None:
        page = compared_with_scores(page, against)
    title = f"{data.name}: knn, {cache.manifest['made_from']['split']} split"
    write_page(options.output, page, data, title, made)
    print(f"page: {options.output}, {len(page.positions):,} tokens")
