"""`neighborlm datastore ...`: lists datastores, verifies them, deals them into shards and merges
these, makes smaller ones, and takes over those of the original programs."""

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse import auto_cli

from neighborlm.callbacks.neighbor_table_writer import NeighborTableWriter
from neighborlm.common.contracts import NProbe
from neighborlm.common.errors import InputError
from neighborlm.common.progress import progress_bars
from neighborlm.common.units import size_of
from neighborlm.originals.raw_datastore import import_datastore
from neighborlm.programs.arguments import ToolParser
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import check_writable
from neighborlm.programs.verification import FORMATS, Found, products_at, verify_product
from neighborlm.retrieval.neighbors.tables import NeighborTable
from neighborlm.retrieval.search import Search
from neighborlm.retrieval.store.artifact import Artifact, refuse_mismatch
from neighborlm.retrieval.store.datastore import (
    DTYPES,
    FORMAT,
    Datastore,
    fingerprint_of,
    read_datastore_manifest,
    shard_paths,
)
from neighborlm.retrieval.store.maintenance import (
    deal_again,
    put_together,
    record_checksums,
)
from neighborlm.retrieval.store.shards import BLOCK_ROWS, Kind
from neighborlm.retrieval.store.thinning import (
    merged,
    open_weights,
    random_rows,
    write_thinned,
)

STATES = {
    "whole": "is as it was written",
    "unfinished": "is unfinished",
    "unknown": "has no checksums, as it was made by an earlier version",
}
"""What is said of a product that is not damaged."""

# -- looking -------------------------------------------------------------------------------------


def below(folder: Path) -> Iterator[Path]:
    """Directories of the datastores under a folder, without the shards of a whole that is there."""
    for path in sorted(folder.rglob("manifest.json")):
        text = path.read_text(encoding="utf-8", errors="replace")
        of_a_whole = '"shard": {' in text and (path.parent.parent / "manifest.json").exists()
        if f'"kind": "{FORMAT.kind}"' in text and not of_a_whole:
            yield path.parent


def state_of(path: Path, manifest: dict[str, Any]) -> str:
    """`complete`, or what is missing."""
    shards = shard_paths(path, manifest)
    missing = [str(number) for number, shard in enumerate(shards) if not shard.is_dir()]
    if missing:
        return f"without shard {', '.join(missing)}"
    if Datastore.is_complete(path):
        return "complete"
    written = sum(_written_rows(shard) for shard in shards or [path])
    return f"unfinished, {100 * written // manifest['rows']} % written"


def _written_rows(path: Path) -> int:
    if Datastore.is_complete(path):
        return read_datastore_manifest(path)["rows"]
    marks = path / "written.npy"
    return int(np.count_nonzero(np.load(marks, mmap_mode="r"))) if marks.exists() else 0


def line_of(path: Path) -> str:
    """A datastore in one line."""
    manifest = read_datastore_manifest(path)
    rows, dim, made_from = manifest["rows"], manifest["dim"], manifest["made_from"]
    row_bytes = dim * DTYPES[manifest["dtype"]].itemsize
    size = rows * (row_bytes + np.dtype(manifest["value_dtype"]).itemsize)
    parts = [f"{path}: {rows:,} rows x {dim} {manifest['dtype']}", size_of(size)]
    if "shards" in manifest:
        parts.append(f"{len(manifest['shards'])} shards {manifest['placement']}")
    if "shard" in manifest:
        parts.append(f"shard {manifest['shard']['number']} of {manifest['shard']['of']}")
    parts.append(state_of(path, manifest))
    told = ("split", "key_type", "model")
    return ", ".join(parts + [f"{name} {made_from[name]}" for name in told if name in made_from])


# -- the program ---------------------------------------------------------------------------------


def other_line_of(product: Found) -> str:
    """An index, a neighbour table or another product in one line."""
    artifact = Artifact(FORMATS[product.kind], product.path, product.name)
    files = artifact.read().get("files", {}).values()
    size = [size_of(sum(file["bytes"] for file in files))] if files else []
    state = "complete" if artifact.is_complete() else "unfinished"
    return ", ".join([f"{product.name}: {product.kind}", *size, state])


