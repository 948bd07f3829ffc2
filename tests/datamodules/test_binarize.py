"""Binarisation against a loop over the lines of the text, at every level and chunk size."""

import errno
import io
import os
import resource
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from neighborlm.common.errors import InputError
from neighborlm.datamodules import binarize as module
from neighborlm.datamodules.binarize import (
    NpyWriter,
    TokenStream,
    binarize,
    count_symbols,
    smallest_unsigned,
)
from neighborlm.datamodules.dictionary import EOS, UNK, Dictionary, Level

TEXT = (
    "the cat sat\n"
    "\n"
    "   leading, two  spaces and a\ttab \n"
    "a literal </s> and <unk> and <pad> , unknown words zzz\n"
    "\n\n"
    "spaces:\u00a0no-break\u2003em\u3000ideographic\x0bvertical\x0cfeed\x1cseparator\n"
    "line\u2028separator and next\x85line ▁ ▁literal\n"
    "é naïve 猫 😀 cat the the\n"
)
SYMBOLS = (
    [
        "the",
        "cat",
        "</s>x",
        "a",
        "and",
        "▁",
        "t",
        "h",
        "e",
        "é",
        "猫",
        "😀",
        "Ã",
        "\r",
        "\u2028",
        "▁literal",
        "s",
        "<",
        "/",
    ],
    range(19, 0, -1),
)
DICTIONARY = Dictionary(*SYMBOLS)


def naive(data: bytes, level: str) -> list[list[str]]:
    """The symbols of every line of a text; a line end is a "\\n"."""
    if level == "byte":
        characters = list(data.decode("latin-1"))
    else:
        characters = list(io.TextIOWrapper(io.BytesIO(data), "utf-8", newline=None).read())
    lines = [[]]
    for character in characters:
        lines[-1].append(character)
        if character == "\n":
            lines.append([])
    lines = [line for line in lines if line]
    if level == "word":
        return [[*"".join(line).split(), "\n"] for line in lines]
    return [["▁" if character == " " else character for character in line] for line in lines]


def naive_ids(lines: list[list[str]], symbols: list[str]) -> tuple[list[int], list[int]]:
    """Ids of all lines and where lines start."""
    ids, starts = [], [0]
    for line in lines:
        for symbol in line:
            known = symbols.index(symbol) if symbol in symbols else UNK
            ids.append(EOS if symbol == "\n" else known)
        starts.append(len(ids))
    return ids, starts


VARIANTS = {
    "plain": TEXT.encode(),
    "no newline at the end": TEXT.rstrip("\n").encode(),
    "spaces after the last newline": TEXT.encode() + b"  ",
    "carriage returns": TEXT.replace("\n", "\r\n").encode(),
    "mixed line ends": TEXT.replace("\n\n", "\r\r\n\n").encode() + b"\r",
    "blank lines only": b"\n\n\n",
}


@pytest.mark.parametrize("level", get_args(Level))
@pytest.mark.parametrize("data", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("chunk_bytes", [1, 50, 1 << 20])
def test_equals_a_loop_over_lines(tmp_path, monkeypatch, data, level, chunk_bytes):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    lines = naive(data, level)
    ids, starts = naive_ids(lines, DICTIONARY.symbols)

    binarize(path, Dictionary(*SYMBOLS, level), tmp_path, workers=1)
    stream = TokenStream.open(tmp_path)
    np.testing.assert_array_equal(stream.tokens, ids)
    np.testing.assert_array_equal(stream.line_starts, starts)
    assert stream.line_starts.dtype == np.int64
    assert isinstance(stream.tokens, np.memmap)
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"text.txt", "tokens.npy", "line_starts.npy"}

    counts = Counter(symbol for line in lines for symbol in line if symbol != "\n")
    assert count_symbols(path, level, workers=1) == counts


def test_a_literal_end_of_sentence_ends_no_line(tmp_path):
    (tmp_path / "text.txt").write_text("a </s> b\n</s>\n")
    binarize(tmp_path / "text.txt", Dictionary(["a", "b"], [1, 1]), tmp_path, workers=1)
    stream = TokenStream.open(tmp_path)
    np.testing.assert_array_equal(stream.tokens, [4, EOS, 5, EOS, EOS, EOS])
    np.testing.assert_array_equal(stream.line_starts, [0, 4, 6])


