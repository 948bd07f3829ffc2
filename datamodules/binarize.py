"""From a text file to token ids on disk, once, by all cores, in chunks of whole lines.

A binarised split is `tokens.npy` [N] (the smallest unsigned integer that holds the vocabulary;
every line ends with `</s>`) and `line_starts.npy` int64 [lines + 1].
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from rich.progress import track

from neighborlm.common.errors import InputError
from neighborlm.datamodules.dictionary import EOS, UNK, Dictionary

LEVELS = ("word", "char", "byte")
SPACE_SYMBOL = "▁"
CHUNK_BYTES = 4 << 20
CHUNKS_PER_WORKER = 4  # a process costs seconds to start: below this many chunks it does not repay
NEWLINE = -1  # marks a line end among the ids: a literal `</s>` in the text is not one


@dataclass(frozen=True)
class TokenStream:
    """One binarised split.

    Attributes:
        tokens: [N] unsigned ids of all lines one after another, memory-mapped.
        line_starts: [lines + 1] int64; line i is `tokens[line_starts[i] : line_starts[i + 1]]`.
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


def count_symbols(path: Path, level: str, workers: int) -> Counter[str]:
    """How often each symbol of the text occurs."""
    total: Counter[str] = Counter()
    for counts in _over_chunks(
        partial(_count_chunk, level=level), path, workers, f"counting {path.name}"
    ):
        total.update(counts)
    return total


def binarize(path: Path, dictionary: Dictionary, level: str, folder: Path, workers: int) -> None:
    """Writes `tokens.npy` and `line_starts.npy` of a text file to `folder`.

    Unknown symbols become `<unk>`. At word level a line is split at white space and always ends
    with `</s>`; at character and byte level a space is written `▁` and `</s>` stands for the
    newline itself, so that there are as many tokens as characters (bytes).
    """
    dtype = smallest_unsigned(len(dictionary))
    n_tokens = 0
    line_ends: list[np.ndarray] = []
    raw = folder / "tokens.raw"
    encode = partial(_encode_chunk, dictionary=dictionary, level=level, dtype=dtype)
    with open(raw, "wb") as out:
        for ids, ends in _over_chunks(encode, path, workers, f"binarising {path.name}"):
            out.write(ids.tobytes())
            line_ends.append(ends + n_tokens)
            n_tokens += len(ids)
    if n_tokens == 0:
        raise InputError(f"{path}: has no tokens; expected a text with at least one word")
    starts = np.concatenate([[0], *line_ends]).astype(np.int64)
    if starts[-1] != n_tokens:  # a last line without newline, at character level
        starts = np.append(starts, n_tokens)
    np.save(folder / "line_starts.npy", starts)
    tokens = open_memmap(folder / "tokens.npy", mode="w+", dtype=dtype, shape=(n_tokens,))
    tokens[:] = np.memmap(raw, dtype=dtype, mode="r", shape=(n_tokens,))
    tokens.flush()
    raw.unlink()


def _over_chunks(work: Callable, path: Path, workers: int, title: str) -> Iterator:
    """`work(path, start, stop)` for every chunk of whole lines, results in file order."""
    size = path.stat().st_size
    chunks = list(_chunk_bounds(path, size))
    starts, stops = [a for a, _ in chunks], [b for _, b in chunks]
    paths = [path] * len(chunks)
    with _mapper(work, min(workers, len(chunks) // CHUNKS_PER_WORKER)) as parallel_map:
        results = parallel_map(paths, starts, stops)
        yield from track(results, description=title, total=len(chunks), transient=True)


@contextmanager
def _mapper(work: Callable, workers: int):
    """`map` of `work` for one worker, a process pool's for more: there `work`, which may hold a
    large dictionary, goes to each process once and not with every chunk."""
    if workers <= 1:
        yield partial(map, work)
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _Worker.start, (work,)) as pool:
        yield partial(pool.map, _Worker.run)


class _Worker:
    """What a process of the pool does with chunks."""

    work: Callable

    @classmethod
    def start(cls, work: Callable) -> None:
        cls.work = staticmethod(work)

    @classmethod
    def run(cls, *chunk):
        return cls.work(*chunk)


def _chunk_bounds(path: Path, size: int) -> Iterator[tuple[int, int]]:
    with open(path, "rb") as file:
        start = 0
        while start < size:
            file.seek(min(start + CHUNK_BYTES, size))
            file.readline()
            stop = min(file.tell(), size)
            yield start, stop
            start = stop


def _read_lines(path: Path, start: int, stop: int, encoding: str) -> str:
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {start + error.start} is not UTF-8; expected a UTF-8 text file"
        ) from None
    return text if encoding == "latin-1" else text.replace("\r\n", "\n").replace("\r", "\n")


def _code_points(path: Path, start: int, stop: int, level: str) -> np.ndarray:
    text = _read_lines(path, start, stop, "latin-1" if level == "byte" else "utf-8")
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def _count_chunk(path: Path, start: int, stop: int, level: str) -> Counter[str]:
    if level == "word":
        return Counter(_read_lines(path, start, stop, "utf-8").split())
    points = _code_points(path, start, stop, level)
    points = np.where(points == ord(" "), ord(SPACE_SYMBOL), points)
    return Counter(
        {
            chr(point): int(n)
            for point, n in zip(*np.unique(points, return_counts=True), strict=True)
            if point != ord("\n")
        }
    )


def _encode_chunk(
    path: Path, start: int, stop: int, dictionary: Dictionary, level: str, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a chunk and, for each of its lines, the offset after the line's last token."""
    if level == "word":
        ids = _encode_words(_read_lines(path, start, stop, "utf-8"), dictionary)
    else:
        ids = _encode_characters(_code_points(path, start, stop, level), dictionary)
    ends = np.flatnonzero(ids == NEWLINE)
    ids[ends] = EOS
    return ids.astype(dtype), ends + 1


class _IdLookup(dict):
    def __missing__(self, symbol: str) -> int:
        return UNK


def _encode_words(text: str, dictionary: Dictionary) -> np.ndarray:
    if text and not text.endswith("\n"):
        text += "\n"
    mark = "\0newline\0"
    lookup = _IdLookup(dictionary.ids)
    lookup[mark] = NEWLINE
    words = text.replace("\n", f" {mark} ").split()
    return np.fromiter(map(lookup.__getitem__, words), dtype=np.int64, count=len(words))


def _encode_characters(points: np.ndarray, dictionary: Dictionary) -> np.ndarray:
    table = np.full(max(int(points.max(initial=0)), ord(" ")) + 1, UNK, dtype=np.int64)
    for symbol, i in dictionary.ids.items():
        if len(symbol) == 1 and ord(symbol) < len(table):
            table[ord(symbol)] = i
    table[ord(" ")] = dictionary.ids.get(SPACE_SYMBOL, UNK)
    table[ord("\n")] = NEWLINE
    return table[points]


def default_workers() -> int:
    """As many processes as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
