"""Maintains existing datastores: verifies them by checksums, deals them into other shards or into
one directory, and assembles shards that lie apart."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from neighborlm.common.errors import InputError
from neighborlm.retrieval.store.arrays import save_array
from neighborlm.retrieval.store.artifact import SYNC_SECONDS
from neighborlm.retrieval.store.checksums import (
    checksums,
    describe_checksums,
    layout_of_checksums,
    rows_of_chunk,
)
from neighborlm.retrieval.store.datastore import (
    BLOCK_BYTES,
    SMALL_FILES,
    Datastore,
    artifact_of,
    check_shard,
    shard_paths,
)
from neighborlm.retrieval.store.sharded_builder import new_datastore
from neighborlm.retrieval.store.shards import BLOCK_ROWS, Kind, Placement

Report = Callable[[int, int], None]
"""Is called with the number of rows that are done, and the number of all."""


def shards_of(datastore: Datastore) -> list[Datastore]:
    """The ordinary datastores that a datastore consists of; itself where it has no shards."""
    paths = shard_paths(datastore.path, datastore.manifest)
    return [Datastore.open(path) for path in paths] or [datastore]


# -- checksums -----------------------------------------------------------------------------------


def verify_datastore(datastore: Datastore, report: Report = lambda *_: None) -> None:
    """Reads a datastore and compares it with its checksums.

    Raises:
        InputError: it has none, or is damaged; names the first damaged file and its rows.
    """
    shards = shards_of(datastore)
    total, before = sum(map(len, shards)), 0
    for shard in shards:
        shard.verify(lambda done, _, before=before: report(before + done, total))
        before += len(shard)


def record_checksums(datastore: Datastore, report: Report = lambda *_: None) -> None:
    """Records checksums of a datastore that has none: an old one, or another program's."""
    for shard in shards_of(datastore):
        if "checksums" in shard.manifest:
            continue
        rows = rows_of_chunk(shard.dim * shard.keys.dtype.itemsize)
        layout = layout_of_checksums(len(shard), rows)
        sums = np.zeros(layout.shape, layout.dtype)
        for chunk, found in checksums((shard.keys, shard.values), rows, range(len(sums))):
            sums[chunk] = found
            report(min((chunk + 1) * rows, len(shard)), len(shard))
        artifact = artifact_of(shard.path)
        with artifact.lock():
            save_array(shard.path / "checksums.npy", sums)
            fields = {**shard.manifest, "checksums": describe_checksums(rows, shard.masked)}
            small = (shard.path / name for name in SMALL_FILES)
            artifact.write(fields, complete=True, files=filter(Path.is_file, small))


# -- merging and splitting -----------------------------------------------------------------------


def deal_again(
    source: Datastore,
    output: Path,
    shards: int,
    kind: Kind = "contiguous",
    block_rows: int = BLOCK_ROWS,
    report: Report = lambda *_: None,
) -> Datastore:
    """Copies a datastore into so many shards, or into one directory; goes on where a killed copy
    stopped.

    Args:
        source: of any number of shards.
        output: directory of the copy.
        shards: how many it is to have; 1 for an ordinary datastore.
        kind: how rows are dealt.
        block_rows: of `round_robin`.
        report: called with how many rows are copied, and how many there are.

    Raises:
        InputError: something else is there, or a disk has no room.
    """
    manifest = source.manifest
    vocab_size = manifest.get("vocab_size") or _largest_value(source) + 1
    builder = new_datastore(
        output,
        len(source),
        source.dim,
        manifest["dtype"],
        vocab_size,
        manifest["made_from"],
        source.masked,
        shards,
        kind,
        block_rows=block_rows,
    )
    step = _step(source)
    last_sync = time.perf_counter()
    report(0, len(source))
    for first in range(0, len(source), step):
        rows = np.arange(first, min(first + step, len(source)))
        if not builder.is_written(rows):
            builder.write(rows, source.keys[first : first + step], source.values[rows])
        if time.perf_counter() - last_sync > SYNC_SECONDS:
            builder.sync()
            last_sync = time.perf_counter()
        report(int(rows[-1]) + 1, len(source))
    builder.sync()
    return builder.finish()


def _step(source: Datastore) -> int:
    return max(BLOCK_BYTES // (4 * source.dim), 1)


def _largest_value(source: Datastore) -> int:
    return max(int(source.values[i : i + (1 << 24)].max()) for i in range(0, len(source), 1 << 24))


def put_together(shards: list[Path], output: Path) -> Datastore:
    """Writes the manifest of the datastore that some shards make up; copies nothing.

    Args:
        shards: their directories, in any order.
        output: directory for the manifest of the whole.

    Raises:
        InputError: they are not shards, not of one datastore, or some are missing.
    """
    if not shards:
        raise InputError("--shards: names none; expected all shards of a datastore")
    found = sorted(map(_as_shard, shards), key=lambda shard: shard.manifest["shard"]["number"])
    first = found[0].manifest
    placement = Placement.from_shard(first["shard"])
    numbers = [shard.manifest["shard"]["number"] for shard in found]
    if numbers != list(range(placement.shards)):
        raise InputError(
            f"--shards: are the numbers {numbers} of {placement.shards}; expected each once"
        )
    for number, shard in enumerate(found):
        check_shard(shard.path, shard.manifest, first, placement.described(number))
    fields = ("dim", "dtype", "value_dtype", "vocab_size", "made_from")
    described = {
        **{name: first[name] for name in fields},
        "rows": placement.rows,
        "masked": sum(len(shard.masked) for shard in found),
        "placement": placement.kind,
        "block_rows": placement.block_rows,
        "shards": [{"path": _path_from(output, shard.path)} for shard in found],
    }
    output.mkdir(parents=True, exist_ok=True)
    artifact = artifact_of(output)
    with artifact.lock():
        _refuse_another(output, described)
        artifact.write(described, complete=True)
    return Datastore.open(output)


def _as_shard(path: Path) -> Datastore:
    opened = Datastore.open(path)
    if "shard" not in opened.manifest:
        raise InputError(f"{path}: is a whole datastore; expected a shard of one")
    return opened


def _path_from(output: Path, shard: Path) -> str:
    """Relative where the shard lies in the directory of the whole, so that both can be moved."""
    shard, output = Path(os.path.abspath(shard)), Path(os.path.abspath(output))
    return str(shard.relative_to(output)) if shard.is_relative_to(output) else str(shard)


def _refuse_another(output: Path, described: dict[str, Any]) -> None:
    """Refuses a directory with another datastore; its shards may have moved."""
    artifact = artifact_of(output)
    if not artifact.exists():
        return
    found = artifact.read()
    same = ("made_from", "rows", "dim", "dtype", "masked", "placement", "block_rows")
    if "shards" not in found or any(found[name] != described[name] for name in same):
        raise InputError(f"{output}: already holds another datastore; expected none")
