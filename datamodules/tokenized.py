"""`TokenizedCorpus`: raw text as ids of a Hugging Face tokenizer, made at the first use and kept in
the cache like any other binarised corpus (see `binarized`).

Documents follow one another, each with the tokenizer's end token behind it; as lines of the stream
stand documents. Beside the ids of validation and test lies how many bytes and words of the raw text
each token stands for, so that figures per word and per byte are exact for any part of a split.

The protocol `knn-transformers` is that of the program of this name: lines (records) are tokenised
one by one, joined in groups of 1,000, and what is left of a group when windows are cut is dropped;
as lines of the stream stand groups.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding

from neighborlm.common.contracts import TextSize
from neighborlm.common.errors import InputError
from neighborlm.common.files import digest_of
from neighborlm.common.progress import progress_bars
from neighborlm.datamodules.binarize import NpyWriter, TokenStream, smallest_unsigned
from neighborlm.datamodules.binarized import BinarizedCorpus, fingerprint_of_tokens, write_meta
from neighborlm.datamodules.documents import Documents, Piece
from neighborlm.datamodules.hf_tokenizer import HuggingFaceVocabulary

CACHE_VERSION = 1  # raise it when the meaning of the files changes
AT_ONCE = 1 << 22
"""Characters that are tokenised together."""
LINES_OF_A_GROUP = 1000
SPACES = np.array([c for c in range(0x3001) if chr(c).isspace()], dtype=np.uint32)
"""The characters at which `str.split` splits."""


class Part(NamedTuple):
    """A part of a split in tokens.

    Attributes:
        tokens: int64 `[n]`.
        ends: int64, the offset after the last token of each document that ends here.
        sizes: int64 `[n, 2]`, words that begin in each token's text, and its bytes.
        changed: how many pieces of text are not what their tokens are decoded to.
    """

    tokens: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    changed: int


class TokenizedCorpus(BinarizedCorpus):
    """A corpus of raw text as ids of a tokenizer.

    Args:
        settings: which corpus it is, and which tokenizer reads it.
    """

    @cached_property
    def files(self) -> Documents:
        """The documents of the corpus."""
        s = self.settings
        return Documents(s.corpus, s.cache_dir, s.separator, s.text_column)

    @cached_property
    def name(self) -> str:
        """Name of the folder or of the known corpus, and of the tokenizer."""
        return f"{self.files.name}-{Path(self.settings.tokenizer).resolve().name}"

    @cached_property
    def dictionary(self) -> HuggingFaceVocabulary:
        """The tokenizer."""
        return HuggingFaceVocabulary.load(self.settings.tokenizer, self.settings.tokenizer_revision)

    def text_size(self, split: str, scored: np.ndarray | None = None) -> TextSize | None:
        """See `common.contracts.Corpus.text_size`; of a part of the training split it is not
        known."""
        if scored is None:
            return TextSize(*self.meta["sizes"][split])
        if split == "train":
            return None
        arrays = (np.load(self.folder / split / f"{n}.npy", mmap_mode="r") for n in SIZES)
        return TextSize(*(int(array[scored].sum(dtype=np.int64)) for array in arrays))

    # -- making it -------------------------------------------------------------------------------

    def _fingerprint_of_input(self) -> str:
        window = self.settings.window if self._in_groups else None
        what = [CACHE_VERSION, self.settings.protocol, window]
        return digest_of(json.dumps(what), self.dictionary.fingerprint, self.files.fingerprint())

    @property
    def _in_groups(self) -> bool:
        return self.settings.protocol == "knn-transformers"

    def _make(self, making: Path) -> None:
        """Fills the folder of the binarised corpus and prints a report."""
        meta = {"fingerprints": {}, "statistics": {}, "sizes": {}}
        meta |= {"tokenizer": self.settings.tokenizer, "dictionary": self.dictionary.fingerprint}
        changed = 0
        for split in self.files.splits:
            folder = making / split
            folder.mkdir()
            meta["sizes"][split], changed_here = self._write(split, folder)
            stream = TokenStream.open(folder)
            meta["fingerprints"][split] = fingerprint_of_tokens(stream)
            counts = {"tokens": len(stream.tokens), "lines": len(stream.line_starts) - 1}
            meta["statistics"][split] = counts
            changed += changed_here
        write_meta(making, meta)
        print("\n".join(self._described(meta, changed)), flush=True)

    def _described(self, meta: dict, changed: int) -> list[str]:
        """Lines that describe the corpus at its first use."""
        lines = [f"corpus {self.name}: a vocabulary of {len(self.dictionary):,} tokens"]
        if self.files.dealt is not None:
            lines.append(f"  {self.files.folder} has no splits: {self.files.dealt}")
        units = ("group of lines", "groups of lines")
        units = units if self._in_groups else ("document", "documents")
        for split, counts in meta["statistics"].items():
            size = TextSize(*meta["sizes"][split])
            unit = units[counts["lines"] != 1]
            lines.append(
                f"  {split}: {counts['tokens']:,} tokens in {counts['lines']:,} {unit}, "
                f"{size.words:,} words, {size.bytes:,} bytes"
            )
        if changed:
            lines.append(
                f"warning: {changed:,} pieces of the text are not what their tokens are decoded "
                "to, as the tokenizer changes what it reads; figures per word and per byte are of "
                "the text itself"
            )
        return lines

    def _write(self, split: str, folder: Path) -> tuple[TextSize, int]:
        """Writes the arrays of a split; its size, and how many pieces do not come back the same.

        Raises:
            InputError: it has no text.
            OSError: it does not fit on the disk.
        """
        dtype = smallest_unsigned(len(self.dictionary))
        starts, total, changed = [np.zeros(1, dtype=np.int64)], np.zeros(2, dtype=np.int64), 0
        with ExitStack() as stack:
            report = stack.enter_context(progress_bars(f"tokenising {split}", transient=True))
            tokens = stack.enter_context(NpyWriter(folder / "tokens.npy", dtype))
            columns = () if split == "train" else SIZES
            sizes = [stack.enter_context(NpyWriter(folder / f"{n}.npy", "u4")) for n in columns]
            for part in self._parts(split):
                starts.append(part.ends + tokens.length)
                tokens.append(part.tokens, tokens.length + len(part.tokens))
                for column, writer in enumerate(sizes):
                    writer.append(part.sizes[:, column], tokens.length)
                total += part.sizes.sum(axis=0)
                changed += part.changed
                report("", tokens.length, 0, "tokens")
        line_starts = np.concatenate(starts)
        if len(line_starts) < 2:
            raise InputError(
                f"--data.corpus {self.settings.corpus}: has no text in its {split} split; expected "
                "some"
            )
        with NpyWriter(folder / "line_starts.npy", line_starts.dtype) as writer:
            writer.append(line_starts, len(line_starts))
        return TextSize(*total.tolist()), changed

    def _parts(self, split: str) -> Iterator[Part]:
        pieces = self.files.pieces(split)
        if not self._in_groups:
            for some in together(pieces):
                yield self._documents(some)
            return
        lines = self.files.lines(pieces)
        while group := list(islice(lines, LINES_OF_A_GROUP)):
            yield self._group(group)

    def _documents(self, pieces: list[Piece]) -> Part:
        """Pieces of documents, with the end token behind each document."""
        texts = [piece.text for piece in pieces]
        encodings = self.dictionary.encode_all(texts)
        decoded = self.dictionary.decode_all([encoding.ids for encoding in encodings])
        end = np.array([self.dictionary.eos]), np.zeros((1, 2), dtype=np.int64)
        parts, ends, length = [], [], 0
        for piece, encoding in zip(pieces, encodings, strict=True):
            of_piece = tokens_of(piece.text, encoding)
            parts += [of_piece, end] if piece.is_last else [of_piece]
            length += len(of_piece[0]) + piece.is_last
            ends += [length] if piece.is_last else []
        tokens, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
        changed = sum(a != b for a, b in zip(texts, decoded, strict=True))
        return Part(tokens, np.array(ends, dtype=np.int64), sizes, changed)

    def _group(self, lines: list[str]) -> Part:
        """A group of lines, without what is left when it is cut into windows."""
        encodings = self.dictionary.encode_all(lines, with_ends=True)
        parts = [tokens_of(line, encoding) for line, encoding in zip(lines, encodings, strict=True)]
        tokens, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
        window, kept = self.settings.window, len(tokens)
        if kept >= window:
            kept -= kept % window
        return Part(tokens[:kept], np.array([kept]), sizes[:kept], 0)


SIZES = ("words", "bytes")
"""Names of the arrays beside the ids, in the order of `TextSize`."""


def together(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces to be tokenised together."""
    some, size = [], 0
    for piece in pieces:
        some.append(piece)
        size += len(piece.text)
        if size >= AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some


def tokens_of(text: str, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a text, int64 `[n]`, and what each stands for, int64 `[n, 2]`: the words that
    begin, and the UTF-8 bytes that lie, behind the token before it and up to its own end; the last
    token has the rest of the text."""
    ids = np.array(encoding.ids, dtype=np.int64)
    if len(ids) == 0:
        return ids, np.zeros((0, 2), dtype=np.int64)
    ends = np.maximum.accumulate(np.array(encoding.offsets, dtype=np.int64)[:, 1])
    ends[-1] = len(text)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    is_space = np.isin(points, SPACES)
    begins = ~is_space & np.append(True, is_space[:-1])
    n_bytes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    upto = np.zeros((len(points) + 1, 2), dtype=np.int64)
    np.cumsum(np.stack([begins, n_bytes], axis=1), axis=0, out=upto[1:])
    return ids, np.diff(upto[ends], axis=0, prepend=0)
