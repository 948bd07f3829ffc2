"""From a file to token ids on disk, on all cores, in chunks of whole lines.

A binarised split is `tokens.npy` `[N]`, of the smallest unsigned type that holds the vocabulary,
where every line ends with `</s>`, and `line_starts.npy` int64 `[lines + 1]`. The file is text, or a
token file of nanoGPT: uint16 ids of an unknown vocabulary, whose decimal numbers become symbols.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib.format import write_array_header_1_0

from neighborlm.common.errors import InputError
from neighborlm.common.files import needing
from neighborlm.common.progress import tracked
from neighborlm.datamodules.dictionary import (
    BYTE_ORDER_MARK,
    EOS,
    NEWLINE,
    SPACE_SYMBOL,
    UNK,
    Dictionary,
    Level,
)

CHUNK_BYTES = 4 << 20
CHUNKS_PER_WORKER = 4
"""Fewest chunks per process: with fewer, the seconds that a process takes to start do not pay."""
ID_TYPE = np.dtype("<u2")
"""Type of the ids in a token file of nanoGPT."""


@dataclass(frozen=True)
class TokenStream:
    """One binarised split.

    Attributes:
        tokens: unsigned `[N]`, the ids of all lines concatenated, memory-mapped.
        line_starts: int64 `[lines + 1]`; line i is `tokens[line_starts[i] : line_starts[i + 1]]`.
    """

    tokens: np.ndarray
    line_starts: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "TokenStream":
        """Maps the arrays that `binarize` wrote to `folder`."""
        return cls(
            np.load(folder / "tokens.npy", mmap_mode="r"),
            np.load(folder / "line_starts.npy", mmap_mode="r"),
        )


def smallest_unsigned(n_values: int) -> np.dtype:
    """The smallest unsigned integer type that holds 0 .. n_values - 1.

    >>> smallest_unsigned(65536), smallest_unsigned(65537)
    (dtype('uint16'), dtype('uint32'))
    """
    return np.min_scalar_type(max(n_values - 1, 0))


def count_symbols(path: Path, level: Level | Literal["id"], workers: int) -> Counter[str]:
    """Counts the occurrences of each symbol of a file.

    Args:
        level: what a symbol of a text is, or `id` for a file of ids.
    """
    total: Counter[str] = Counter()
    chunks = _chunks(path, level == "id")
    count = partial(_count_chunk, path, level=level)
    for counts in _over_chunks(count, chunks, path, workers, "counting"):
        total.update(counts)
    return total


def binarize(
    path: Path, dictionary: Dictionary, folder: Path, workers: int, ids: bool = False
) -> None:
    """Writes `tokens.npy` and `line_starts.npy` of a file to `folder`.

    Unknown symbols become `<unk>`. At word level lines are split at white space and always end with
    `</s>`; at character and byte level a space is written `▁` and `</s>` stands for the newline
    itself, so that there are as many tokens as characters (bytes). A byte order mark at the
    beginning of a text is dropped, except at byte level.

    Args:
        ids: whether the file holds ids, which make a single line without `</s>`.

    Raises:
        InputError: the file cannot be read, is not UTF-8 or has no tokens.
        OSError: the tokens do not fit on the disk.
    """
    dtype = smallest_unsigned(len(dictionary))
    encode = partial(_encode_chunk, path, dictionary=dictionary, dtype=dtype, ids=ids)
    chunks = _chunks(path, ids)
    n_tokens, line_ends = 0, []
    with NpyWriter(folder / "tokens.npy", dtype) as tokens:
        encoded = _over_chunks(encode, chunks, path, workers, "binarising")
        for done, (symbols, ends) in enumerate(encoded, 1):
            line_ends.append(ends + n_tokens)
            n_tokens += len(symbols)
            tokens.append(symbols, n_tokens * len(chunks) / done)
    if n_tokens == 0:
        raise InputError(f"{path}: has no tokens; expected a text with at least one word")
    starts = np.concatenate([[0], *line_ends]).astype(np.int64)
    if starts[-1] != n_tokens:  # at character and byte level: a last line without newline
        starts = np.append(starts, n_tokens)
    with NpyWriter(folder / "line_starts.npy", starts.dtype) as line_starts:
        line_starts.append(starts, len(starts))


class NpyWriter:
    """Writes a one-dimensional .npy file piece by piece, without a memory map: through one a full
    disk would end the program with a bus error.

    Args:
        path: of the file.
        dtype: of its items.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115

    def __enter__(self) -> "NpyWriter":
        self._write_header()
        return self

    def append(self, items: np.ndarray, expected: float) -> None:
        """Appends items.

        Args:
            expected: about how many items the file will hold in the end.

        Raises:
            OSError: the items do not fit on the disk.
        """
        left = memoryview(np.ascontiguousarray(items, self.dtype)).cast("B")
        with needing(expected * self.dtype.itemsize, Path(self.file.name)):
            while left:
                left = left[self.file.write(left) :]
        self.length += len(items)

    def __exit__(self, *failure: object) -> None:
        with self.file:
            if failure == (None, None, None):
                self.file.seek(0)
                self._write_header()  # of the same length: numpy pads it for longer shapes

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.length,),
        }
        write_array_header_1_0(self.file, header)


