"""`BinarizedCorpus`: the files of a corpus as token ids, made at the first use and kept in a cache.

A binarised corpus is a folder with dict.txt, one folder per split (see `binarize`) and meta.json,
which is written last: a folder without it is made again. The folder's name holds a digest of the
files and of the settings that decide the ids. Opening it checks that the arrays are those that were
written, by their fingerprint, unless they have not changed since (see `common.digests`).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from neighborlm.common.contracts import TextSize
from neighborlm.common.contracts import TokenStream as AnyTokenStream
from neighborlm.common.digests import compare_once
from neighborlm.common.errors import InputError, raise_no_memory
from neighborlm.common.files import digest_of, publish_folder, write_whole
from neighborlm.datamodules.binarize import (
    TokenStream,
    binarize,
    count_symbols,
    default_workers,
)
from neighborlm.datamodules.corpora import SPLITS, CorpusFiles, resolve_corpus
from neighborlm.datamodules.dictionary import BYTE_ORDER_MARK, UNK, Dictionary, Level

Protocol = Literal["neighborlm", "knn-transformers"]
"""How a text becomes rows: every token is scored once, or as in the program of this name."""
CACHE_VERSION = 1  # raise it when the meaning of the files changes
ARRAYS = ("tokens.npy", "line_starts.npy")
FILES_OF_SPLIT = 4 << 12
"""Bytes that a disk gives the files of a split and of the corpus besides their contents."""
STAMPS = ".stamps"
"""Of arrays that have been compared with their fingerprints."""
MUCH_UNKNOWN = 0.1
"""Share of `<unk>` in a split above which a warning is printed."""


@dataclass(frozen=True)
class CorpusSettings:
    """Which corpus is read, and what its tokens are.

    Attributes:
        corpus: a folder, or the name of a known corpus.
        level: what a token is.
        threshold: words rarer than this in the training text become `<unk>`.
        dictionary: an existing dict.txt to use in place of the training text's own.
        cache_dir: folder of downloads and binarised corpora.
        tokenizer: a Hugging Face tokenizer, which the four settings that follow are for.
        tokenizer_revision: of a name on the hub.
        text_column: of records.
        separator: a line that stands between documents.
        protocol: how text becomes rows.
        window: tokens that a row reads, where the protocol cuts the text by it.
    """

    corpus: str
    level: Level = "word"
    threshold: int = 0
    dictionary: str | None = None
    cache_dir: Path = Path(".cache")
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    text_column: str | None = None
    separator: str | None = None
    protocol: Protocol = "neighborlm"
    window: int | None = None

    @property
    def unit(self) -> str:
        """What a token is: `word`, `char`, `byte`, or a `subword` of a tokenizer."""
        return self.level if self.tokenizer is None else "subword"


class BinarizedCorpus:
    """A corpus of text files, or of token files of nanoGPT, as ids that are sorted by frequency.

    Args:
        settings: which corpus it is, and what its tokens are.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        self.settings = settings
        self._streams: dict[str, TokenStream] = {}

    @cached_property
    def files(self) -> CorpusFiles:
        """The files of the corpus, downloaded or made if they are missing."""
        return resolve_corpus(self.settings.corpus, self.settings.cache_dir)

    @property
    def name(self) -> str:
        """Name of the folder or of the known corpus."""
        return self.files.name

    @cached_property
    def folder(self) -> Path:
        """The folder of the binarised corpus, made if it is missing."""
        folder = self.settings.cache_dir / f"{self.name}-{self._fingerprint_of_input()}"
        publish_folder(
            folder,
            self._make,
            "--data.cache_dir",
            lambda f: (f / "meta.json").is_file(),
            sum(path.stat().st_size for path in self.files.paths)
            + FILES_OF_SPLIT * len(self.files.splits),
        )
        return folder

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The contents of meta.json: `fingerprints` by split and, except in corpora of older
        versions, the fingerprint of the `dictionary`, `statistics` by split and the digest of the
        others."""
        return read_meta(self.folder)

    @cached_property
    def dictionary(self) -> Dictionary:
        """The vocabulary."""
        dictionary = Dictionary.load(self.folder / "dict.txt")
        if self.meta.get("dictionary", dictionary.fingerprint) != dictionary.fingerprint:
            raise damage_in(self.folder, "dict.txt")
        dictionary.level = self._level  # older versions did not record it
        return dictionary

    def has(self, split: str) -> bool:
        """Whether the corpus has a split."""
        return split in self.files.splits

    def stream(self, split: str) -> AnyTokenStream:
        """The tokens of a split, memory-mapped.

        Raises:
            InputError: the corpus has no such split, or its files are damaged.
        """
        self._refuse_unknown(split)
        if split not in self._streams:
            folder, expected = self.folder / split, self.fingerprint(split)
            try:
                stream = TokenStream.open(folder)
            except (OSError, ValueError, EOFError) as error:
                raise_no_memory(error)
                raise damage_in(self.folder, split) from None
            stamps = self.folder / STAMPS
            files = dict.fromkeys(arrays_of(folder), expected)
            compare_once(stamps, files, lambda _: self.verify(split, stream))
            self._streams[split] = stream
        return self._streams[split]

    def fingerprint(self, split: str) -> str:
        """Identifies the tokens of a split and the ends of its lines."""
        self._refuse_unknown(split)
        return self.meta["fingerprints"][split]

    def text_size(self, split: str, scored: np.ndarray | None = None) -> TextSize | None:
        """See `common.contracts.Corpus.text_size`; known of whole splits of text alone."""
        if scored is not None or self.files.ids:
            return None
        words = size = 0
        with open(self.files.split(split), "rb") as file:
            for line in file:
                words += len(line.decode(errors="replace").split())
                size += len(line)
        return TextSize(words, size)

    def verify(self, split: str, stream: AnyTokenStream | None = None) -> None:
        """Reads a whole split and compares its digest with that of what was written.

        Raises:
            InputError: the split is damaged.
        """
        if fingerprint_of_tokens(stream or self.stream(split)) != self.fingerprint(split):
            raise damage_in(self.folder, split)

    def _refuse_unknown(self, split: str) -> None:
        if self.has(split):
            return
        splits = ", ".join(self.files.splits)
        if split in SPLITS:
            raise InputError(
                f"--data.corpus {self.settings.corpus}: has no {split} split, which this command "
                f"needs; expected its file beside those of {splits}"
            )
        raise InputError(f"--split is {split}; expected one of {splits}")

    # -- making it -------------------------------------------------------------------------------

    @property
    def _level(self) -> Level:
        """Level of the dictionary; the decimal numbers of token files count as words."""
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
        if not self.files.ids and self.files.splits != SPLITS:
            digest.update(",".join(self.files.splits).encode())
        for split in self.files.splits:
            with open(self.files.split(split), "rb") as file:
                marked = file.read(3) == BYTE_ORDER_MARK.encode()
                if marked and unit in ("word", "char"):
                    digest.update(b"without byte order mark")  # older versions took it for text
                file.seek(0)
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        return digest.hexdigest()

    def _make(self, making: Path) -> None:
        """Fills the folder of the binarised corpus and prints a report."""
        files, settings, workers = self.files, self.settings, default_workers()
        dictionary = self._given_dictionary
        if dictionary is None:
            if files.train is None:
                raise InputError(
                    f"--data.corpus {settings.corpus}: has no train split, of whose symbols the "
                    "dictionary is made; expected its file, or the model's dict.txt as "
                    "--data.dictionary"
                )
            counts = count_symbols(files.train, "id" if files.ids else settings.level, workers)
            dictionary = Dictionary.from_counts(counts, settings.threshold, level=self._level)
        dictionary.save(making / "dict.txt")
        fingerprints, statistics = {}, {}
        for split in files.splits:
            (making / split).mkdir()
            binarize(files.split(split), dictionary, making / split, workers, files.ids)
            stream = TokenStream.open(making / split)
            fingerprints[split] = fingerprint_of_tokens(stream)
            statistics[split] = statistics_of(stream)
        meta = {
            "fingerprints": fingerprints,
            "dictionary": dictionary.fingerprint,
            "level": dictionary.level,
            "statistics": statistics,
        }
        write_meta(making, meta)
        print("\n".join(self._report(len(dictionary), statistics)), flush=True)

    def _report(self, vocab_size: int, statistics: dict[str, dict[str, int]]) -> list[str]:
        """Lines that describe the corpus at its first use."""
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
            return f"--data.dictionary {settings.dictionary} was made from another text"
        if self._level != "word" or self.files.ids:
            return "the training split lacks these symbols: it is small, or of another kind"
        rare = (
            f"a --data.threshold below {settings.threshold}, or "
            if settings.threshold > 1
            else "or "
        )
        return (
            "words are split at white space alone, so that `end.` and `end` are two; what "
            "helps is separate punctuation (neighborlm prepare FILES --output FOLDER --tokenize), "
            f"{rare}--data.level char"
        )


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Writes meta.json with a digest of the rest of it."""
    write_whole(folder / "meta.json", json.dumps({**meta, "digest": _digest_of_meta(dict(meta))}))


