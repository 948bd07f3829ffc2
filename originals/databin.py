"""Reads fairseq's memory-mapped data-bin in place, as a corpus, and writes it.

A split is two files: `<split>.bin`, the ids of all lines concatenated, and `<split>.idx`: the
magic, the version (u64), the code of the type of ids (u8), the number of lines (u64), the length of
each line (i32) and the byte at which it begins in the .bin file (i64), all little-endian.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from struct import Struct

import numpy as np
from numpy.typing import DTypeLike

from neighborlm.common.errors import InputError
from neighborlm.common.files import publishing
from neighborlm.datamodules.binarize import TokenStream
from neighborlm.datamodules.binarized import CorpusSettings, fingerprint_of_tokens
from neighborlm.datamodules.dictionary import Dictionary

MAGIC = b"MMIDIDX\0\0"
OTHER_MAGIC = b"TNTIDX\0\0"  # of fairseq's older formats, --dataset-impl lazy and cached
VERSION = 1
HEADER = Struct("<9sQBQ")  # magic, version, type code, lines
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
"""Types of ids by code; codes 9 and 10 came with fairseq 0.10."""
FLOAT_CODES = (6, 7)
UINT16_VOCABULARY = 65500
"""From this many words on, preprocess.py of fairseq 0.9 writes int32 (that of 0.10 uint32)."""
TOKENS_AT_ONCE = 1 << 22


def is_databin(folder: Path | str) -> bool:
    """Whether a folder is a language model's data-bin: it has the .idx of a split, and the .bin of
    one or a dict.txt."""
    folder = Path(folder)
    indexes = list(folder.glob("*.idx"))
    has_data = any(index.with_name(f"{index.stem}.bin").is_file() for index in indexes)
    return bool(indexes) and (has_data or (folder / "dict.txt").is_file())


class DataBin:
    """A data-bin as a corpus, read in place, with all splits that it has.

    Args:
        settings: its folder and, where it has no dict.txt, its dictionary; level and threshold are
            ignored, as they were applied when it was made.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        self.folder = Path(settings.corpus).expanduser()
        self.name = self.folder.resolve().name
        self._chosen = settings.dictionary
        self._streams: dict[str, TokenStream] = {}
        self._fingerprints: dict[str, str] = {}

    @cached_property
    def dictionary(self) -> Dictionary:
        """The vocabulary.

        Raises:
            InputError: there is none, or the chosen one differs from the data-bin's own.
        """
        own = self.folder / "dict.txt"
        if not own.exists():
            if self._chosen is None:
                raise InputError(
                    f"{self.folder}: is a data-bin without dict.txt; pass the one that it was made "
                    "with as --data.dictionary"
                )
            return Dictionary.load(self._chosen)
        dictionary = Dictionary.load(own)
        if (
            self._chosen is not None
            and Dictionary.load(self._chosen).fingerprint != dictionary.fingerprint
        ):
            raise InputError(
                f"--data.dictionary {self._chosen} is another one than that of the data-bin "
                f"{self.folder}, whose ids are fixed"
            )
        return dictionary

    def has(self, split: str) -> bool:
        """Whether the data-bin has a split."""
        return (self.folder / f"{split}.idx").is_file()

    def stream(self, split: str) -> TokenStream:
        """The tokens of a split, memory-mapped; the first call checks all ids.

        Raises:
            InputError: there is no such split, or its files are not of this format or do not fit
                the dictionary.
        """
        if split not in self._streams:
            prefix = self.folder / split
            stream = open_databin(prefix)
            check_ids(stream, len(self.dictionary), f"{prefix}.bin")
            self._streams[split] = stream
        return self._streams[split]

    def fingerprint(self, split: str) -> str:
        """Identifies the tokens of a split and the ends of its lines."""
        if split not in self._fingerprints:
            self._fingerprints[split] = fingerprint_of_tokens(self.stream(split))
        return self._fingerprints[split]

    def text_size(self, split: str, scored: np.ndarray | None = None) -> None:
        """None, as a data-bin does not hold its text."""


