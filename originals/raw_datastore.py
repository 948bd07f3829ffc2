"""Datastores of the original programs, read in place without a copy.

kNN-LM writes `PREFIX_keys.npy` and `PREFIX_vals.npy`, raw memory maps without a header; GNN-LM
writes a directory with `keys.npy`, `vals.npy` (raw too) and `info.json`. A manifest that points at
them makes either a `Datastore`.
"""

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from neighborlm.common.digests import SHOWN_BYTES, path_from, stamps_of, verification
from neighborlm.common.errors import InputError
from neighborlm.common.files import digest_of
from neighborlm.common.progress import progress_bars
from neighborlm.retrieval.store.arrays import Layout, header_bytes, map_raw, save_array
from neighborlm.retrieval.store.artifact import Artifact
from neighborlm.retrieval.store.checksums import (
    checksums,
    describe_checksums,
    layout_of_checksums,
    rows_of_chunk,
)
from neighborlm.retrieval.store.datastore import (
    DTYPES,
    NAMES,
    Datastore,
    all_finite,
    artifact_of,
)

INFO_SIZES = ("dstore_size", "hidden_size")
VALUE_TYPES = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


def is_raw(path: Path) -> bool:
    """Whether a path is the prefix of raw maps, or a directory with an info.json."""
    return Path(f"{path}_keys.npy").is_file() or (path / "info.json").is_file()


def import_datastore(
    source: Path,
    output: Path,
    size: int | None = None,
    dim: int | None = None,
    dtype: str | None = None,
    vocab_size: int | None = None,
) -> Datastore:
    """Writes a manifest for raw maps into `output` and opens it as a datastore.

    All is read once. Rows of zeros are masked: the original leaves them where it writes fewer keys
    than it allocated, and loses others. So are rows that are not finite.

    Args:
        source: prefix of `_keys.npy` and `_vals.npy`, or a directory with an info.json.
        output: directory for the manifest.
        size: number of rows N; info.json takes precedence.
        dim: width d of the keys; info.json takes precedence.
        dtype: of the keys, fp16 or fp32; info.json takes precedence. None: inferred from the size
            of the file.
        vocab_size: of the dictionary, to check the values; None: that of info.json, if any.

    Raises:
        InputError: a file is missing, its size or a value does not fit, or there is no key at all.
    """
    keys_path, values_path = Path(f"{source}_keys.npy"), Path(f"{source}_vals.npy")
    if (source / "info.json").is_file():
        info = _read_info(source / "info.json")
        keys_path, values_path = source / "keys.npy", source / "vals.npy"
        size, dim = info["dstore_size"], info["hidden_size"]
        dtype = "fp16" if info.get("dstore_fp16") else "fp32"
        vocab_size = vocab_size or info.get("vocab_size")
    for path in (keys_path, values_path):
        if not path.is_file():
            raise InputError(
                f"{path}: no such file; expected the datastore of the original program"
            )
    if size is None or dim is None:
        raise InputError(
            f"{keys_path}: is a raw map without a header; expected its number of rows and their "
            "width, as --knn.size and --knn.dim (--size and --dim of neighborlm datastore import)"
        )
    dtype = dtype or _key_type(keys_path, size, dim)
    keys, offset = map_raw(keys_path, Layout(DTYPES[dtype], (size, dim)))
    values, value_offset = map_raw(values_path, Layout(_value_type(values_path, size), (size,)))
    _check_values(values, values_path, vocab_size)
    output.mkdir(parents=True, exist_ok=True)
    fields = {
        "version": 1,
        "rows": size,
        "dim": dim,
        "dtype": dtype,
        "value_dtype": values.dtype.name,
        "vocab_size": vocab_size,
        "made_from": {"content": _sampled_content(keys, values)},
        "raw": {
            "keys": {"path": path_from(output, keys_path), "offset": offset},
            "values": {"path": path_from(output, values_path), "offset": value_offset},
        },
    }
    artifact = artifact_of(output)
    if not _is_imported(artifact, fields):
        raw = [output / fields["raw"][name]["path"] for name in NAMES]
        stamps = stamps_of(raw)
        masked, sums, chunk_rows = _read(keys_path, keys, values)
        arrays = {output / "masked.npy": masked, output / "checksums.npy": sums}
        fields["masked"] = len(masked)
        fields["checksums"] = describe_checksums(chunk_rows, masked)
        with artifact.lock():
            for path, array in arrays.items():
                save_array(path, array)
            artifact.write(fields, complete=True, files=arrays)
        with verification("never"):
            Datastore.open(output).remember(stamps)
    return Datastore.open(output)