def read_meta(folder: Path) -> dict[str, Any]:
    """See `BinarizedCorpus.meta`.

    Raises:
        InputError: it is damaged.
    """
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta.pop("digest", None) not in (None, _digest_of_meta(meta)):
            raise ValueError("not what was written")
        return {**meta, "fingerprints": dict(meta["fingerprints"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise_no_memory(error)
        raise damage_in(folder, "meta.json") from None


def verify_folder(folder: Path) -> None:
    """Reads a binarised corpus and compares it with its fingerprints.

    Raises:
        InputError: it is damaged.
    """
    meta = read_meta(folder)
    if "tokenizer" not in meta:
        found = Dictionary.load(folder / "dict.txt").fingerprint
        if meta.get("dictionary", found) != found:
            raise damage_in(folder, "dict.txt")
    for split, expected in meta["fingerprints"].items():
        try:
            found = fingerprint_of_tokens(TokenStream.open(folder / split))
        except (OSError, ValueError, EOFError) as error:
            raise_no_memory(error)
            found = None
        if found != expected:
            raise damage_in(folder, split)


def damage_in(folder: Path, name: str) -> InputError:
    """What is said of a file or folder in a binarised corpus that is not what was written."""
    return InputError(
        f"{folder / name}: is damaged, it is not what was written there; remove {folder}, and the "
        "same command makes it again"
    )


def fingerprint_of_tokens(stream: AnyTokenStream) -> str:
    """A hash of the ids and of the ends of lines, independent of their integer types."""
    digest = hashlib.blake2b(digest_size=8)
    for array in (stream.tokens, stream.line_starts):
        step = 1 << 22
        for start in range(0, len(array), step):
            digest.update(array[start : start + step].astype("<i8").tobytes())
    return digest.hexdigest()


def statistics_of(stream: AnyTokenStream) -> dict[str, int]:
    """Numbers of tokens, lines and unknown tokens of a split."""
    return {
        "tokens": len(stream.tokens),
        "lines": len(stream.line_starts) - 1,
        "unknown": int(np.count_nonzero(stream.tokens == UNK)),
    }


def arrays_of(folder: Path) -> list[Path]:
    """The files of a split's arrays."""
    return [folder / name for name in ARRAYS]


def _digest_of_meta(meta: dict[str, Any]) -> str:
    return digest_of(json.dumps(meta, sort_keys=True))