def _over_chunks(
    work: Callable, chunks: Sequence[tuple[int, int]], path: Path, workers: int, doing: str
) -> Iterator:
    """Results of `work(start, stop)` for every chunk of a file, in the order of the file."""
    starts, stops = [a for a, _ in chunks], [b for _, b in chunks]
    title = f"{doing} {path.name}"
    try:
        with _mapper(work, min(workers, len(chunks) // CHUNKS_PER_WORKER)) as parallel_map:
            results = parallel_map(starts, stops)
            yield from tracked(results, title, len(chunks))
    except BrokenProcessPool:
        raise InputError(
            f"{path}: a process that was {doing} it has ended, for want of memory or because a "
            'script lacks `if __name__ == "__main__":`; run the command again'
        ) from None


@contextmanager
def _mapper(work: Callable, workers: int):
    """A `map` of `work`, by a process pool for more than one worker: each process gets `work`,
    which may hold a large dictionary, once and not with every chunk."""
    if workers <= 1:
        yield partial(map, work)
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _Worker.start, (work,)) as pool:
        yield partial(pool.map, _Worker.run)


class _Worker:
    """Holds `work` in a process of the pool."""

    work: Callable

    @classmethod
    def start(cls, work: Callable) -> None:
        cls.work = staticmethod(work)

    @classmethod
    def run(cls, *chunk):
        return cls.work(*chunk)


def _chunks(path: Path, ids: bool) -> list[tuple[int, int]]:
    """Byte ranges of a file that hold whole lines of text, or whole ids."""
    try:
        size = path.stat().st_size
        if ids:
            starts = range(0, size, CHUNK_BYTES + CHUNK_BYTES % ID_TYPE.itemsize)
            return list(zip(starts, [*starts[1:], size], strict=True)) if size else []
        return list(_whole_lines(path, size))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a file that can be read") from None


def _whole_lines(path: Path, size: int) -> Iterator[tuple[int, int]]:
    with open(path, "rb") as file:
        start = 0
        while start < size:
            file.seek(min(start + CHUNK_BYTES, size))
            file.readline()
            stop = min(file.tell(), size)
            yield start, stop
            start = stop


def _read_bytes(path: Path, start: int, stop: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


def _read_text(path: Path, start: int, stop: int, level: Level) -> str:
    """The text of a chunk; at byte level each byte becomes the character of the same number."""
    data = _read_bytes(path, start, stop)
    if level == "byte":
        return data.decode("latin-1")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {start + error.start} is not UTF-8; expected a UTF-8 text file"
        ) from None
    if start == 0:
        text = text.removeprefix(BYTE_ORDER_MARK)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _count_chunk(path: Path, start: int, stop: int, level: Level | Literal["id"]) -> Counter[str]:
    if level == "id":
        ids = np.frombuffer(_read_bytes(path, start, stop), ID_TYPE)
        return Counter({str(i): n for i, n in enumerate(np.bincount(ids).tolist()) if n})
    text = _read_text(path, start, stop, level)
    if level == "word":
        return Counter(text.split())
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    points = np.where(points == ord(" "), ord(SPACE_SYMBOL), points)
    return Counter(
        {
            chr(point): int(n)
            for point, n in zip(*np.unique(points, return_counts=True), strict=True)
            if point != ord("\n")
        }
    )


def _encode_chunk(
    path: Path, start: int, stop: int, dictionary: Dictionary, dtype: np.dtype, ids: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a chunk and, int64 `[lines]`, the offset after the last token of each line."""
    if ids:
        numbers = np.frombuffer(_read_bytes(path, start, stop), ID_TYPE)
        found = [dictionary.ids.get(str(i), UNK) for i in range(int(numbers.max()) + 1)]
        return np.array(found, dtype=dtype)[numbers], np.empty(0, dtype=np.int64)
    text = _read_text(path, start, stop, dictionary.level)
    if dictionary.level == "word" and text and not text.endswith("\n"):
        text += "\n"
    marked = dictionary.encode_marked(text)
    ends = np.flatnonzero(marked == NEWLINE)
    marked[ends] = EOS
    return marked.astype(dtype), ends + 1


def default_workers() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
