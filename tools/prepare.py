"""From raw text files to a corpus folder, split by document:

    neighborlm prepare books/ --output corpora/books --tokenize
    neighborlm prepare dump.txt --separator '<|endoftext|>' --output corpora/dump --split 98,1,1

A document goes into one split whole: otherwise the neighbours found in the training text would be
the rest of the very document that is predicted. Copies of a document are left out for that reason.
"""

import hashlib
import os
import shutil
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from neighborlm.common.errors import InputError
from neighborlm.common.files import sentences_about
from neighborlm.datamodules.corpora import SPLITS
from neighborlm.datamodules.corpora import tokenize as separate_punctuation
from neighborlm.datamodules.documents import deal
from neighborlm.programs.arguments import OneSentence
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import check_writable


def prepare(
    files: Sequence[Path],
    output: Path,
    tokenize: bool = False,
    split: str = "90,5,5",
    separator: str | None = None,
    seed: int = 1,
) -> None:
    """Writes train.txt, valid.txt and test.txt, and prints what they hold.

    Args:
        files: UTF-8 text files, or folders of *.txt files; each file is a document.
        output: a new folder.
        tokenize: separate words from punctuation marks, and leave out blank lines; otherwise lines
            stay as they are, which is what a model of characters wants.
        split: shares of the text for training, validation and test.
        separator: a line that stands between documents of one file, '' for a blank line.
        seed: of the draw that deals the documents.

    Raises:
        InputError: a file cannot be read, the folder exists or cannot be written, or there are
            fewer than three documents.
    """
    shares = shares_of(split)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output}: is there already; expected a new folder")
    check_writable(output, "--output", "folder")
    paths = text_files(files)
    sizes, first = measure(paths, separator)
    if len(sizes) < len(SPLITS):
        raise InputError(
            f"FILES hold {len(sizes)} document{'s' * (len(sizes) != 1)}, which cannot be dealt to "
            f"{len(SPLITS)} splits; expected more files, or --separator LINE where one file holds "
            "many documents ('' for a blank line)"
        )
    splits = np.full(len(first), -1)
    splits[first] = deal(sizes, shares, seed)
    with sentences_about(output.parent, "--output"):
        counts = write(documents(paths, separator), splits, output, tokenize)
    for name, (n_documents, n_lines, n_words) in zip(SPLITS, counts.tolist(), strict=True):
        print(f"{name}: {n_documents:,} documents, {n_lines:,} lines, {n_words:,} words")
    if len(first) > len(sizes):
        print(f"{len(first) - len(sizes):,} copies of documents are left out")
    print(f"use it as --data.corpus {output}")


def shares_of(split: str) -> np.ndarray:
    """Shares of the three splits, which add up to one.

    >>> shares_of("8,1,1").tolist()
    [0.8, 0.1, 0.1]
    """
    try:
        parts = np.array([float(part) for part in split.split(",")])
    except ValueError:
        parts = np.empty(0)
    if len(parts) != len(SPLITS) or not (np.isfinite(parts).all() and (parts > 0).all()):
        raise InputError(f"--split is {split}; expected three numbers above 0, such as 90,5,5")
    return parts / parts.sum()


def text_files(given: Sequence[Path]) -> list[Path]:
    """The files, those of folders sorted, each once."""
    paths: dict[Path, Path] = {}
    for path in given:
        found = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not found or not all(p.is_file() for p in found):
            what = "holds no *.txt file" if path.is_dir() else "no such file"
            raise InputError(f"{path}: {what}; expected text files, or a folder of *.txt files")
        paths |= {p.resolve(): p for p in found}
    return list(paths.values())


def documents(paths: Sequence[Path], separator: str | None) -> Iterator[list[str]]:
    """The lines of each document; those without a word are left out."""
    for path in paths:
        lines: list[str] = []
        try:
            with open(path, encoding="utf-8-sig") as file:
                for line in file:
                    if separator is None or line.strip() != separator.strip():
                        lines.append(line.removesuffix("\n"))
                        continue
                    if any(map(str.strip, lines)):
                        yield lines
                    lines = []
        except UnicodeDecodeError:
            raise InputError(f"{path}: is not UTF-8; expected a UTF-8 text file") from None
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; expected a readable file") from None
        if any(map(str.strip, lines)):
            yield lines


def measure(paths: Sequence[Path], separator: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Characters of each distinct document, int64, and which documents of all are the first of
    their kind, bool."""
    seen: set[bytes] = set()
    sizes, first = [], []
    for lines in documents(paths, separator):
        text = "\n".join(lines)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        first.append(digest not in seen)
        if first[-1]:
            sizes.append(len(text))
        seen.add(digest)
    return np.array(sizes, dtype=np.int64), np.array(first, dtype=bool)


def write(
    texts: Iterator[list[str]], splits: np.ndarray, output: Path, tokenize: bool
) -> np.ndarray:
    """Makes the folder, whole or not at all.

    Args:
        splits: of each document, -1 for those that are left out.

    Returns:
        Documents, lines and words of each split, int64 `[splits, 3]`.
    """
    counts = np.zeros((len(SPLITS), 3), dtype=np.int64)
    making = output.with_name(f"{output.name}.making-{os.getpid()}")
    making.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            files = [
                stack.enter_context(open(making / f"{s}.txt", "w", encoding="utf-8", newline="\n"))
                for s in SPLITS
            ]
            for lines, split in zip(texts, splits, strict=True):
                if split < 0:
                    continue
                if tokenize:
                    lines = [line for line in map(separate_punctuation, lines) if line]
                files[split].write("".join(f"{line}\n" for line in lines))
                counts[split] += 1, len(lines), sum(len(line.split()) for line in lines)
        os.replace(making, output)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return counts


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = OneSentence(
        prog="neighborlm prepare",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILES",
        help="UTF-8 text files, or folders of *.txt files; each file is a document",
    )
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--tokenize",
        action="store_true",
        help="separate words from punctuation marks, and leave out blank lines, for a model of "
        "words (default: lines stay as they are, for a model of characters or bytes, or where "
        "words are separated already)",
    )
    parser.add_argument(
        "--split",
        default="90,5,5",
        metavar="TRAIN,VALID,TEST",
        help="shares of the text (default: 90,5,5); more for training where the text is large",
    )
    parser.add_argument(
        "--separator",
        metavar="LINE",
        help="a line that stands between documents of one file, '' for a blank one (default: each "
        "file is one document)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        help="of the draw that deals documents to splits (default: 1); another one gives other "
        "splits",
    )
    prepare(**vars(parser.parse_args(args)))