def list_datastores(path: Path) -> None:
    """Prints a line for every datastore under a folder, and for every index, neighbour table and
    other product that was made of one or of a text.

    Args:
        path: the folder, searched with all folders in it.

    Raises:
        InputError: it is no folder.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "no such folder"
        raise InputError(f"--path {path}: {found}; expected a folder with datastores below it")
    listed = [(place, line_of, place) for place in below(path)]
    with suppress(InputError):  # there is none
        listed += [
            (found.path, other_line_of, found)
            for found in products_at(path)
            if found.kind in set(FORMATS) - {FORMAT.kind}
        ]
    for _, line, product in sorted(listed, key=lambda one: one[0]):
        try:
            print(line(product))
        except InputError as error:
            print(error)


def show(path: Path) -> None:
    """Prints the manifest of a datastore and its state, as JSON.

    Args:
        path: its directory, with a manifest.json.
    """
    manifest = read_datastore_manifest(path)
    described = {
        **manifest,
        "fingerprint": fingerprint_of(manifest),
        "state": state_of(path, manifest),
    }
    print(json.dumps(described, indent=1))


def verify(path: Path, record: bool = False) -> None:
    """Compares products with the checksums that they were written with, and names what is damaged.

    Args:
        path: a datastore with all that is made of it; a file of an index, a neighbour table or
            codes; a cache, a run with its checkpoints; or any folder of such.
        record: give checksums to a datastore or shard that has none, instead of refusing it; for
            those of earlier versions.
    """
    if record:
        with progress_bars(str(path), transient=True) as report:
            record_checksums(Datastore.open(path), partial(report, "recording"))
    products, damages = products_at(path), []
    for product in products:
        try:
            with progress_bars(str(product.name), transient=True) as report:
                state = verify_product(product, report)
            print(f"{product.name}: {STATES[state]}")
        except InputError as damage:
            damages.append(damage)
    for damage in damages[1:]:
        print(damage)
    if damages:
        raise damages[0]


def split(
    source: Path,
    output: Path,
    shards: int,
    placement: Kind = "contiguous",
    block_rows: int = BLOCK_ROWS,
) -> None:
    """Copies a datastore into shards; repeated, it goes on where it stopped.

    Args:
        source: directory of a datastore, in one piece or of other shards.
        output: directory of the copy.
        shards: how many; one for each disk or host.
        placement: contiguous gives each shard a stretch of the text, round_robin a part of every
            stretch, with which fewer neighbours need be sent between hosts.
        block_rows: consecutive rows that lie together where they are dealt round_robin.
    """
    _copy(source, output, shards, placement, block_rows)


def merge(source: Path, output: Path) -> None:
    """Copies the shards of a datastore into one directory; repeated, it goes on where it stopped.

    Args:
        source: directory of a datastore of shards.
        output: directory of the copy.
    """
    _copy(source, output, 1, "contiguous", BLOCK_ROWS)


def _copy(source: Path, output: Path, shards: int, kind: Kind, block_rows: int) -> None:
    for name, value in (("shards", shards), ("block_rows", block_rows)):
        if value < 1:
            raise InputError(f"--{name} is {value}; expected at least 1")
    check_writable(output, "--output", "folder")
    opened = Datastore.open(source)
    if open_weights(opened) is not None:
        raise InputError(
            f"{source}: its entries were merged, and their weights are not dealt into shards; "
            "expected the datastore that it was made from, or another one"
        )
    with progress_bars(str(output)) as report:
        told = partial(report, "copying")
        made = deal_again(opened, output, shards, kind, block_rows, told)
    print(line_of(made.path))


def assemble(shards: list[Path], output: Path) -> None:
    """Makes one datastore of shards where they lie; copies nothing.

    Args:
        shards: their directories, as '[DIR, DIR]'.
        output: directory for the manifest of the whole; give it again after moving shards.
    """
    check_writable(output, "--output", "folder")
    print(line_of(put_together(shards, output).path))


def take_over(
    source: Path,
    output: Path,
    size: int | None = None,
    dim: int | None = None,
    dtype: Literal["fp16", "fp32"] | None = None,
    vocab_size: int | None = None,
) -> None:
    """Makes a datastore of the raw maps of an original program; copies nothing.

    Args:
        source: prefix of _keys.npy and _vals.npy (kNN-LM), or a directory with an info.json
            (GNN-LM).
        output: directory for the manifest.
        size: number of rows, where there is no info.json: --dstore-size of the original.
        dim: width of the keys, where there is no info.json.
        dtype: of the keys; by default what the size of the file implies.
        vocab_size: of the dictionary, to check the values against; by default they are not checked.
    """
    check_writable(output, "--output", "folder")
    datastore = import_datastore(source, output, size, dim, dtype, vocab_size)
    print(f"datastore: {output}, {len(datastore):,} rows of {datastore.dim}")
    if len(datastore.masked):
        print(f"{len(datastore.masked):,} rows that are zeros or not finite are masked")


def merge_entries(
    source: Path,
    output: Path,
    k: int = 8,
    seed: int = 1,
    index: str = "auto",
    nprobe: NProbe = 32,
    table: Path | None = None,
) -> None:
    """Makes a smaller datastore by merging near entries of one value.

    One entry stays and counts for all that were merged into it. Repeated, the command goes on where
    it stopped.

    Args:
        source: directory of a datastore.
        output: directory of the new one.
        k: nearest entries that each may take over; more make it smaller.
        seed: of the order in which entries take over others.
        index: how the source is searched for the neighbours of its own entries; see --knn.index.
        nprobe: inverted lists that such a search visits; see --knn.nprobe.
        table: neighbour table of the source in itself; by default one is made.
    """
    check_writable(output, "--output", "folder")
    opened = Datastore.open(source)
    if table is None:
        search = Search(index, nprobe=nprobe)
        found = NeighborTableWriter(source, source, search, k, exclude_window=1).build()
    else:
        found = NeighborTable.open(table)
        itself = {"queries": opened.fingerprint, "memory": opened.fingerprint}
        refuse_mismatch(found.path, found.manifest, itself)
    described = {"method": "merged", "k": k, "seed": seed, "metric": found.manifest["metric"]}
    with progress_bars(str(output)) as report:
        weights = merged(opened, found.nearest(k), seed, partial(report, "merging"))
        rows = np.flatnonzero(weights)
        told = partial(report, "copying")
        made = write_thinned(opened, output, rows, described, weights[rows], told)
    print(f"{line_of(made.path)}, {len(made) / opened.n_keys:.1%} of {source}")


def thin(source: Path, output: Path, share: float, seed: int = 1) -> None:
    """Makes a smaller datastore of random entries; repeated, it goes on where it stopped.

    Args:
        source: directory of a datastore.
        output: directory of the new one.
        share: share of the entries that is kept, such as .5.
        seed: of the draw of these entries.
    """
    check_writable(output, "--output", "folder")
    opened = Datastore.open(source)
    rows = random_rows(opened, share, seed)
    described = {"method": "random", "share": share, "seed": seed}
    with progress_bars(str(output)) as report:
        made = write_thinned(opened, output, rows, described, report=partial(report, "copying"))
    print(f"{line_of(made.path)}, {len(made) / opened.n_keys:.1%} of {source}")


COMMANDS = {
    "list": list_datastores,
    "show": show,
    "verify": verify,
    "split": split,
    "merge": merge,
    "assemble": assemble,
    "import": take_over,
    "merge-entries": merge_entries,
    "thin": thin,
}


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Looks at datastores, verifies, merges and splits them, and takes over those of the original
    programs.

    neighborlm datastore list --path datastores
    neighborlm datastore show --path datastores/text/train
    neighborlm datastore verify --path datastores/text/train
    neighborlm datastore split --source datastores/text/train --output DIR --shards 4
    neighborlm datastore merge --source DIR --output DIR
    neighborlm datastore assemble --shards '[DIR, DIR]' --output DIR
    neighborlm datastore import --source PREFIX --output DIR --size N --dim D
    neighborlm datastore merge-entries --source DIR --output DIR --k 8
    neighborlm datastore thin --source DIR --output DIR --share .5
    """
    auto_cli(
        COMMANDS,
        args=args,
        parser_class=ToolParser,
        as_positional=False,
        prog="neighborlm datastore",
        description="Looks at datastores, verifies, splits, merges and assembles them, and takes "
        "over those of the original programs.",
    )
