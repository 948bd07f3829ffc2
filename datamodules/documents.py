"""The documents of a raw corpus, split by split, in pieces that fit into memory.

A folder holds a file or several for each split (`train.txt`, `validation.jsonl`,
`test-00000-of-00002.parquet`, `wiki.train.raw`), or is what the `datasets` library has saved to
disk. In .txt a file is a document, or what stands between lines that separate documents; elsewhere
a record is one. Where nothing says which text is for training, documents are dealt to splits.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from neighborlm.common.errors import InputError
from neighborlm.datamodules.corpora import KNOWN_CORPORA, SPLITS, resolve_corpus
from neighborlm.datamodules.dictionary import BYTE_ORDER_MARK

PIECE = 1 << 18
"""Characters after which a document is cut at the end of a line."""
NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing"),
}
TEXT, RECORDS = (".txt", ".tokens", ".raw"), (".jsonl", ".json", ".parquet")
SHARES = np.array([0.9, 0.05, 0.05])
SEED = 1
EXPECTED = "train.txt, valid.txt and test.txt, or files named so of .jsonl or .parquet"


@dataclass(frozen=True)
class Piece:
    """A piece of a document.

    Attributes:
        text: of it.
        is_last: whether the document ends behind it.
    """

    text: str
    is_last: bool


class Documents:
    """The documents of a corpus.

    Args:
        corpus: a folder, or the name of a known corpus.
        cache_dir: of known corpora.
        separator: a line that stands between the documents of a .txt file, '' for a blank one;
            None where each file is a document.
        column: of the text in records; None for `text`, or else the only column of text.

    Attributes:
        name: of the folder or of the known corpus.
        dealt: how documents were dealt to splits, a sentence; None where files say it.

    Raises:
        InputError: there is no such corpus, or it has no text for training.
    """

    def __init__(
        self, corpus: str, cache_dir: Path, separator: str | None = None, column: str | None = None
    ) -> None:
        self.separator = separator
        self.column = column
        self.dealt: str | None = None
        self.folder = Path(corpus).expanduser()
        self.name = self.folder.resolve().name
        self.files: dict[str, list[Path]] = {}
        if corpus in KNOWN_CORPORA and not self.folder.is_dir():
            known = resolve_corpus(corpus, cache_dir)
            self.name = known.name
            self.files = {split: [known.split(split)] for split in known.splits}
        elif not corpus or not self.folder.is_dir():
            resolve_corpus(corpus, cache_dir)  # says what is wrong with it
        elif not self.is_saved_dataset:
            self.files = find_files(self.folder)

    @property
    def is_saved_dataset(self) -> bool:
        """Whether the folder is what `datasets` has saved."""
        names = ("dataset_dict.json", "dataset_info.json")
        return any((self.folder / name).is_file() for name in names)

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The splits that the corpus has."""
        if self.is_undivided:
            return SPLITS
        named = set(self._saved) if self.is_saved_dataset else set(self.files)
        return tuple(split for split in SPLITS if split in named)

    @property
    def is_undivided(self) -> bool:
        """Whether nothing says which text belongs to which split."""
        return set(self._saved if self.is_saved_dataset else self.files) == {"all"}

    @property
    def paths(self) -> list[Path]:
        """All files."""
        if self.is_saved_dataset:
            return sorted(self.folder.rglob("*.arrow"))
        return [path for paths in self.files.values() for path in paths]

    def fingerprint(self) -> str:
        """Identifies the files and what is read of them."""
        digest = hashlib.blake2b(repr((self.separator, self.column)).encode(), digest_size=8)
        files = {"saved": self.paths} if self.is_saved_dataset else self.files
        for split, paths in files.items():
            digest.update(split.encode())
            for path in paths:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "blake2b").digest())
        return digest.hexdigest()

    def pieces(self, split: str) -> Iterator[Piece]:
        """The documents of a split, piece by piece."""
        if not self.is_undivided:
            yield from self._pieces_of(split)
            return
        wanted, cuts = SPLITS.index(split), self._cuts
        if cuts is not None:
            yield from between(self._pieces_of("all"), *cuts[wanted : wanted + 2])
            return
        document = 0
        for piece in self._pieces_of("all"):
            if self._dealt_to[document] == wanted:
                yield piece
            document += piece.is_last

    def lines(self, pieces: Iterator[Piece]) -> Iterator[str]:
        """The lines of a .txt file, each with its end, or the records of other files."""
        if self.files and next(iter(self.files.values()))[0].suffix in TEXT:
            for piece in pieces:
                yield from io.StringIO(piece.text, newline="\n")
            return
        begun: list[str] = []
        for piece in pieces:
            begun.append(piece.text)
            if piece.is_last:
                yield "".join(begun)
                begun = []

    # -- where files do not say it ---------------------------------------------------------------

    @cached_property
    def _sizes(self) -> np.ndarray:
        """Characters of each document, int64."""
        sizes = [0]
        for piece in self._pieces_of("all"):
            sizes[-1] += len(piece.text)
            if piece.is_last:
                sizes.append(0)
        return np.array(sizes[:-1], dtype=np.int64)

    @cached_property
    def _dealt_to(self) -> np.ndarray:
        """The number of each document's split, int64."""
        splits = deal(self._sizes, SHARES, SEED)
        counts = np.bincount(splits, minlength=len(SPLITS))
        held = ", ".join(f"{name} {n:,}" for name, n in zip(SPLITS, counts.tolist(), strict=True))
        self.dealt = f"its {len(splits):,} documents are dealt to splits at random: {held}"
        return splits

    @cached_property
    def _cuts(self) -> np.ndarray | None:
        """Characters of all documents behind which a split begins, where there are too few of them
        to be dealt; None where there are enough."""
        if len(self._sizes) >= len(SPLITS):
            return None
        unit = "document" if len(self._sizes) == 1 else "documents"
        self.dealt = (
            f"holds {len(self._sizes)} {unit}, too few to be dealt to splits: the first 90 % of "
            "the text are for training, the next 5 % for validation and the last 5 % for the test, "
            "cut at ends of lines; --data.separator LINE names what stands between documents"
        )
        whole = int(self._sizes.sum())
        return np.array([0, *(np.cumsum(SHARES[:-1]) * whole).astype(np.int64), whole])

    # -- reading ---------------------------------------------------------------------------------

    def _pieces_of(self, split: str) -> Iterator[Piece]:
        if self.is_saved_dataset:
            yield from self._pieces_of_records(self._saved[split])
            return
        paths = self.files[split]
        if paths[0].suffix in TEXT:
            for path in paths:
                yield from pieces_of_text(path, self.separator)
            return
        library = import_datasets()
        builder = "parquet" if paths[0].suffix == ".parquet" else "json"
        given = {"data_files": list(map(str, paths)), "split": "train", "streaming": True}
        try:
            yield from self._pieces_of_records(library.load_dataset(builder, **given))
        except InputError:
            raise
        except (library.exceptions.DatasetsError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{paths[0]}: cannot be read ({reason}); expected records with a column of text"
            ) from error

    @cached_property
    def _saved(self) -> dict:
        """What `datasets` has saved, by split."""
        library = import_datasets()
        try:
            saved = library.load_from_disk(str(self.folder))
        except (FileNotFoundError, ValueError, OSError) as error:
            raise InputError(
                f"{self.folder}: cannot be read as a saved dataset ({error}); expected what "
                "save_to_disk of datasets writes"
            ) from error
        if not isinstance(saved, dict):
            return {"all": saved}
        return split_names({name: saved[name] for name in saved}, str(self.folder))

    def _pieces_of_records(self, records) -> Iterator[Piece]:
        column = None
        for record in records:
            column = column or self._column_of(record)
            yield from cut(record[column] or "")

    def _column_of(self, record: dict) -> str:
        """The column of the text."""
        texts = [name for name, value in record.items() if isinstance(value, str)]
        wanted = self.column or ("text" if "text" in texts or len(texts) != 1 else texts[0])
        if wanted in texts:
            return wanted
        raise InputError(
            f"--data.text_column {wanted}: {self.folder} has no such column of text, but "
            f"{', '.join(record)}; expected one of {', '.join(texts) or 'some'}"
        )


