"""Checksums of rows, a chunk at a time: what a disk or a copy has damaged is found and named."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from neighborlm.common.digests import ALGORITHM
from neighborlm.common.errors import InputError
from neighborlm.retrieval.store.arrays import Layout

CHUNK_BYTES = 16 << 20


def rows_of_chunk(bytes_of_row: int) -> int:
    """Rows that have one checksum."""
    return max(CHUNK_BYTES // bytes_of_row, 1)


def layout_of_checksums(rows: int, chunk_rows: int) -> Layout:
    """Of the file that holds those of the keys and of the values."""
    return Layout(np.dtype(np.uint64), (-(-rows // chunk_rows), 2))


def describe_checksums(chunk_rows: int, masked: np.ndarray) -> dict[str, Any]:
    """What a manifest says of checksums, that of the masked rows included."""
    return {"algorithm": ALGORITHM, "rows": chunk_rows, "masked": checksum(masked.astype(np.int64))}


def checksum(array: np.ndarray) -> int:
    """XXH3 of an array's bytes: ten times as fast as the CRC of zlib."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(array))


def checksums(
    arrays: Sequence[np.ndarray], chunk_rows: int, chunks: Iterable[int]
) -> Iterator[tuple[int, list[int]]]:
    """Reads chunks of some arrays `[N, …]`, on all cores.

    Yields:
        the number of a chunk, in the order given, and the checksum of it in each array.
    """

    def of(chunk: int) -> tuple[int, list[int]]:
        rows = slice(chunk * chunk_rows, (chunk + 1) * chunk_rows)
        return chunk, [checksum(array[rows]) for array in arrays]

    with ThreadPoolExecutor() as pool:
        yield from pool.map(of, chunks)


def compare_chunks(
    arrays: Mapping[Path, np.ndarray],
    expected: np.ndarray,
    chunk_rows: int,
    advice: str,
    report: Callable[[int], None] = lambda _: None,
) -> None:
    """Reads some arrays `[N, …]` and compares them with their checksums.

    Args:
        arrays: by the file that holds them.
        expected: uint64 `[chunks, arrays]`.
        chunk_rows: rows that have one checksum.
        advice: what can be done about a damaged file.
        report: called with how many rows are compared.

    Raises:
        InputError: one is damaged; names its file and the first damaged rows.
    """
    rows = len(next(iter(arrays.values())))
    for chunk, found in checksums(list(arrays.values()), chunk_rows, range(len(expected))):
        first, last = chunk * chunk_rows, min((chunk + 1) * chunk_rows, rows)
        for path, *sums in zip(arrays, found, expected[chunk], strict=True):
            if sums[0] != sums[1]:
                raise InputError(
                    f"{path}: rows {first} to {last - 1} are damaged: their checksum is "
                    f"{sums[0]:016x}, expected {sums[1]:016x}; {advice}"
                )
        report(last)
