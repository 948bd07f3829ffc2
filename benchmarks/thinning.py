"""What smaller datastores cost and save: share of the entries, bytes of keys, values and weights,
perplexity and speed of the kNN-LM.

    neighborlm datastore merge-entries --source DIR --output MERGED
    neighborlm datastore thin --source DIR --output HALF --share .5
    python -m benchmarks.thinning --datastores '[DIR, MERGED, HALF]' \\
        --valid DATASTORE --valid_scores scores.npz --test DATASTORE --test_scores scores.npz

Temperature and weight of p_kNN are fitted on `valid` for every datastore and applied to `test`; the
texts are given as `benchmarks.automaton` takes them. Indexes that are missing are built.
"""

import json
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from benchmarks.automaton import Text, ask_knn, mixed
from neighborlm.callbacks.index_builder import IndexBuilder
from neighborlm.common.contracts import NProbe
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.retrieval.search.index import Search, open_retriever
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.thinning import open_weights

TEMPERATURES = (1.0, 3.0, 10.0, 30.0)


def figures(
    path: Path, valid: Text, test: Text, k: int, index: str, nprobe: NProbe
) -> dict[str, float]:
    """What a datastore takes and gives."""
    datastore = Datastore.open(path)
    search = Search(index, nprobe=nprobe)
    IndexBuilder(path, search).build()
    retriever = open_retriever(datastore, search)
    retriever.prepare()
    asked = {
        temperature: ask_knn(datastore, retriever, k, temperature, valid)
        for temperature in TEMPERATURES
    }
    perplexity = {
        temperature: mixed(valid, said, valid, said)["perplexity"]
        for temperature, said in asked.items()
    }
    temperature = min(perplexity, key=perplexity.__getitem__)
    on_test = ask_knn(datastore, retriever, k, temperature, test)
    weights = open_weights(datastore)
    arrays = [datastore.keys, datastore.values] + ([] if weights is None else [weights])
    return {
        **mixed(valid, asked[temperature], test, on_test),
        "temperature": temperature,
        "keys": datastore.n_keys,
        "bytes": sum(array.nbytes for array in arrays),
    }


def run(
    datastores: list[Path],
    valid: Path,
    valid_scores: Path,
    test: Path,
    test_scores: Path,
    k: int = 1024,
    index: str = "auto",
    nprobe: NProbe = "auto",
    limit: int = 1 << 40,
    output: Path | None = None,
) -> None:
    """Prints a table, and writes it.

    Args:
        datastores: to be compared, the whole one first.
        valid: datastore of the split that is fitted on.
        valid_scores: the LM's of it.
        test: datastore of the split that is evaluated.
        test_scores: the LM's of it.
        k: neighbours of a search.
        index: see --knn.index.
        nprobe: see --knn.nprobe.
        limit: tokens of either split.
        output: JSON file for the figures.
    """
    texts = [
        Text.read(Datastore.open(store), scores, limit)
        for store, scores in ((valid, valid_scores), (test, test_scores))
    ]
    rows = {str(path): figures(path, *texts, k, index, nprobe) for path in datastores}
    whole = rows[str(datastores[0])]["keys"]
    columns = ("kept", "MB", "temperature", "weight", "perplexity")
    speeds = ("tokens per second", "processor ms a token")
    table = Table("datastore", *columns, *speeds)
    for name, row in rows.items():
        table.add_row(
            Path(name).name,
            f"{row['keys'] / whole:.1%}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['temperature']:g}",
            f"{row['weight']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{len(texts[1]) / row['seconds']:,.0f}",
            f"{1000 * row['processor_seconds'] / len(texts[1]):.2f}",
        )
    Console().print(table)
    if output is not None:
        output.write_text(json.dumps({"tokens": len(texts[1]), "rows": rows}, indent=1) + "\n")


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Parses the command line."""
    auto_cli(run, args=args, as_positional=False)


if __name__ == "__main__":
    main()
