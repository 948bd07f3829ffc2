"""The vocabulary, in the `dict.txt` format of fairseq.

Ids 0 to 3 are `<s>`, `<pad>`, `</s>` and `<unk>`; the lines of dict.txt (`symbol count`, most
frequent first) follow in order. The literal text `<unk>` in a corpus is the unknown word itself.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from itertools import count, islice
from pathlib import Path

from neighborlm.common.errors import InputError

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")


class Dictionary:
    """A fixed list of symbols and their counts.

    Args:
        symbols: the ordinary symbols, without the four special ones; symbol i has id i + 4.
        counts: how often each occurred in the training text.
    """

    def __init__(self, symbols: Iterable[str], counts: Iterable[int]) -> None:
        self.symbols = [*SPECIAL_SYMBOLS, *symbols]
        self.counts = [0] * len(SPECIAL_SYMBOLS) + list(counts)

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def ids(self) -> dict[str, int]:
        """From symbol to id."""
        return {symbol: i for i, symbol in enumerate(self.symbols)}

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the symbols and their order; counts do not matter."""
        return hashlib.sha256("\n".join(self.symbols).encode()).hexdigest()[:16]

    @classmethod
    def from_counts(
        cls, counts: Counter[str], threshold: int = 0, padding_factor: int = 8
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
        return cls((symbol for symbol, _ in kept), (n for _, n in kept))

    @classmethod
    def load(cls, path: Path | str) -> "Dictionary":
        """Reads a dict.txt.

        Raises:
            InputError: no such file, not UTF-8, a line that is not `symbol count`, a symbol listed
                twice.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such dictionary; expected a dict.txt file")
        try:
            # Not in text mode: a carriage return is a symbol where tokens are bytes.
            lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: byte {error.start} is not UTF-8; expected a dict.txt file"
            ) from None
        symbols: dict[str, int] = {}
        for number, line in enumerate(lines, 1):
            symbol, _, n = line.removesuffix("\r").rpartition(" ")
            if not symbol or not n.isdecimal():
                raise InputError(
                    f"{path}, line {number}: found {line[:60]!r}, expected 'symbol count'"
                )
            if symbol in symbols or symbol in SPECIAL_SYMBOLS:
                raise InputError(f"{path}, line {number}: {symbol!r} is listed twice")
            symbols[symbol] = int(n)
        return cls(symbols, symbols.values())

    def save(self, path: Path | str) -> None:
        """Writes a dict.txt that `load` (and fairseq) reads back."""
        first = len(SPECIAL_SYMBOLS)
        lines = zip(self.symbols[first:], self.counts[first:], strict=True)
        Path(path).write_bytes("".join(f"{s} {n}\n" for s, n in lines).encode())
