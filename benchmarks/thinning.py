"""What smaller datastores and narrower indexes cost and save: share of the entries, bytes,
perplexity and speed of the kNN-LM (He et al., EMNLP 2021).

    python -m benchmarks.thinning --base.corpus FOLDER --output thinning.json

A small LM of the first words of a corpus, its datastore, that datastore merged and thinned, and
indexes of its keys projected to fewer dimensions are made where they are missing. Temperature and
weight of p_kNN are fitted on the validation text for each of them, and applied to the test text.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from jsonargparse import auto_cli
from rich.console import Console

from benchmarks.measuring import environment, new_table
from benchmarks.texts import Base, Text, ask, mixed
from neighborlm.callbacks.index_builder import IndexBuilder
from neighborlm.callbacks.neighbor_table_writer import NeighborTableWriter
from neighborlm.common.contracts import NProbe
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.programs.settings import KNNSettings
from neighborlm.retrieval.memories.knn_memory import KNNMemory
from neighborlm.retrieval.search.index import (
    Search,
    index_path,
    is_factory,
    open_retriever,
    resolve,
)
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.thinning import open_weights
from neighborlm.tools.datastore import merge_entries, thin

TEMPERATURES = (3.0, 10.0, 30.0)


class Memory(NamedTuple):
    """A datastore, how it is searched, and where the distances that weigh votes come from."""

    name: str
    datastore: Datastore
    index: str
    distances: Literal["exact", "index"] = "exact"


def smaller(
    whole: Datastore, index: str, merged: list[int], random: list[float], pca: list[int]
) -> list[Memory]:
    """The whole datastore, and all smaller ones beside it, made where they are missing.

    Args:
        index: how those are searched that have all dimensions.
        merged: nearest entries that each may take over.
        random: shares that are kept.
        pca: dimensions that keys are projected to.
    """
    found, beside = [Memory("all entries", whole, index)], whole.path.parent

    def made(name: str) -> Path:
        return beside / f"{whole.path.name}-{name}"

    if merged:
        search = Search(index)
        IndexBuilder(whole.path, search).build()
        table = NeighborTableWriter(whole.path, whole.path, search, max(merged), 1).build().path
    for k in merged:
        path = made(f"merged-{k}")
        if not Datastore.is_complete(path):
            merge_entries(whole.path, path, k, table=table)
        found.append(Memory(f"merged, k {k}", Datastore.open(path), index))
    for share in random:
        path = made(f"random-{share:g}")
        if not Datastore.is_complete(path):
            thin(whole.path, path, share)
        found.append(Memory(f"random, {share:.0%}", Datastore.open(path), index))
    searched = resolve(whole, index)
    for width in pca:
        factory = f"PCA{width},{searched if is_factory(searched) else 'Flat'}"
        for distances in ("exact", "index"):
            name = f"PCA to {width}, distances {distances}"
            found.append(Memory(name, whole, factory, distances))
    return found


def figures(memory: Memory, valid: Text, test: Text, k: int, nprobe: NProbe) -> dict[str, float]:
    """What a memory takes and gives. Where distances are the index's own, nobody reads the keys."""
    datastore, search = memory.datastore, Search(memory.index, nprobe=nprobe)
    IndexBuilder(datastore.path, search).build()
    retriever = open_retriever(datastore, search)
    asked = {}

    def knn(temperature: float) -> KNNMemory:
        return KNNMemory(datastore, retriever, k, temperature, distances=memory.distances)

    knn(1.0).prepare()
    for temperature in TEMPERATURES:
        asked[temperature] = ask(knn(temperature), valid)
    perplexity = {t: mixed(valid, said, valid, said)["perplexity"] for t, said in asked.items()}
    temperature = min(perplexity, key=perplexity.__getitem__)
    on_test = ask(knn(temperature), test)
    weights, factory = open_weights(datastore), resolve(datastore, memory.index)
    arrays = [datastore.values] + ([] if weights is None else [weights])
    arrays += [datastore.keys] if memory.distances == "exact" else []
    index = index_path(datastore, factory, search.metric) if is_factory(factory) else None
    return {
        **mixed(valid, asked[temperature], test, on_test),
        "temperature": temperature,
        "keys": datastore.n_keys,
        "bytes": sum(array.nbytes for array in arrays),
        "index_bytes": index.stat().st_size if index else 0,
    }


def run(
    base: Base,
    merged: list[int] = [2, 8, 32, 100],  # noqa: B006
    random: list[float] = [0.8, 0.6, 0.4, 0.2],  # noqa: B006
    pca: list[int] = [64, 32],  # noqa: B006
    k: int = 1024,
    index: str = "auto",
    nprobe: NProbe = "auto",
    output: Path | None = None,
) -> None:
    """Prints a table, and writes it.

    Args:
        base: the LM and its texts.
        merged: nearest entries that each may take over, for each merged datastore.
        random: shares of the entries that are kept, for each thinned one.
        pca: dimensions that keys are projected to, for each index that does so.
        k: neighbours of a search.
        index: see --knn.index; those of projected keys have the same lists.
        nprobe: see --knn.nprobe.
        output: JSON file for the figures.
    """
    check_writable(output, "--output")
    whole = base.subject.products(KNNSettings(index=index)).ensure_datastore("train")
    valid, test = base.texts("valid"), base.texts("test")
    memories = smaller(whole, index, merged, random, pca)
    rows = {memory.name: figures(memory, valid, test, k, nprobe) for memory in memories}
    title = f"{whole.n_keys:,} keys of {whole.dim} dimensions, {len(test):,} tokens"
    columns = ("kept", "MB", "index MB", "T", "weight", "ppl", "tokens/s", "core ms/token")
    table = new_table(title, *columns)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['keys'] / whole.n_keys:.1%}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['index_bytes'] / 1e6:.0f}",
            f"{row['temperature']:g}",
            f"{row['weight']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{len(test) / row['seconds']:,.0f}",
            f"{1000 * row['processor_seconds'] / len(test):.2f}",
        )
    Console(markup=False).print(table)
    if output is not None:
        said = {"tokens": len(test), "rows": rows, "environment": environment(0)}
        write_all({output: as_json(said)})


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Parses the command line."""
    auto_cli(run, args=args, as_positional=False)


if __name__ == "__main__":
    main()
