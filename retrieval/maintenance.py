"""What is done to datastores that exist: they are listed, shown, verified, dealt into other shards,
merged, and put together from shards that lie apart."""

import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from errors import InputError
from retrieval.arrays import open_array
from retrieval.checksums import ALGORITHM, DTYPE, checksum, checksums, rows_of_chunk
from retrieval.datastore import (
    BLOCK_BYTES,
    DTYPES,
    FIELDS,
    KIND,
    SHARDED_VERSION,
    VERSION,
    Datastore,
    check_shard,
    describe_checksums,
    fingerprint_of,
    read_datastore_manifest,
    shard_paths,
)
from retrieval.foreign import import_datastore
from retrieval.manifest import read_manifest, refuse_mismatch, write_manifest
from retrieval.progress import progress_bars
from retrieval.sharded_builder import new_datastore
from retrieval.shards import BLOCK_ROWS, Kind, Placement

SYNC_SECONDS = 10.0
Report = Callable[[int, int], None]
"""What is called with how much is done, and how much there is."""


def shards_of(datastore: Datastore) -> list[Datastore]:
    """The ordinary datastores that one consists of."""
    paths = shard_paths(datastore.path, datastore.manifest)
    return [Datastore.open(path) for path in paths] or [datastore]


# -- checksums -----------------------------------------------------------------------------------


