"""The datastore: a key (vector of a context) and a value (the token that followed) for every token
of a text (Khandelwal et al., ICLR 2020, section 2).

A directory with `keys.npy` [N, d] float16 or float32, `values.npy` [N] unsigned, and
`manifest.json`. Row i belongs to token i of the split. Rows in `masked.npy` hold no key and are
never found. `checksums.npy` uint64 [chunks, 2] is of chunks of the keys and of the values.

Or a directory whose manifest names shards, each an ordinary datastore of its own that also says
which rows of the whole it holds (see `retrieval.store.shards`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from neighborlm.common.digests import (
    ALGORITHM,
    SHOWN_BYTES,
    Stamp,
    compare_once,
    keep_stamps,
    stamps_of,
    verification,
)
from neighborlm.common.errors import InputError
from neighborlm.common.files import digest_of
from neighborlm.common.names import call
from neighborlm.common.progress import progress_bars
from neighborlm.retrieval.store.arrays import (
    Layout,
    make_room,
    open_array,
    open_raw,
    save_array,
)
from neighborlm.retrieval.store.artifact import Artifact, Format, refuse_mismatch
from neighborlm.retrieval.store.checksums import (
    checksum,
    checksums,
    compare_chunks,
    describe_checksums,
    layout_of_checksums,
    rows_of_chunk,
)
from neighborlm.retrieval.store.shards import Placement, ShardedArray

SHARDED_VERSION = 2
"""Format version of a manifest that names shards; one that names none has version 1."""
FIELDS = ("complete", "rows", "dim", "dtype", "value_dtype", "masked", "made_from")
FORMAT = Format("datastore", SHARDED_VERSION, FIELDS, ("torch", "numpy"))
ADVICE = "--knn.datastore moves it"
DTYPES = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
TORCH_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
NAMES = ("keys", "values")
SMALL_FILES = ("checksums.npy", "masked.npy", "rows.npy", "weights.npy")
"""Besides keys and values, as far as a datastore has them; see `thinning` for the last two."""
BLOCK_BYTES = 64 << 20
"""How much of the keys is read at once, as fp32."""


class Part(NamedTuple):
    """Which part a shard is, and of what: the whole's directory and manifest."""

    placement: Placement
    number: int
    path: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Datastore:
    """An opened datastore; arrays are memory-mapped.

    Attributes:
        path: its directory.
        manifest: what `manifest.json` says.
        keys: `[N, d]`.
        values: `[N]`.
        masked: int64, the ascending numbers of the rows without a key.
        part: of a shard that was opened as part of a whole. `rows_of`, `sample`, `read` and
            `values_of` then go by rows of the whole; what else counts rows, the arrays too, goes by
            the shard's own.
    """

    path: Path
    manifest: dict[str, Any]
    keys: np.ndarray | ShardedArray
    values: np.ndarray | ShardedArray
    masked: np.ndarray
    part: Part | None = None

    @classmethod
    def open(cls, path: Path | str, shard: int | None = None) -> "Datastore":
        """Opens a complete datastore.

        Args:
            path: its directory.
            shard: open this shard alone, as part of the whole; the others need not be there.

        Raises:
            InputError: missing, unfinished, or its files are not what its manifest says.
        """
        path = Path(path)
        manifest = read_datastore_manifest(path)
        if shard is not None:
            return cls._open_shard(path, manifest, shard)
        if "shards" in manifest and cls.is_complete(path):
            return cls._open_sharded(path, manifest)
        manifest = artifact_of(path).open()
        layouts = _layouts(manifest)
        if "raw" in manifest:
            keys, values = (
                open_raw(path / "manifest.json", manifest["raw"][name], layouts[f"{name}.npy"])
                for name in NAMES
            )
        else:
            keys, values = (open_array(path / name, layout) for name, layout in layouts.items())
        masked = np.empty(0, dtype=np.int64)
        if manifest["masked"]:
            masked = open_array(path / "masked.npy", _layout_of_masked(manifest["masked"]))
        opened = cls(path, manifest, keys, values, masked)
        if "checksums" in manifest:
            compare_once(artifact_of(path).stamps, opened._expected, opened._compare_rows)
        return opened

    @property
    def _expected(self) -> dict[Path, str]:
        """What keys and values are compared with: their checksums, which have a digest."""
        checksums = self.manifest.get("files", {}).get("checksums.npy", {})
        return dict.fromkeys(self.files, checksums.get(ALGORITHM, ""))

    def remember(self, stamps: Mapping[Path, Stamp] | None = None) -> None:
        """Remembers that keys and values are what was written, see `common.digests`.

        Args:
            stamps: of their files when they were read; by default those of now.
        """
        found = stamps_of(self.files) if stamps is None else stamps
        keep_stamps(artifact_of(self.path).stamps, found, self._expected)

    def _compare_rows(self, files: Sequence[Path]) -> None:
        bars = nullcontext(lambda *_: None)
        if self.keys.nbytes >= SHOWN_BYTES:
            bars = progress_bars(str(self.path), transient=True)
        with bars as report:
            self.verify(partial(report, "verifying"), files)

    def verify(
        self,
        report: Callable[[int, int], None] = lambda *_: None,
        files: Sequence[Path] | None = None,
    ) -> None:
        """Reads all of a datastore in one piece and compares it with its checksums.

        Args:
            report: called with how many rows are compared, and how many there are.
            files: of `files`, which to read; by default all.

        Raises:
            InputError: it has none, or is damaged; names the first damaged file and its rows.
        """
        described = self.manifest.get("checksums")
        if described is None:
            raise InputError(f"{self.path}: has no checksums; verify --record true makes them")
        refuse_mismatch(self.path, described, {"algorithm": ALGORITHM})
        if "files" in self.manifest:
            artifact_of(self.path).verify()
        if checksum(np.asarray(self.masked)) != described["masked"]:
            raise InputError(f"{self.path / 'masked.npy'}: is damaged")
        layout = layout_of_checksums(len(self), described["rows"])
        sums = open_array(self.path / "checksums.npy", layout)
        which = [n for n, file in enumerate(self.files) if files is None or file in files]
        compare_chunks(
            {self.files[n]: (self.keys, self.values)[n] for n in which},
            sums[:, which],
            described["rows"],
            artifact_of(self.path).advice,
            lambda done: report(done, len(self)),
        )

    @property
    def files(self) -> list[Path]:
        """Those of the keys and of the values, of a datastore in one piece."""
        raw = self.manifest.get("raw")
        return [self.path / (raw[name]["path"] if raw else f"{name}.npy") for name in NAMES]

    @classmethod
    def _open_sharded(cls, path: Path, manifest: dict[str, Any]) -> "Datastore":
        shards = [cls._open_shard(path, manifest, n) for n in range(len(manifest["shards"]))]
        placement = placement_of(manifest)
        keys, values = (
            ShardedArray([getattr(shard, name) for shard in shards], placement) for name in NAMES
        )
        masked = [shard.in_whole(shard.masked) for shard in shards]
        return cls(path, manifest, keys, values, np.sort(np.concatenate(masked)))

    @classmethod
    def _open_shard(cls, path: Path, manifest: dict[str, Any], number: int) -> "Datastore":
        places = shard_paths(path, manifest)
        if not 0 <= number < len(places):
            raise InputError(f"{path}: has {len(places)} shards; expected one of number {number}")
        if not places[number].is_dir():
            raise InputError(
                f"{path}: its shard {number} of {len(places)} is missing at {places[number]}; "
                "bring it there, or tell where it is: neighborlm datastore assemble"
            )
        opened = cls.open(places[number])
        placement = placement_of(manifest)
        check_shard(opened.path, opened.manifest, manifest, placement.described(number))
        return replace(opened, part=Part(placement, number, path, manifest))

    def shard(self, number: int) -> "Datastore":
        """One of the shards alone, as part of the whole, see `part`; of a shard itself."""
        if self.part is not None and self.part.number == number:
            return self
        return self.open(self.path, number)

    def shards(self) -> list["Datastore"]:
        """All of them, each as part of the whole; none where it has none."""
        return [self.shard(number) for number in range(len(self.manifest.get("shards", ())))]

    @property
    def n_shards(self) -> int:
        """How many directories its rows lie in."""
        return max(len(shard_paths(self.path, self.manifest)), 1)

    @staticmethod
    def is_complete(path: Path) -> bool:
        """Whether a finished datastore lies there, of shards: with all of them.

        Where all were complete before, that one is missing now is found when it is opened.

        Raises:
            InputError: there is a manifest, but not a datastore's.
        """
        artifact = artifact_of(path)
        if not artifact.exists():
            return False
        if artifact.is_complete():
            return True
        shards = shard_paths(path, artifact.read())
        return bool(shards) and all(map(Datastore.is_complete, shards))

    def __len__(self) -> int:
        """Rows, the masked ones included."""
        return len(self.keys)

    @property
    def dim(self) -> int:
        """Width of the keys."""
        return self.keys.shape[1]

    @property
    def n_keys(self) -> int:
        """Rows that hold a key."""
        return len(self.keys) - len(self.masked)

    @property
    def whole(self) -> dict[str, Any]:
        """The manifest of what this is a part of; its own where it is no part."""
        return self.manifest if self.part is None else self.part.manifest

    @property
    def n_keys_of_whole(self) -> int:
        """Rows of the whole that hold a key."""
        return self.whole["rows"] - self.whole["masked"]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies what the datastore was made from, and so its content."""
        fingerprint = fingerprint_of(self.manifest)
        call(fingerprint, self.path)
        return fingerprint

    def rows_of(self, key_numbers: np.ndarray) -> np.ndarray:
        """From the number of a key, counted without masked rows, to its row; -1 stays."""
        rows = key_numbers
        if len(self.masked):
            before = np.searchsorted(
                self.masked - np.arange(len(self.masked)), key_numbers, side="right"
            )
            rows = np.where(key_numbers < 0, -1, key_numbers + before)
        return self.in_whole(rows)

    def in_whole(self, rows: np.ndarray) -> np.ndarray:
        """From its own rows, int64, to what `read` knows them by."""
        return rows if self.part is None else self.part.placement.rows_of(self.part.number, rows)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Keys of ascending row numbers, fp32 `[len(rows), d]`."""
        return _fp32(self.keys[self.places_of(rows)])

    def values_of(self, rows: np.ndarray) -> np.ndarray:
        """Values of rows int64 of any shape; any value where missing, -1."""
        if rows.size and rows.min() < 0:
            rows = np.where(rows < 0, self.in_whole(np.int64(0)), rows)
        return self.values[self.places_of(rows)]

    def places_of(self, rows: np.ndarray) -> np.ndarray:
        """From rows, those of the whole where this is part of one, to places in the arrays.

        Raises:
            ValueError: a row is another shard's.
        """
        if self.part is None:
            return rows
        numbers, places = self.part.placement.locate(rows)
        if (numbers != self.part.number).any():
            raise ValueError(f"rows of other shards than {self.part.number}: {self.path}")
        return places

    def sample(self, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """A random sample, read in file order.

        Args:
            size: how many; all that have a key where there are fewer.

        Returns:
            ascending rows int64 `[n]`, and their keys fp32 `[n, d]`.
        """
        size = min(size, self.n_keys)
        chosen = np.random.default_rng(seed).choice(self.n_keys, size, replace=False, shuffle=False)
        rows = self.rows_of(np.sort(chosen))
        return rows, self.read(rows)

    def blocks(self, start: int = 0, block_rows: int | None = None) -> Iterator[np.ndarray]:
        """Keys from number `start` on, in order and without masked rows, as fp32 blocks."""
        step = block_rows or max(BLOCK_BYTES // (4 * self.dim), 1)
        for first in range(start, self.n_keys, step):
            last = min(first + step, self.n_keys)
            if len(self.masked) == 0:
                yield _fp32(np.array(self.keys[first:last]))
            else:
                yield self.read(self.rows_of(np.arange(first, last)))


def _fp32(keys: np.ndarray) -> np.ndarray:
    """Torch converts several times faster than numpy."""
    return torch.from_numpy(keys).float().numpy()


def artifact_of(path: Path) -> Artifact:
    """The datastore of a directory as a product."""
    return Artifact.folder(FORMAT, path)


def read_datastore_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a datastore in any state.

    Raises:
        InputError: there is none, or of keys of an unknown type.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such datastore; --save_datastore or --knnlm makes it")
    manifest = artifact_of(path).read()
    if manifest["dtype"] not in DTYPES:
        raise InputError(f"{path}: has keys of type {manifest['dtype']}; expected fp16 or fp32")
    return manifest


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """See `Datastore.fingerprint`: the same however rows are dealt into shards."""
    fields = ["rows", "dim", "dtype", "masked", "made_from"]
    if "shard" in manifest:
        fields.append("shard")
    return digest_of(repr([manifest[field] for field in fields]))


def shard_paths(path: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Where the shards of the datastore in directory `path` lie; none where it has none."""
    return [path / shard["path"] for shard in manifest.get("shards", ())]


def placement_of(manifest: Mapping[str, Any]) -> Placement:
    """How the rows of a sharded datastore are dealt."""
    return Placement(manifest["rows"], len(manifest["shards"]), manifest["block_rows"])


def check_shard(
    path: Path, shard: Mapping[str, Any], whole: Mapping[str, Any], place: Mapping[str, Any]
) -> None:
    """Refuses a shard of another datastore, or of another place in it.

    Args:
        path: of the shard.
        shard: its manifest.
        whole: manifest of the datastore.
        place: see `Placement.described`.
    """
    refuse_mismatch(path, shard["made_from"], whole["made_from"])
    fields = {name: whole[name] for name in ("made_from", "dim", "dtype", "value_dtype")}
    refuse_mismatch(path, shard, {**fields, "shard": dict(place)})


def all_finite(array: np.ndarray) -> bool:
    """`np.isfinite(array).all()` of floats of 16 or 32 bits, ten times as fast for halves."""
    bits = np.dtype(f"i{array.itemsize}")
    infinity = np.array(np.inf, array.dtype).view(bits)  # all bits of the exponent
    return not ((array.view(bits) & infinity) == infinity).any()


def _layouts(fields: Mapping[str, Any]) -> dict[str, Layout]:
    """Of the large files of a datastore, by its manifest."""
    rows, dim = fields["rows"], fields["dim"]
    return {
        "keys.npy": Layout(DTYPES[fields["dtype"]], (rows, dim)),
        "values.npy": Layout(np.dtype(fields["value_dtype"]), (rows,)),
    }


def layouts_while_written(fields: Mapping[str, Any]) -> dict[str, Layout]:
    """Of those and of the file of marks that lies beside them until all rows are written."""
    return {**_layouts(fields), "written.npy": Layout(np.dtype(bool), (fields["rows"],))}


def _layout_of_masked(count: int) -> Layout:
    return Layout(np.dtype(np.int64), (count,))


class DatastoreBuilder:
    """Writes a datastore, any rows in any order, by any number of processes, and goes on where a
    killed run stopped.

    Which rows are written is kept in `written.npy` until the datastore is complete; a row is
    marked only after its key has reached the disk, and from then on it does not change. Checksums
    of a chunk are computed when all of its rows are marked, while it is in memory.

    Args:
        path: the directory.
        rows: number of tokens N.
        dim: width of the keys d.
        dtype: fp16 or fp32.
        vocab_size: values are below it.
        made_from: JSON-able settings that determine the content.
        masked: ascending numbers of the rows that get no key.
        shard: its place in a whole, see `Placement.described`; None where it is one.

    Raises:
        InputError: the directory holds something else, or the disk has no room.
    """

    def __init__(
        self,
        path: Path | str,
        rows: int,
        dim: int,
        dtype: str,
        vocab_size: int,
        made_from: dict[str, Any],
        masked: np.ndarray,
        shard: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.artifact = artifact_of(self.path)
        self.masked = masked
        self.fields = {
            "version": 1,
            "rows": rows,
            "dim": dim,
            "dtype": dtype,
            "value_dtype": np.min_scalar_type(vocab_size - 1).name,
            "vocab_size": vocab_size,
            "masked": len(masked),
            "made_from": made_from,
        }
        if shard is not None:
            self.fields["shard"] = shard
        self.path.mkdir(parents=True, exist_ok=True)
        layouts = layouts_while_written(self.fields)
        self.chunk_rows = rows_of_chunk(dim * DTYPES[dtype].itemsize)
        with self.artifact.lock():
            if self.artifact.exists():
                self._check_existing()
            else:
                self._create(layouts)
            self.sums = self._open_sums()
        self.keys, self.values, self.written = (
            open_array(self.path / name, layout, "r+") for name, layout in layouts.items()
        )
        self.unmarked: list[np.ndarray] = []

    def _check_existing(self) -> None:
        manifest = self.artifact.read()
        refuse_mismatch(self.path, {"shards": len(manifest.get("shards", [1]))}, {"shards": 1})
        if manifest["complete"]:
            raise InputError(f"{self.path}: already holds a complete datastore; expected none")
        refuse_mismatch(self.path, manifest["made_from"], self.fields["made_from"])
        refuse_mismatch(self.path, manifest, self.fields)
        layout = _layout_of_masked(len(self.masked))
        if len(self.masked) and not np.array_equal(
            self.masked, open_array(self.path / "masked.npy", layout)
        ):
            raise InputError(
                f"{self.path / 'masked.npy'}: masks other rows than this command would"
            )

    def _open_sums(self) -> np.ndarray:
        """Checksums so far; zeros, which are computed in the end, where a kill has left none."""
        path = self.path / "checksums.npy"
        layout = layout_of_checksums(self.fields["rows"], self.chunk_rows)
        try:
            return open_array(path, layout, "r+")
        except InputError:
            save_array(path, np.zeros(layout.shape, layout.dtype))
        return open_array(path, layout, "r+")

    def _create(self, layouts: Mapping[str, Layout]) -> None:
        halves = "--knn.dtype fp16 halves it, " if self.fields["dtype"] == "fp32" else ""
        make_room(self.path, layouts, FORMAT.kind, f"{halves}{ADVICE}")
        (self.path / "checksums.npy").unlink(missing_ok=True)
        if len(self.masked):
            save_array(self.path / "masked.npy", self.masked)
            written = np.load(self.path / "written.npy", mmap_mode="r+")
            written[self.masked] = True
            written.flush()
        self.artifact.write(self.fields, complete=False)

    @property
    def n_rows(self) -> int:
        """Rows to write, masked ones included."""
        return len(self.written)

    @property
    def n_written(self) -> int:
        """Rows that are safely on disk, masked ones included."""
        return int(np.count_nonzero(self.written))

    def is_written(self, rows: np.ndarray) -> bool:
        """Whether all of these rows are on disk already."""
        return bool(self.written[rows].all())

    def write(self, rows: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """Stores keys `[n, d]` and values `[n]` at rows int64 `[n]`, those left out that are masked
        or written already.

        Raises:
            InputError: a key is not finite in the datastore's type.
            ValueError: a value is outside the vocabulary.
        """
        if len(values) and not 0 <= values.min() <= values.max() < self.fields["vocab_size"]:
            raise ValueError(f"values from {values.min()} to {values.max()} in {self.path}")
        missing = ~self.written[rows]
        if not missing.all():
            rows, keys, values = rows[missing], keys[missing], values[missing]
        if keys.dtype != self.keys.dtype:  # torch rounds to halves twice as fast as numpy
            keys = torch.from_numpy(keys).to(TORCH_DTYPES[self.fields["dtype"]]).numpy()
        if not all_finite(keys):
            raise InputError(
                f"{self.path}: a key is infinite or NaN as {self.fields['dtype']}; "
                "use --knn.dtype fp32 (or mend the model if it stays so)"
            )
        self.keys[rows] = keys
        self.values[rows] = values
        self.unmarked.append(rows)

    def sync(self) -> None:
        """Brings to disk what was written, then marks it as written."""
        if not self.unmarked:
            return
        self.keys.flush()
        self.values.flush()
        rows = np.concatenate(self.unmarked)
        self.written[rows] = True
        self.written.flush()
        self.unmarked.clear()
        for chunk in np.unique(rows // self.chunk_rows).tolist():
            part = slice(chunk * self.chunk_rows, (chunk + 1) * self.chunk_rows)
            if self.written[part].all():
                self.sums[chunk] = checksum(self.keys[part]), checksum(self.values[part])

    def finish(self) -> Datastore:
        """Marks the datastore complete, once, after every process has called `sync`."""
        missing = len(self.written) - self.n_written
        if missing:
            raise RuntimeError(f"{self.path}: {missing} rows were never written")
        lacking = np.flatnonzero((self.sums == 0).any(axis=1)).tolist()
        for chunk, sums in checksums((self.keys, self.values), self.chunk_rows, lacking):
            self.sums[chunk] = sums
        self.sums.flush()
        described = {"checksums": describe_checksums(self.chunk_rows, self.masked)}
        small = (self.path / name for name in SMALL_FILES)
        with self.artifact.lock():
            files = list(filter(Path.is_file, small))
            self.artifact.write({**self.fields, **described}, complete=True, files=files)
        (self.path / "written.npy").unlink(missing_ok=True)
        with verification("never"):
            written = Datastore.open(self.path)
        written.remember()
        return written
