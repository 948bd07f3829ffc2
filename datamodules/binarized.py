"""`BinarizedCorpus`: the files of a corpus as token ids, made at the first use and kept in a cache.

A binarised corpus is a folder with dict.txt, a folder a split (see `binarize`) and meta.json, which
is written last: what is without it is made again. Its name holds a digest of the files and of the
settings that decide the ids. At every opening it is checked that the arrays are those that were
written: by a look at their sizes, times and inodes, and where these have changed, as they do in a
copy, by their digests.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from neighborlm.common.contracts import TokenStream as AnyTokenStream
from neighborlm.common.errors import InputError
from neighborlm.datamodules.binarize import (
    TokenStream,
    binarize,
    count_symbols,
    default_workers,
)
from neighborlm.datamodules.corpora import CorpusFiles, resolve_corpus
from neighborlm.datamodules.dictionary import BYTE_ORDER_MARK, UNK, Dictionary, Level
from neighborlm.datamodules.publishing import publish

CACHE_VERSION = 1  # raise it when the meaning of the files changes
ARRAYS = ("tokens.npy", "line_starts.npy")
MUCH_UNKNOWN = 0.1
"""Share of `<unk>` that is warned of."""


@dataclass(frozen=True)
class CorpusSettings:
    """Which corpus is read, and what its tokens are.

    Attributes:
        corpus: a folder or the name of a known corpus.
        level: what a token is.
        threshold: words rarer than this in the training text become `<unk>`.
        dictionary: an existing dict.txt to use instead of the training text's own.
        cache_dir: where downloads and binarised corpora are kept.
    """

    corpus: str
    level: Level = "word"
    threshold: int = 0
    dictionary: str | None = None
    cache_dir: Path = Path(".cache")


class BinarizedCorpus:
    """A corpus of text files, or of token files of nanoGPT, in the order of their ids' frequency.

    Args:
        settings: which corpus it is.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        self.settings = settings
        self._streams: dict[str, TokenStream] = {}

    @cached_property
    def files(self) -> CorpusFiles:
        """The corpus's files, downloaded or made when they are missing."""
        return resolve_corpus(self.settings.corpus, self.settings.cache_dir)

    @property
    def name(self) -> str:
        """The folder's or the known corpus's."""
        return self.files.name

    @cached_property
    def folder(self) -> Path:
        """The binarised corpus, made when missing."""
        folder = self.settings.cache_dir / f"{self.name}-{self._fingerprint_of_input()}"
        publish(folder, self._make, "--data.cache_dir", lambda f: (f / "meta.json").is_file())
        return folder

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What meta.json says: `fingerprints` by split, and, but for corpora of older versions, the
        `dictionary`'s, `statistics` by split and the `stamps` of files."""
        try:
            meta = json.loads((self.folder / "meta.json").read_bytes())
            return {"stamps": {}, **meta, "fingerprints": dict(meta["fingerprints"])}
        except (OSError, ValueError, KeyError, TypeError):
            raise self._damage("meta.json") from None

    @cached_property
    def dictionary(self) -> Dictionary:
        """The vocabulary."""
        dictionary = Dictionary.load(self.folder / "dict.txt")
        if self.meta.get("dictionary", dictionary.fingerprint) != dictionary.fingerprint:
            raise self._damage("dict.txt")
        dictionary.level = self._level  # which older versions did not record
        return dictionary

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        return split in self.files.splits

    def stream(self, split: str) -> AnyTokenStream:
        """The tokens of a split, memory-mapped.

        Raises:
            InputError: no such split, or its files are damaged.
        """
        self._refuse_unknown(split)
        if split not in self._streams:
            folder = self.folder / split
            try:
                stream = TokenStream.open(folder)
            except (OSError, ValueError, EOFError):
                raise self._damage(split) from None
            if stamps_of(folder) != self.meta["stamps"].get(split):
                self.verify(split, stream)
            self._streams[split] = stream
        return self._streams[split]

    def fingerprint(self, split: str) -> str:
        """Identifies the split's tokens and where its lines end."""
        self._refuse_unknown(split)
        return self.meta["fingerprints"][split]

    def verify(self, split: str, stream: AnyTokenStream | None = None) -> None:
        """Reads all of a split and compares it with what was written.

        Raises:
            InputError: it is damaged.
        """
        if fingerprint_of_tokens(stream or self.stream(split)) != self.fingerprint(split):
            raise self._damage(split)

    def _refuse_unknown(self, split: str) -> None:
        if not self.has(split):
            raise InputError(f"--split is {split}; expected one of {', '.join(self.files.splits)}")

    def _damage(self, what: str) -> InputError:
        return InputError(
            f"{self.folder / what}: is damaged, it is not what was written there; remove "
            f"{self.folder}, and the same command makes it anew"
        )

    # -- making it -------------------------------------------------------------------------------

    @property
    def _level(self) -> Level:
        """What the symbols of the dictionary are; numbers of ids are words."""
        return "word" if self.files.ids else self.settings.level

    @cached_property
    def _given_dictionary(self) -> Dictionary | None:
        chosen = self.settings.dictionary
        return None if chosen is None else Dictionary.load(chosen, self._level)

    def _fingerprint_of_input(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        unit = "id" if self.files.ids else self.settings.level
        digest.update(json.dumps([CACHE_VERSION, unit, self.settings.threshold]).encode())
        if self._given_dictionary is not None:
            digest.update(self._given_dictionary.fingerprint.encode())
        for split in self.files.splits:
            with open(self.files.split(split), "rb") as file:
                marked = file.read(3) == BYTE_ORDER_MARK.encode()
                if marked and unit in ("word", "char"):
                    digest.update(b"without byte order mark")  # older versions took it for text
                file.seek(0)
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        return digest.hexdigest()

    def _make(self, making: Path) -> None:
        """Fills the folder of the binarised corpus, and says what came of it."""
        files, settings, workers = self.files, self.settings, default_workers()
        dictionary = self._given_dictionary
        if dictionary is None:
            counts = count_symbols(files.train, "id" if files.ids else settings.level, workers)
            dictionary = Dictionary.from_counts(counts, settings.threshold, level=self._level)
        dictionary.save(making / "dict.txt")
        fingerprints, statistics, stamps = {}, {}, {}
        for split in files.splits:
            (making / split).mkdir()
            binarize(files.split(split), dictionary, making / split, workers, files.ids)
            stream = TokenStream.open(making / split)
            fingerprints[split] = fingerprint_of_tokens(stream)
            statistics[split] = statistics_of(stream)
            stamps[split] = stamps_of(making / split)
        meta = {
            "fingerprints": fingerprints,
            "dictionary": dictionary.fingerprint,
            "level": dictionary.level,
            "statistics": statistics,
            "stamps": stamps,
        }
        (making / "meta.json").write_text(json.dumps(meta))
        print("\n".join(self._report(len(dictionary), statistics)), flush=True)

    def _report(self, vocab_size: int, statistics: dict[str, dict[str, int]]) -> list[str]:
        """What is said of a corpus at its first use."""
        lines = [f"corpus {self.name}: a vocabulary of {vocab_size:,} symbols"]
        shares = {split: s["unknown"] / s["tokens"] for split, s in statistics.items()}
        for split, s in statistics.items():
            lines.append(
                f"  {split}: {s['tokens']:,} tokens in {s['lines']:,} lines, "
                f"{shares[split]:.1%} of them <unk>"
            )
        worst = max(shares, key=shares.get)
        if shares[worst] > MUCH_UNKNOWN:
            lines.append(
                f"warning: {shares[worst]:.1%} of the {worst} split is <unk>, which counts as one "
                f"word: perplexities say little; {self._advice()}"
            )
        return lines

    def _advice(self) -> str:
        """Why much of a text is unknown, and what to do."""
        settings = self.settings
        if settings.dictionary is not None:
            return f"--data.dictionary {settings.dictionary} is of another text than this"
        if self._level != "word" or self.files.ids:
            return "the training split lacks these symbols: it is small, or of another kind"
        rare = f"lower --data.threshold {settings.threshold}, or " if settings.threshold > 1 else ""
        return (
            "a word is what stands between white space, so that `end.` and `end` are two: separate "
            f"punctuation (neighborlm prepare FILES --output FOLDER --tokenize), {rare}"
            "take --data.level char"
        )


def fingerprint_of_tokens(stream: AnyTokenStream) -> str:
    """A hash of the ids and of where lines end, whatever integer type holds them."""
    digest = hashlib.blake2b(digest_size=8)
    for array in (stream.tokens, stream.line_starts):
        step = 1 << 22
        for start in range(0, len(array), step):
            digest.update(array[start : start + step].astype("<i8").tobytes())
    return digest.hexdigest()


def statistics_of(stream: AnyTokenStream) -> dict[str, int]:
    """Tokens, lines and unknown tokens of a split."""
    return {
        "tokens": len(stream.tokens),
        "lines": len(stream.line_starts) - 1,
        "unknown": int(np.count_nonzero(stream.tokens == UNK)),
    }


def stamps_of(folder: Path) -> list[list[int]]:
    """What tells without reading them that the arrays of a split are the files that were written:
    size, time and inode of each."""
    stats = [(folder / name).stat() for name in ARRAYS]
    return [[stat.st_size, stat.st_mtime_ns, stat.st_ino] for stat in stats]