def import_datasets():
    """The library, which most texts do without."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong becomes an error
    return datasets


def find_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split; all of them under `all` where no name says what they are for.

    Raises:
        InputError: there is no text, or some for training without any for validation.
    """
    found: dict[str, list[Path]] = {}
    places = [folder, folder / "data"]
    files = [p for place in places if place.is_dir() for p in sorted(place.iterdir())]
    for split, names in NAMES.items():
        pattern = re.compile(rf"(wiki\.)?({'|'.join(names)})([-_.]\d.*)?")
        of_split = [p for p in files if pattern.fullmatch(p.stem) and p.is_file()]
        for suffixes in (TEXT, RECORDS):
            paths = [p for p in of_split if p.suffix in suffixes]
            if paths and split not in found:
                found[split] = [p for p in paths if p.suffix == paths[0].suffix]
    if not found:
        everything = sorted(p for p in folder.rglob("*") if p.suffix in TEXT + RECORDS)
        everything = [p for p in everything if p.suffix == everything[0].suffix]
        if not everything:
            held = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise InputError(f"{folder} holds {held}; expected {EXPECTED}")
        return {"all": everything}
    return split_names(found, str(folder))


def split_names(found: dict, where: str) -> dict:
    """What there is of each split, under our names.

    Raises:
        InputError: a split is missing that no command does without.
    """
    ours = {name: split for split, names in NAMES.items() for name in names}
    named = {ours[name]: value for name, value in found.items() if name in ours}
    if set(found) == {"train"} and named:
        return {"all": named["train"]}
    missing = [split for split in ("train", "valid") if split not in named]
    if missing:
        raise InputError(
            f"{where}: has text for {', '.join(found)}, but none for {' and '.join(missing)}; "
            f"expected {EXPECTED}"
        )
    return named