def verify_datastore(datastore: Datastore, report: Report = lambda *_: None) -> None:
    """Reads all of it and compares it with its checksums.

    Raises:
        InputError: it has none, or one sentence that names the first damaged file and its rows.
    """
    shards = shards_of(datastore)
    total, done = sum(map(len, shards)), 0
    for shard in shards:
        if "checksums" not in shard.manifest:
            raise InputError(f"{shard.path}: has no checksums; verify --record true makes them")
    for shard in shards:
        described = shard.manifest["checksums"]
        refuse_mismatch(shard.path, described, {"algorithm": ALGORITHM})
        if checksum(np.asarray(shard.masked)) != described["masked"]:
            raise InputError(f"{shard.path / 'masked.npy'}: is damaged")
        rows = described["rows"]
        shape = (-(-len(shard) // rows), 2)
        expected = open_array(shard.path / "checksums.npy", shape, DTYPE)
        for chunk, found in checksums((shard.keys, shard.values), rows, range(len(expected))):
            first, last = chunk * rows, min((chunk + 1) * rows, len(shard))
            for name, *sums in zip(("keys", "values"), found, expected[chunk], strict=True):
                if sums[0] != sums[1]:
                    raise InputError(
                        f"{_file_of(shard, name)}: rows {first} to {last - 1} are damaged: their "
                        f"checksum is {sums[0]:016x}, expected {sums[1]:016x}"
                    )
            report(done + last, total)
        done += len(shard)


def _file_of(datastore: Datastore, name: str) -> Path:
    if "raw" in datastore.manifest:
        return datastore.path / datastore.manifest["raw"][name]["path"]
    return datastore.path / f"{name}.npy"


def record_checksums(datastore: Datastore, report: Report = lambda *_: None) -> None:
    """Gives checksums to what has none: made before there were any, or by another program."""
    for shard in shards_of(datastore):
        if "checksums" in shard.manifest:
            continue
        rows = rows_of_chunk(shard.dim * shard.keys.dtype.itemsize)
        sums = np.zeros((-(-len(shard) // rows), 2), DTYPE)
        for chunk, found in checksums((shard.keys, shard.values), rows, range(len(sums))):
            sums[chunk] = found
            report(min((chunk + 1) * rows, len(shard)), len(shard))
        np.save(shard.path / "checksums.npy", sums)
        fields = {**shard.manifest, "checksums": describe_checksums(rows, shard.masked)}
        write_manifest(shard.path / "manifest.json", KIND, VERSION, fields)


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
    """Makes one datastore of shards where they lie; nothing is copied.

    Args:
        shards: their directories, in any order.
        output: directory for the manifest of the whole.

    Raises:
        InputError: they are no shards, not of one datastore, or not all of it.
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
        "complete": True,
    }
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".lock"):
        _refuse_another(output, described)
        write_manifest(output / "manifest.json", KIND, SHARDED_VERSION, described)
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
    if not (output / "manifest.json").exists():
        return
    found = read_manifest(output / "manifest.json", KIND, SHARDED_VERSION, FIELDS)
    same = ("made_from", "rows", "dim", "dtype", "masked", "placement", "block_rows")
    if "shards" not in found or any(found[name] != described[name] for name in same):
        raise InputError(f"{output}: already holds another datastore; expected none")


# -- looking -------------------------------------------------------------------------------------


def below(folder: Path) -> Iterator[Path]:
    """Directories of the datastores under a folder, shards of one that is there too left out."""
    for path in sorted(folder.rglob("manifest.json")):
        text = path.read_text(encoding="utf-8", errors="replace")
        of_a_whole = '"shard": {' in text and (path.parent.parent / "manifest.json").exists()
        if f'"kind": "{KIND}"' in text and not of_a_whole:
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
    room = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    parts = [f"{path}: {rows} rows x {dim} {manifest['dtype']}", room]
    if "shards" in manifest:
        parts.append(f"{len(manifest['shards'])} shards {manifest['placement']}")
    if "shard" in manifest:
        parts.append(f"shard {manifest['shard']['number']} of {manifest['shard']['of']}")
    parts.append(state_of(path, manifest))
    told = ("split", "key_type", "model")
    return ", ".join(parts + [f"{name} {made_from[name]}" for name in told if name in made_from])


# -- the program ---------------------------------------------------------------------------------


def list_datastores(path: Path) -> None:
    """Prints a line for every datastore under a folder.

    Args:
        path: the folder.
    """
    for place in below(path):
        try:
            print(line_of(place))
        except InputError as error:
            print(error)


def show(path: Path) -> None:
    """Prints what a datastore is and what it was made from.

    Args:
        path: its directory.
    """
    manifest = read_datastore_manifest(path)
    described = {
        **manifest,
        "fingerprint": fingerprint_of(manifest),
        "state": state_of(path, manifest),
    }
    print(json.dumps(described, indent=1))


def verify(path: Path, record: bool = False) -> None:
    """Reads a datastore and compares it with its checksums; names the first damaged rows.

    Args:
        path: its directory.
        record: give checksums to a datastore or a shard that has none, instead of refusing it.
    """
    datastore = Datastore.open(path)
    with progress_bars(str(path), transient=True) as report:
        if record:
            record_checksums(datastore, partial(report, "recording"))
            datastore = Datastore.open(path)
        verify_datastore(datastore, partial(report, "verifying"))
    print(f"{path}: {len(datastore)} rows are as they were written")


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
        shards: how many.
        placement: contiguous or round_robin.
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
    opened = Datastore.open(source)
    with progress_bars(str(output)) as report:
        told = partial(report, "copying")
        made = deal_again(opened, output, shards, kind, block_rows, told)
    print(line_of(made.path))


def assemble(shards: list[Path], output: Path) -> None:
    """Makes one datastore of shards where they lie; nothing is copied.

    Args:
        shards: their directories.
        output: directory for the manifest of the whole; again, once shards were moved.
    """
    print(line_of(put_together(shards, output).path))


def take_over(
    source: Path,
    output: Path,
    size: int | None = None,
    dim: int | None = None,
    dtype: Literal["fp16", "fp32"] | None = None,
    vocab_size: int | None = None,
) -> None:
    """Makes a datastore of the original's raw maps, in place.

    Args:
        source: prefix of _keys.npy and _vals.npy, or a directory with an info.json.
        output: directory for the manifest.
        size: number of rows, where there is no info.json.
        dim: width of the keys, where there is no info.json.
        dtype: of the keys; told from the file's size by default.
        vocab_size: of the dictionary, to check the values against.
    """
    datastore = import_datastore(source, output, size, dim, dtype, vocab_size)
    print(f"datastore: {output}, {len(datastore)} rows of {datastore.dim}")
    if len(datastore.masked):
        print(f"{len(datastore.masked)} rows of zeros at its end are masked")


COMMANDS = {
    "list": list_datastores,
    "show": show,
    "verify": verify,
    "split": split,
    "merge": merge,
    "assemble": assemble,
    "import": take_over,
}