@pytest.mark.parametrize(("level", "length"), [("char", len(TEXT)), ("byte", len(TEXT.encode()))])
def test_as_many_tokens_as_characters(tmp_path, level, length):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    counts = count_symbols(tmp_path / "text.txt", level, workers=1)
    dictionary = Dictionary.from_counts(counts, level=level)
    binarize(tmp_path / "text.txt", dictionary, tmp_path, workers=1)
    tokens = TokenStream.open(tmp_path).tokens
    assert len(tokens) == length
    assert UNK not in tokens
    assert np.count_nonzero(tokens == EOS) == TEXT.count("\n")


def test_several_processes(tmp_path, monkeypatch):
    """At word level, with uneven chunks and more chunks than processes."""
    pools = []

    class Recorded(module.ProcessPoolExecutor):
        def __init__(self, workers, *args):
            pools.append(workers)
            super().__init__(workers, *args)

    monkeypatch.setattr(module, "ProcessPoolExecutor", Recorded)
    monkeypatch.setattr(module, "CHUNK_BYTES", 150)
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 8)
    ids, starts = naive_ids(naive(path.read_bytes(), "word"), DICTIONARY.symbols)
    binarize(path, DICTIONARY, tmp_path, workers=2)
    assert pools == [2]
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npy"), ids)
    np.testing.assert_array_equal(np.load(tmp_path / "line_starts.npy"), starts)


@pytest.mark.parametrize(
    ("symbols", "dtype"),
    [
        *((255, np.uint8), (256, np.uint8), (257, np.uint16)),
        *((65535, np.uint16), (65536, np.uint16), (65537, np.uint32)),
    ],
)
def test_smallest_type_that_holds_the_vocabulary(tmp_path, symbols, dtype):
    assert smallest_unsigned(symbols) == dtype
    words = [f"w{i}" for i in range(symbols - 4)]
    (tmp_path / "text.txt").write_text(f"{words[-1]} {words[0]}\n")
    binarize(tmp_path / "text.txt", Dictionary(words, range(len(words))), tmp_path, 1)
    tokens = TokenStream.open(tmp_path).tokens
    assert tokens.dtype == dtype
    assert tokens.tolist() == [symbols - 1, 4, EOS]


@pytest.mark.parametrize("level", ["word", "char"])
@pytest.mark.parametrize("chunk_bytes", [4, 1 << 20])
def test_not_utf8(tmp_path, monkeypatch, level, chunk_bytes):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "text.txt"
    path.write_bytes(b"fine fine\nfine\nna\xefve\n")
    for work in (
        lambda: count_symbols(path, level, 1),
        lambda: binarize(path, Dictionary(*SYMBOLS, level), tmp_path, 1),
    ):
        with pytest.raises(InputError, match=r"text\.txt: byte 17 is not UTF-8"):
            work()
    binarize(path, Dictionary(*SYMBOLS, "byte"), tmp_path, workers=1)  # bytes are any


@pytest.mark.parametrize("level", get_args(Level))
def test_empty(tmp_path, level):
    path = tmp_path / "text.txt"
    path.touch()
    with pytest.raises(InputError, match=r"text\.txt: has no tokens"):
        binarize(path, Dictionary(*SYMBOLS, level), tmp_path, workers=1)


# -- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
@pytest.mark.parametrize("parts", [[], [0], [1, 0, 9], [100_000, 1]])
def test_a_growing_file_is_what_numpy_would_write(tmp_path, dtype, parts):
    arrays = [np.arange(n) for n in parts]
    with NpyWriter(tmp_path / "a.npy", dtype) as writer:
        for array in arrays:
            writer.append(array, 0)
    np.save(tmp_path / "b.npy", np.concatenate([np.empty(0), *arrays]).astype(dtype))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_a_full_disk_tells_about_how_much_is_needed(tmp_path, monkeypatch):
    """A file that cannot grow gives one sentence; with a memory map it was a bus error."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    path = tmp_path / "text.txt"
    path.write_text("the cat\n" * 10_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            binarize(path, DICTIONARY, tmp_path, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert error.value.needed == pytest.approx(30_000, rel=0.1)  # three tokens a line, a byte each


def end_process(*args, **kwargs) -> None:
    os._exit(1)


def test_a_worker_that_ends_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 20)
    monkeypatch.setattr(module, "_count_chunk", end_process)
    (tmp_path / "text.txt").write_text(TEXT * 8)
    with pytest.raises(InputError, match="a process that was counting it has ended, for want of"):
        count_symbols(tmp_path / "text.txt", "word", workers=2)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(InputError, match="expected a file that can be read"):
            count_symbols(path, "word", workers=1)
