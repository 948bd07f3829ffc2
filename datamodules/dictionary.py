"""The vocabulary, in fairseq's `dict.txt` format; it encodes text as ids and decodes ids to text.

Ids 0 to 3 are `<s>`, `<pad>`, `</s>` and `<unk>`; the lines of dict.txt (`symbol count`, most
frequent first) follow in order. The literal text `<unk>` in a corpus is the unknown word itself.
A dict.txt does not say whether its symbols are words, characters or bytes; a dict.txt.json beside
it records this.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Literal

import numpy as np

from neighborlm.common.errors import InputError
from neighborlm.common.files import write_whole

Level = Literal["word", "char", "byte"]
"""What a token is: a word between white space, a character or a byte."""

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
SPACE_SYMBOL = "▁"
BYTE_ORDER_MARK = "\ufeff"
PADDING_SYMBOL = re.compile(r"madeupword\d{4,}")
OVERWRITE = "#fairseq:overwrite"
COUNT = re.compile(r"-?[0-9]{1,18}")
NEWLINE = -1
"""Marks the end of a line among ids, unlike a literal `</s>` in the text."""
LEVEL_NAMES = {"word": "words", "char": "characters", "byte": "bytes"}


class Dictionary:
    """A fixed list of symbols and their counts.

    Args:
        symbols: the ordinary symbols, without the four special ones; symbol i has id i + 4. Where a
            symbol is repeated, its last id encodes it.
        counts: occurrences of each symbol in the training text.
        level: what a symbol is. At character and byte level a space is written `▁`; a byte is
            written as the character of the same number.
    """

    pad, eos = PAD, EOS
    window_start = None

    def __init__(
        self, symbols: Iterable[str], counts: Iterable[int], level: Level = "word"
    ) -> None:
        self.symbols = [*SPECIAL_SYMBOLS, *symbols]
        self.counts = [0] * len(SPECIAL_SYMBOLS) + list(counts)
        self.level = level

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each symbol."""
        return {symbol: i for i, symbol in enumerate(self.symbols)}

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the symbols and their order; counts do not matter."""
        return hashlib.sha256("\n".join(self.symbols).encode()).hexdigest()[:16]

    @classmethod
    def from_counts(
        cls,
        counts: Counter[str],
        threshold: int = 0,
        padding_factor: int = 8,
        level: Level = "word",
    ) -> "Dictionary":
        """The dictionary of a corpus: most frequent first (alphabetically among equals), words
        rarer than `threshold` left out, padded with `madeupwordNNNN` to a multiple of
        `padding_factor` symbols in all."""
        kept = sorted(
            (
                (symbol, n)
                for symbol, n in counts.items()
                if n >= threshold and symbol not in SPECIAL_SYMBOLS
            ),
            key=lambda item: (-item[1], item[0]),
        )
        padding = -(len(kept) + len(SPECIAL_SYMBOLS)) % padding_factor
        unused = (name for name in map("madeupword{:04d}".format, count()) if name not in counts)
        kept += [(name, 0) for name in islice(unused, padding)]
        return cls((symbol for symbol, _ in kept), (n for _, n in kept), level)

    # -- text ------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text; a newline becomes `</s>`, and an unknown symbol `<unk>`.

        >>> dictionary = Dictionary(["the", "cat"], [2, 1])
        >>> dictionary.encode("the cat sat\\nthe")
        [4, 5, 3, 2, 4]
        """
        if self.level == "byte":
            text = text.encode().decode("latin-1")
        ids = self.encode_marked(text)
        return np.where(ids == NEWLINE, EOS, ids).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, with spaces between words; `</s>` becomes a newline.

        >>> Dictionary(["the", "cat"], [2, 1]).decode([4, 5, 3, 2, 4])
        'the cat <unk>\\nthe'
        """
        if self.level == "word":
            words = ("\n" if i == EOS else self.symbols[i] for i in ids)
            return re.sub(" ?\n ?", "\n", " ".join(words))
        characters = {EOS: "\n"} | (
            {self.ids[SPACE_SYMBOL]: " "} if SPACE_SYMBOL in self.ids else {}
        )
        symbols = (characters.get(i, self.symbols[i]) for i in ids)
        if self.level == "char":
            return "".join(symbols)
        return b"".join(s.encode("latin-1", "replace") for s in symbols).decode(errors="replace")

    def encode_marked(self, text: str) -> np.ndarray:
        """Ids int64 of a text, with `NEWLINE` for each newline. At byte level the text has one
        character of the same number per byte."""
        if self.level != "word":
            return self._encode_characters(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32))
        words = text.replace("\n", f" {_NEWLINE_WORD} ").split()
        return np.fromiter(map(self._word_ids.__getitem__, words), dtype=np.int64, count=len(words))

    @cached_property
    def _word_ids(self) -> "_IdLookup":
        return _IdLookup(self.ids | {_NEWLINE_WORD: NEWLINE})

    @cached_property
    def _character_ids(self) -> np.ndarray:
        """Ids int64 by code point; the last one is for all code points from there on."""
        single = {symbol: i for symbol, i in self.ids.items() if len(symbol) == 1}
        highest = max(map(ord, [*single, SPACE_SYMBOL]))
        table = np.full(highest + 2, UNK, dtype=np.int64)
        table[[ord(symbol) for symbol in single]] = list(single.values())
        table[ord(" ")] = self.ids.get(SPACE_SYMBOL, UNK)
        table[ord("\n")] = NEWLINE
        return table

    def _encode_characters(self, points: np.ndarray) -> np.ndarray:
        return self._character_ids[np.minimum(points, len(self._character_ids) - 1)]

    # -- files -----------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: Path | str, level: Level | None = None) -> "Dictionary":
        """Reads a dict.txt, ours or fairseq's.

        Args:
            level: the level that its symbols must have; None: the one recorded beside it, or words.

        Raises:
            InputError: no such file, not UTF-8, a line that is not `symbol count`, a symbol listed
                twice without fairseq's mark for that, or symbols of another level.
        """
        path = Path(path)
        symbols, counts = _read(path)
        recorded = _recorded_level(path)
        dictionary = cls(symbols, counts, level or recorded or "word")
        if level is not None:
            found = recorded or _level_of(symbols, level)
            if found != level:
                raise InputError(
                    f"{path}: is a dictionary of {LEVEL_NAMES[found]}, but --data.level is "
                    f"{level}; expected --data.level {found}, or a dictionary of "
                    f"{LEVEL_NAMES[level]}"
                )
        return dictionary

    def save(self, path: Path | str) -> None:
        """Writes a dict.txt, which `load` and fairseq read, and its level beside it."""
        path, first = Path(path), len(SPECIAL_SYMBOLS)
        lines, before = [], set(SPECIAL_SYMBOLS)
        for symbol, n in zip(self.symbols[first:], self.counts[first:], strict=True):
            lines.append(f"{symbol} {n} {OVERWRITE}\n" if symbol in before else f"{symbol} {n}\n")
            before.add(symbol)
        write_whole(path, "".join(lines))
        recorded = {"level": self.level, "sha256": _sha256(path)}
        write_whole(_record_of(path), json.dumps(recorded))


class _IdLookup(dict):
    def __missing__(self, symbol: str) -> int:
        return UNK


_NEWLINE_WORD = "\0newline\0"


def _read(path: Path) -> tuple[list[str], list[int]]:
    """Symbols and counts of a dict.txt."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such dictionary"
        raise InputError(f"{path}: {found}; expected a dict.txt file")
    try:
        # Not in text mode, where a carriage return, which may be a symbol, would end a line.
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; expected a dict.txt file"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a dict.txt file") from None
    if not text.startswith(f"{BYTE_ORDER_MARK} "):  # here the mark is a symbol
        text = text.removeprefix(BYTE_ORDER_MARK)
    symbols, counts, before = [], [], set(SPECIAL_SYMBOLS)
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        line = line.removesuffix("\r")
        symbol, _, n = line.removesuffix(f" {OVERWRITE}").rpartition(" ")
        if not symbol or not COUNT.fullmatch(n):
            raise InputError(f"{path}, line {number}: found {line[:60]!r}, expected 'symbol count'")
        if symbol in before and not line.endswith(f" {OVERWRITE}"):
            raise InputError(f"{path}, line {number}: {symbol!r} is listed twice")
        before.add(symbol)
        symbols.append(symbol)
        counts.append(int(n))
    return symbols, counts


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _recorded_level(path: Path) -> Level | None:
    """The level recorded beside a dict.txt, unless the record is of another file or damaged."""
    try:
        recorded = json.loads(_record_of(path).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(recorded, dict) or recorded.get("sha256") != _sha256(path):
        return None
    level = recorded.get("level")
    return level if level in LEVEL_NAMES else None


def _level_of(symbols: list[str], level: Level) -> Level:
    """The wanted level where the symbols can have it, else the one that they must have: symbols of
    several characters are words, and single characters with `▁` among them are characters."""
    longer = any(len(s) > 1 and not PADDING_SYMBOL.fullmatch(s) for s in symbols)
    if level == "word":
        return "word" if longer or SPACE_SYMBOL not in symbols else "char"
    if longer:
        return "word"
    beyond = any(len(s) == 1 and ord(s) > 0xFF and s != SPACE_SYMBOL for s in symbols)
    return "char" if level == "byte" and beyond else level


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