def pieces_of_text(path: Path, separator: str | None) -> Iterator[Piece]:
    """The documents of a .txt file, whose text is kept to the byte but for a byte order mark."""
    lines: list[str] = []
    size, begun = 0, False
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for number, line in enumerate(file):
                line = line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line
                if separator is not None and line.strip() == separator.strip():
                    if lines or begun:
                        yield Piece("".join(lines), is_last=True)
                    lines, size, begun = [], 0, False
                    continue
                if size >= PIECE:
                    yield Piece("".join(lines), is_last=False)
                    lines, size, begun = [], 0, True
                lines.append(line)
                size += len(line)
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8; expected a UTF-8 text file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a readable file") from None
    if lines:
        yield Piece("".join(lines), is_last=True)


def cut(text: str) -> Iterator[Piece]:
    """A document in pieces that end at ends of lines, where it has any."""
    start = 0
    while len(text) - start > PIECE:
        end = text.find("\n", start + PIECE) + 1
        if end in (0, len(text)):
            break
        yield Piece(text[start:end], is_last=False)
        start = end
    yield Piece(text[start:], is_last=True)


def between(pieces: Iterator[Piece], first: int, last: int) -> Iterator[Piece]:
    """The lines of which the first character is one of those from `first` on and before `last`, as
    documents."""
    begin = 0
    for piece in pieces:
        lines = piece.text.splitlines(keepends=True)
        starts = begin + np.cumsum([0, *map(len, lines)])
        low, high = np.searchsorted(starts[:-1], [first, last])
        text, begin = "".join(lines[low:high]), int(starts[-1])
        if text:
            yield Piece(text, piece.is_last or begin >= last)


def deal(sizes: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Number of the split of each document, int64: in a drawn order, the split in whose share of
    the text the middle of the document lies; no split stays without one.

    Args:
        sizes: int64 `[documents]`, three at least.
        shares: fp64 `[splits]`.
    """
    order = np.random.default_rng(seed).permutation(len(sizes))
    ends = np.cumsum(sizes[order])
    middles = (ends - sizes[order] / 2) / ends[-1]
    splits = np.empty(len(sizes), dtype=np.int64)
    splits[order] = np.searchsorted(np.cumsum(shares)[:-1], middles, side="right")
    for missing in np.flatnonzero(np.bincount(splits, minlength=len(shares)) == 0):
        largest = np.bincount(splits, minlength=len(shares)).argmax()
        splits[order[splits[order] == largest][-1]] = missing
    return splits