def _is_imported(artifact: Artifact, fields: Mapping[str, Any]) -> bool:
    """Whether a manifest of these maps is there; one of an earlier version, which masked zeros at
    the end alone, is written anew where that can be done."""
    if not artifact.says({**fields, "complete": True}):
        return False
    return "checksums" in artifact.read() or not os.access(artifact.manifest.parent, os.W_OK)


def _read(path: Path, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Reads all keys `[N, d]` and values `[N]`: the rows that hold no key, the checksums of both
    uint64 `[chunks, 2]`, and the rows that have one checksum."""
    chunk_rows = rows_of_chunk(keys.shape[1] * keys.itemsize)
    layout = layout_of_checksums(len(keys), chunk_rows)
    sums = np.zeros(layout.shape, layout.dtype)
    empty = np.zeros(len(keys), dtype=bool)
    bars = nullcontext(lambda *_: None)
    if keys.nbytes >= SHOWN_BYTES:
        bars = progress_bars(str(path), transient=True)
    with bars as report:
        for chunk, found in checksums((keys, values), chunk_rows, range(len(sums))):
            sums[chunk] = found
            part = slice(chunk * chunk_rows, (chunk + 1) * chunk_rows)
            empty[part] = ~np.asarray(keys[part]).any(axis=1)
            if not all_finite(keys[part]):
                empty[part] |= ~np.isfinite(keys[part]).all(axis=1)
            report("reading", min(part.stop, len(keys)), len(keys))
    if empty.all():
        raise InputError(f"{path}: holds nothing but zeros and what is not finite; expected keys")
    return np.flatnonzero(empty), sums, chunk_rows


def _read_info(path: Path) -> dict[str, Any]:
    """What GNN-LM records of its datastore."""
    try:
        info = json.loads(path.read_bytes())
        if all(type(info[name]) is int and info[name] > 0 for name in INFO_SIZES):
            return info
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"{path}: does not describe a datastore; expected JSON with positive integers "
        f"{' and '.join(INFO_SIZES)}, as the original GNN-LM writes it"
    )


def _key_type(path: Path, size: int, dim: int) -> str:
    """fp16 or fp32, whichever is nearer to the size of the file."""
    return "fp16" if path.stat().st_size / (size * dim) < 3 else "fp32"


def _value_type(path: Path, size: int) -> np.dtype:
    """The integer type that fits the size of the file."""
    found = path.stat().st_size - header_bytes(path)
    return np.dtype(VALUE_TYPES.get(found // size, np.int64))


def _check_values(values: np.ndarray, path: Path, vocab_size: int | None) -> None:
    lowest, highest = int(values.min()), int(values.max())
    too_small = values.dtype == np.int16 and vocab_size is not None and vocab_size > 1 << 15
    if values.dtype == np.int16 and (lowest < 0 or too_small):
        raise InputError(
            f"{path}: holds int16 values from {lowest} to {highest}, in which ids above 32767 have "
            "wrapped around and cannot be recovered; expected int32 or int64: write the datastore "
            "again with the original program"
        )
    if lowest < 0:
        raise InputError(f"{path}: holds the value {lowest}; expected token ids from 0 on")
    if vocab_size is not None and highest >= vocab_size:
        raise InputError(
            f"{path}: holds the value {highest}, but the dictionary has only {vocab_size:,} symbols"
        )


def _sampled_content(keys: np.ndarray, values: np.ndarray) -> str:
    """A hash of 256 rows spread over the store, which tells raw stores apart."""
    rows = np.unique(np.linspace(0, len(keys) - 1, 256).astype(np.int64))
    return digest_of(keys[rows].tobytes(), values[rows].tobytes())
