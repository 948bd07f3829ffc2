"""The datastore: a key (vector of a context) and a value (the token that followed) for every token
of a text (Khandelwal et al., ICLR 2020, section 2).

A directory with `keys.npy` [N, d] float16 or float32, `values.npy` [N] unsigned, and
`manifest.json`. Row i belongs to token i of the split. Rows in `masked.npy` hold no key and are
never found.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from jsonargparse import auto_cli
from numpy.lib.format import open_memmap

from errors import InputError, exit_with_one_sentence
from retrieval.arrays import open_array, open_raw, take_room
from retrieval.manifest import read_manifest, refuse_mismatch, write_manifest

KIND, VERSION = "datastore", 1
FIELDS = ("complete", "rows", "dim", "dtype", "value_dtype", "masked", "made_from")
DTYPES = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
BLOCK_BYTES = 64 << 20
"""How much of the keys is read at once, as fp32."""


@dataclass(frozen=True)
class Datastore:
    """An opened datastore; arrays are memory-mapped.

    Attributes:
        path: its directory.
        manifest: what `manifest.json` says.
        keys: `[N, d]`.
        values: `[N]`.
        masked: int64, the ascending numbers of the rows without a key.
    """

    path: Path
    manifest: dict[str, Any]
    keys: np.ndarray
    values: np.ndarray
    masked: np.ndarray

    @classmethod
    def open(cls, path: Path | str) -> "Datastore":
        """Opens a complete datastore.

        Raises:
            InputError: missing, unfinished, or its files are not what its manifest says.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such datastore; --save_datastore or --knnlm makes it")
        manifest = read_manifest(path / "manifest.json", KIND, VERSION, FIELDS)
        if manifest["dtype"] not in DTYPES:
            raise InputError(f"{path}: has keys of type {manifest['dtype']}; expected fp16 or fp32")
        if not manifest["complete"]:
            raise InputError(f"{path}: is unfinished; repeat the command that was writing it")
        rows, dim = manifest["rows"], manifest["dim"]
        dtype, value_dtype = DTYPES[manifest["dtype"]], np.dtype(manifest["value_dtype"])
        if "raw" in manifest:
            keys = open_raw(path, manifest["raw"]["keys"], (rows, dim), dtype)
            values = open_raw(path, manifest["raw"]["values"], (rows,), value_dtype)
        else:
            keys = open_array(path / "keys.npy", (rows, dim), dtype)
            values = open_array(path / "values.npy", (rows,), value_dtype)
        masked = np.empty(0, dtype=np.int64)
        if manifest["masked"]:
            masked = open_array(path / "masked.npy", (manifest["masked"],), np.dtype(np.int64))
        return cls(path, manifest, keys, values, masked)

    @staticmethod
    def is_complete(path: Path) -> bool:
        """Whether a finished datastore lies there.

        Raises:
            InputError: there is a manifest, but not a datastore's.
        """
        manifest = path / "manifest.json"
        return manifest.exists() and read_manifest(manifest, KIND, VERSION, FIELDS)["complete"]

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

    @cached_property
    def fingerprint(self) -> str:
        """Identifies what the datastore was made from, and so its content."""
        fields = ("rows", "dim", "dtype", "masked", "made_from")
        parts = repr([self.manifest[field] for field in fields])
        return blake2b(parts.encode(), digest_size=8).hexdigest()

    def rows_of(self, key_numbers: np.ndarray) -> np.ndarray:
        """From the number of a key, counted without masked rows, to its row; -1 stays."""
        if len(self.masked) == 0:
            return key_numbers
        before = np.searchsorted(
            self.masked - np.arange(len(self.masked)), key_numbers, side="right"
        )
        return np.where(key_numbers < 0, -1, key_numbers + before)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Keys of ascending row numbers, fp32 `[len(rows), d]`."""
        return self.keys[rows].astype(np.float32)

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
                yield self.keys[first:last].astype(np.float32)
            else:
                yield self.read(self.rows_of(np.arange(first, last)))


class DatastoreBuilder:
    """Writes a datastore, any rows in any order, by any number of processes, and goes on where a
    killed run stopped.

    Which rows are written is kept in `written.npy` until the datastore is complete; a row is
    marked only after its key has reached the disk.

    Args:
        path: the directory.
        rows: number of tokens N.
        dim: width of the keys d.
        dtype: fp16 or fp32.
        vocab_size: values are below it.
        made_from: JSON-able settings that determine the content.
        masked: ascending numbers of the rows that get no key.

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
    ) -> None:
        self.path = Path(path)
        self.masked = masked
        self.fields = {
            "rows": rows,
            "dim": dim,
            "dtype": dtype,
            "value_dtype": np.min_scalar_type(vocab_size - 1).name,
            "vocab_size": vocab_size,
            "masked": len(masked),
            "made_from": made_from,
        }
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / ".lock"):
            if (self.path / "manifest.json").exists():
                self._check_existing()
            else:
                self._create()
        arrays = self._arrays()
        self.keys, self.values, self.written = (
            open_array(self.path / name, shape, kind, mode="r+")
            for name, (kind, shape) in arrays.items()
        )
        self.unmarked: list[np.ndarray] = []

    def _check_existing(self) -> None:
        manifest = read_manifest(self.path / "manifest.json", KIND, VERSION, FIELDS)
        if manifest["complete"]:
            raise InputError(f"{self.path}: already holds a complete datastore; expected none")
        refuse_mismatch(self.path, manifest["made_from"], self.fields["made_from"])
        refuse_mismatch(self.path, manifest, self.fields)
        if len(self.masked) and not np.array_equal(
            self.masked, open_array(self.path / "masked.npy", self.masked.shape, self.masked.dtype)
        ):
            raise InputError(
                f"{self.path / 'masked.npy'}: masks other rows than this command would"
            )

    def _arrays(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Type and shape of each file while the store is written."""
        rows, dim = self.fields["rows"], self.fields["dim"]
        return {
            "keys.npy": (DTYPES[self.fields["dtype"]], (rows, dim)),
            "values.npy": (np.dtype(self.fields["value_dtype"]), (rows,)),
            "written.npy": (np.dtype(bool), (rows,)),
        }

    def _create(self) -> None:
        arrays = self._arrays()
        needed = 4096 + sum(kind.itemsize * math.prod(shape) for kind, shape in arrays.values())
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise InputError(
                f"{self.path}: the datastore needs {needed / 1e9:.1f} GB but the disk has "
                f"{free / 1e9:.1f} GB free; --knn.dtype fp16 halves it, --knn.datastore moves it"
            )
        for name, (kind, shape) in arrays.items():
            open_memmap(self.path / name, mode="w+", dtype=kind, shape=shape).flush()
            take_room(self.path / name)
        if len(self.masked):
            np.save(self.path / "masked.npy", self.masked)
            written = np.load(self.path / "written.npy", mmap_mode="r+")
            written[self.masked] = True
            written.flush()
        self._write_manifest(complete=False)

    def _write_manifest(self, complete: bool) -> None:
        fields = {**self.fields, "complete": complete}
        write_manifest(self.path / "manifest.json", KIND, VERSION, fields)

    @property
    def n_written(self) -> int:
        """Rows that are safely on disk, masked ones included."""
        return int(np.count_nonzero(self.written))

    def is_written(self, rows: np.ndarray) -> bool:
        """Whether all of these rows are on disk already."""
        return bool(self.written[rows].all())

    def write(self, rows: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """Stores keys `[n, d]` and values `[n]` at rows int64 `[n]`, masked rows left out.

        Raises:
            InputError: a key is not finite in the datastore's type.
            ValueError: a value is outside the vocabulary.
        """
        if len(values) and not 0 <= values.min() <= values.max() < self.fields["vocab_size"]:
            raise ValueError(f"values from {values.min()} to {values.max()} in {self.path}")
        if len(self.masked):
            at = np.searchsorted(self.masked, rows)
            free = self.masked[np.minimum(at, len(self.masked) - 1)] != rows
            rows, keys, values = rows[free], keys[free], values[free]
        with np.errstate(over="ignore"):
            keys = keys.astype(self.keys.dtype)
        if not np.isfinite(keys).all():
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
        self.written[np.concatenate(self.unmarked)] = True
        self.written.flush()
        self.unmarked.clear()

    def finish(self) -> Datastore:
        """Marks the datastore complete, once, after every process has called `sync`."""
        missing = len(self.written) - self.n_written
        if missing:
            raise RuntimeError(f"{self.path}: {missing} rows were never written")
        self._write_manifest(complete=True)
        (self.path / "written.npy").unlink(missing_ok=True)
        return Datastore.open(self.path)


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Looks at datastores, and takes over those of the original programs.

    python -m retrieval.datastore show --path datastores/text/train
    python -m retrieval.datastore import --source PREFIX --output DIR --size N --dim D
    """
    from retrieval.foreign import import_datastore

    def show(path: Path) -> None:
        """Prints what a datastore is and what it was made from."""
        datastore = Datastore.open(path)
        print(json.dumps({**datastore.manifest, "fingerprint": datastore.fingerprint}, indent=1))

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

    auto_cli({"show": show, "import": take_over}, args=args, as_positional=False)


if __name__ == "__main__":
    main()