def open_databin(prefix: Path | str) -> TokenStream:
    """Maps a split of a data-bin, without reading its ids.

    Args:
        prefix: path of the split without `.bin` and `.idx`, such as `data-bin/train`.

    Returns:
        Its tokens, in the type of the file, and its line starts.

    Raises:
        InputError: a file is missing, is not of this format, or does not fit the other.
    """
    index_path, data_path = _paths(prefix)
    for path in (index_path, data_path):
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected a split of a fairseq data-bin")
    dtype, lines = _read_header(index_path)
    sizes_end = HEADER.size + 4 * lines
    index = np.memmap(index_path, dtype=np.uint8, mode="r")
    sizes = index[HEADER.size : sizes_end].view("<i4")
    pointers = index[sizes_end:].view("<i8")
    line_starts = np.zeros(lines + 1, dtype=np.int64)
    np.cumsum(sizes, out=line_starts[1:])
    if lines and (sizes.min() < 0 or (pointers != line_starts[:-1] * dtype.itemsize).any()):
        raise InputError(
            f"{index_path}: its pointers do not agree with its line lengths; expected the lines "
            f"one after another in {data_path.name}"
        )
    n_tokens, n_bytes = int(line_starts[-1]), data_path.stat().st_size
    if n_bytes != n_tokens * dtype.itemsize:
        raise InputError(
            f"{data_path}: has {n_bytes} bytes; expected {n_tokens * dtype.itemsize}, for the "
            f"{n_tokens:,} tokens of type {dtype.name} in {index_path.name}"
        )
    if n_tokens == 0:
        raise InputError(f"{data_path}: has no tokens; expected at least one")
    return TokenStream(np.memmap(data_path, dtype=dtype, mode="r"), line_starts)


def check_ids(stream: TokenStream, vocab_size: int, name: Path | str) -> None:
    """Checks that all ids are in the vocabulary.

    Args:
        name: of the stream, for the message.

    Raises:
        InputError: an id is not in the vocabulary.
    """
    for tokens in _chunks(stream.tokens):
        for found in (int(tokens.min()), int(tokens.max())):
            if not 0 <= found < vocab_size:
                raise InputError(
                    f"{name}: has token id {found}; expected 0 to {vocab_size - 1}, the ids of a "
                    f"dictionary of {vocab_size:,} symbols"
                )


def write_databin(
    stream: TokenStream, prefix: Path | str, vocab_size: int, dtype: DTypeLike | None = None
) -> None:
    """Writes a split as fairseq's preprocess does, byte for byte.

    Args:
        prefix: path of the split without `.bin` and `.idx`; its folder is made if it is missing.
        vocab_size: of the dictionary, special symbols included.
        dtype: of the ids; None: the one that fairseq chooses for the vocabulary.

    Raises:
        InputError: the format has no such type, or it cannot hold the ids or the line lengths.
    """
    if dtype is None:
        dtype = np.uint16 if vocab_size < UINT16_VOCABULARY else np.int32
    dtype = np.dtype(dtype)
    codes = {np.dtype(name): code for code, name in DTYPES.items()}
    if dtype not in codes:
        names = ", ".join(known.name for known in codes)
        raise InputError(f"{prefix}: found type {dtype.name}; expected one of {names}")
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise InputError(
            f"{prefix}: found type {dtype.name}; expected one that holds {vocab_size} ids"
        )
    check_ids(stream, vocab_size, prefix)
    sizes = np.diff(stream.line_starts)
    if sizes.max(initial=0) > np.iinfo(np.int32).max:
        raise InputError(f"{prefix}: has a line of {sizes.max():,} tokens; expected below 2^31")
    index_path, data_path = _paths(prefix)
    index_path.parent.mkdir(parents=True, exist_ok=True)
    with publishing(data_path) as making, open(making, "wb") as file:
        for tokens in _chunks(stream.tokens):
            file.write(tokens.astype(dtype).tobytes())
    with publishing(index_path) as making, open(making, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, codes[dtype], len(sizes)))
        file.write(sizes.astype("<i4").tobytes())
        file.write((stream.line_starts[:-1] * dtype.itemsize).astype("<i8").tobytes())


def _paths(prefix: Path | str) -> tuple[Path, Path]:
    """Paths of the index and the data. No `with_suffix`: the name of a split may contain dots."""
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin")


def _read_header(path: Path) -> tuple[np.dtype, int]:
    """The type of the ids and the number of lines, checked against the size of the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if header.startswith(OTHER_MAGIC):
        raise InputError(
            f"{path}: is of fairseq's format {OTHER_MAGIC[:6].decode()}; expected "
            f"{MAGIC[:7].decode()}, which preprocess.py writes under --dataset-impl mmap"
        )
    if not header.startswith(MAGIC):
        raise InputError(f"{path}: begins with {header[:9]!r}; expected {MAGIC!r}")
    if len(header) < HEADER.size:
        raise InputError(f"{path}: has {size} bytes; expected a header of {HEADER.size}")
    _, version, code, lines = HEADER.unpack(header)
    if version != VERSION:
        raise InputError(f"{path}: is of version {version}; expected {VERSION}")
    if code not in DTYPES:
        kind = "floating-point numbers" if code in FLOAT_CODES else "an unknown type"
        raise InputError(
            f"{path}: has type code {code}, {kind}; expected one of {sorted(DTYPES)}, integers"
        )
    if size != HEADER.size + 12 * lines:
        raise InputError(
            f"{path}: has {size} bytes; expected {HEADER.size + 12 * lines} for {lines:,} lines"
        )
    return np.dtype(DTYPES[code]), lines


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), TOKENS_AT_ONCE):
        yield tokens[start : start + TOKENS_AT_ONCE]
