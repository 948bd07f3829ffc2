"""A suffix array over a text's tokens, on disk: it finds every occurrence of any phrase.

A directory with `suffixes.npy` [N], uint32 or for 2^32 tokens and more uint64: the offsets of the
text's suffixes in lexicographic order (Manber and Myers, SIAM J. Computing 1993). The tokens
themselves are not copied. The array is built in memory, in a minute for 100 million tokens; after a
kill it is built anew.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from pydivsufsort import divsufsort

from neighborlm.common.errors import InputError
from neighborlm.common.files import publishing
from neighborlm.retrieval.engine import in_parallel
from neighborlm.retrieval.engine import suffix_loops as loops
from neighborlm.retrieval.store import Artifact, Format, Job, share_out
from neighborlm.retrieval.store.arrays import (
    Layout,
    make_room,
    open_array,
    token_counts,
)

FORMAT = Format("suffix array", 1, ("rows", "vocab_size", "dtype"))
FILE = "suffixes.npy"
BLOCK = 1 << 22
"""Entries that are written at once."""
PART = 2048
"""Phrases that a thread looks up at once."""
UNKNOWN = -1
SAMPLE = 1024
"""Entries that are checked when an array is opened."""


class Matches(NamedTuple):
    """Phrases that occur in the text, each `[n]` int64.

    Attributes:
        lengths: in tokens.
        begins, ends: the part of the suffix array that holds the occurrences, but for one at the
            very end of the text, which nothing follows.
    """

    lengths: np.ndarray
    begins: np.ndarray
    ends: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Occurrences that a token follows, int64 `[n]`."""
        return self.ends - self.begins


class Continuations(NamedTuple):
    """What follows phrases, each `[n]` int64.

    Attributes:
        distinct: how many different tokens.
        highest: how often the most frequent one.
    """

    distinct: np.ndarray
    highest: np.ndarray


@dataclass(frozen=True)
class SuffixArray:
    """An opened suffix array, memory-mapped.

    Attributes:
        path: its directory.
        tokens: unsigned `[N]`, the text.
        suffixes: unsigned `[N]`.
        vocab_size: V; all tokens are below it.
    """

    path: Path
    tokens: np.ndarray
    suffixes: np.ndarray
    vocab_size: int

    # -- on disk ---------------------------------------------------------------------------------

    @classmethod
    def open(
        cls, path: Path | str, tokens: np.ndarray, vocab_size: int, made_from: Mapping[str, Any]
    ) -> "SuffixArray":
        """Opens a complete suffix array of a text.

        Args:
            path: its directory.
            tokens: unsigned `[N]`, the text that it must be of.
            vocab_size: V.
            made_from: fingerprints of the text and of its vocabulary.

        Raises:
            InputError: missing, damaged, or of another text or vocabulary.
        """
        path = Path(path)
        manifest = _artifact(path).open(_identity(tokens, vocab_size, made_from))
        layout = Layout(np.dtype(manifest["dtype"]), (len(tokens),))
        suffixes = open_array(path / FILE, layout)
        opened = cls(path, _read_only(tokens), _read_only(suffixes), vocab_size)
        opened._check()
        return opened

    @classmethod
    def ensure(
        cls, path: Path | str, tokens: np.ndarray, vocab_size: int, made_from: Mapping[str, Any]
    ) -> "SuffixArray":
        """Opens the suffix array of a text, which is built first unless it is there; of several
        processes one builds it. See `open`.

        Raises:
            InputError: the text is empty, what lies there is of another, or the disk has no room.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        artifact, identity = _artifact(path), _identity(tokens, vocab_size, made_from)

        def build() -> None:
            _write_suffixes(path, tokens, vocab_size)
            fields = {**identity, "dtype": _offset_type(len(tokens)).name}
            artifact.write(fields, complete=True, files=[path / FILE])

        share_out([Job(artifact.lock(), lambda: artifact.is_complete(identity), build)])
        return cls.open(path, tokens, vocab_size, made_from)

    def _check(self) -> None:
        """Refuses an array of which a sample is not in the order of this text's suffixes."""
        places = np.linspace(0, len(self.tokens) - 1, SAMPLE, dtype=np.int64)
        offsets = self.suffixes[places]
        inside = bool((offsets < len(self.tokens)).all())
        if inside:
            first = self.tokens[offsets].astype(np.int64)
            inside = bool(
                ((self.bounds[first] <= places) & (places < self.bounds[first + 1])).all()
            )
        if not inside:
            raise InputError(
                f"{self.path / FILE}: does not order the suffixes of its text; expected what was "
                "written there, so remove the directory to have it built again"
            )

    @cached_property
    def bounds(self) -> np.ndarray:
        """Where the suffixes begin that start with each token, int64 `[V + 1]`."""
        return np.concatenate([[0], token_counts(self.tokens, self.vocab_size).cumsum()])

    # -- phrases ---------------------------------------------------------------------------------

    def longest(self, text: np.ndarray, positions: np.ndarray) -> Matches:
        """The longest suffix of the text before each position that occurs here, followed by a
        token. Where not even the last token occurs, it is the empty phrase, which every token
        follows.

        Args:
            text: integers `[M]`; a token outside the vocabulary ends what can match.
            positions: int64 `[n]`, from 0 to M, in any order; ascending ones take less time.

        Raises:
            ValueError: a position outside the text.
        """
        text = _checked(text, positions)
        order = np.argsort(positions, kind="stable")
        positions = positions[order]
        found = self._in_parts(
            partial(loops.match_longest, *self._arrays, text), (positions,), 3, len(positions)
        )
        matches = Matches(*np.empty((3, len(positions)), dtype=np.int64))
        for column, of_ordered in zip(matches, found, strict=True):
            column[order] = of_ordered
        return matches

    def last(self, text: np.ndarray, positions: np.ndarray, most: int) -> list[Matches]:
        """The last one, two, ..., `most` tokens before each position, one `Matches` for each
        length. A phrase has no occurrences where it does not occur or would begin before the text.
        See `longest`."""
        text, n = _checked(text, positions), len(positions)
        begins, ends = self._in_parts(
            partial(loops.match_last, *self._arrays, text), (positions,), 2, (n, most)
        )
        lengths = np.broadcast_to(np.arange(1, most + 1), (n, most))
        columns = (np.ascontiguousarray(x.T) for x in (lengths, begins, ends))
        return [Matches(*of_length) for of_length in zip(*columns, strict=True)]

    def count(self, matches: Matches, targets: np.ndarray) -> np.ndarray:
        """How often a target int64 `[n]` follows each phrase, int64 `[n]`."""
        loop = partial(loops.count_targets, self.tokens, self.suffixes)
        (counts,) = self._in_parts(loop, (*matches, targets), 1, len(targets))
        return counts

    def summary(self, matches: Matches) -> Continuations:
        """How many different tokens follow each phrase, and how often the most frequent one."""
        phrases, inverse = _distinct(matches)
        # Counting what follows a frequent token takes as long as all the rest: its result is kept.
        short = np.flatnonzero((phrases.lengths <= 1) & (phrases.counts > 0))
        first_tokens = self.tokens[self.suffixes[phrases.begins[short]]]
        slots = np.where(phrases.lengths[short] == 0, self.vocab_size, first_tokens)
        summary = np.full((2, len(phrases.lengths)), UNKNOWN)
        summary[:, short] = self._summary_of_tokens[:, slots]
        unknown = summary[0] == UNKNOWN
        loop = partial(loops.summarise_continuations, self.tokens, self.suffixes)
        asked = Matches(*(column[unknown] for column in phrases))
        summary[:, unknown] = self._in_parts(loop, asked, 2, len(asked.lengths))
        self._summary_of_tokens[:, slots] = summary[:, short]
        return Continuations(*summary[:, inverse])

    @cached_property
    def _summary_of_tokens(self) -> np.ndarray:
        """Summaries of single tokens and, last, of the empty phrase: int64 `[2, V + 1]`."""
        return np.full((2, self.vocab_size + 1), UNKNOWN)

    def frequencies(
        self, text: np.ndarray, positions: np.ndarray, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """How often the last 1 to `most` tokens before each position occur here, followed by a
        token, and how many different tokens follow them; each int64 `[n, most]`. See `last`."""
        lasts = self.last(text, positions, most)
        counts = [matches.counts for matches in lasts]
        distinct = [self.summary(matches).distinct for matches in lasts]
        return np.stack(counts, axis=1), np.stack(distinct, axis=1)

    def continuations(self, matches: Matches) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that follow each phrase: ids int64 `[n, m]`, ascending, and counts int64
        `[n, m]`, 0 where there are fewer than m, the largest number of different tokens."""
        distinct = self.summary(matches).distinct
        shape = (len(distinct), int(distinct.max(initial=0)))
        loop = partial(loops.list_continuations, self.tokens, self.suffixes)
        ids, counts = self._in_parts(loop, matches, 2, shape)
        return ids, counts

    def occurrences(self, matches: Matches, most: int) -> np.ndarray:
        """Offsets of the tokens that follow the first `most` occurrences of each phrase, in the
        order of the array: int64 `[n, most]`, -1 where there are fewer."""
        places = matches.begins[:, None] + np.arange(most)
        there = places < matches.ends[:, None]
        offsets = self.suffixes[np.where(there, places, 0)].astype(np.int64)
        return np.where(there, offsets + matches.lengths[:, None], -1)

    @property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.tokens, self.suffixes, self.bounds

    @staticmethod
    def _in_parts(
        loop: Callable, columns: tuple[np.ndarray, ...], results: int, shape: Any
    ) -> np.ndarray:
        """Runs a loop over parts of some columns `[n]`, on as many cores as a search takes; its
        results are zeros where it writes nothing."""
        written = np.zeros((results, *np.atleast_1d(shape)), dtype=np.int64)

        def work(first: int) -> None:
            part = slice(first, first + PART)
            loop(*(column[part] for column in columns), *(result[part] for result in written))

        in_parallel(work, range(0, len(columns[0]), PART), faiss.omp_get_max_threads())
        return written


def _artifact(path: Path) -> Artifact:
    return Artifact.folder(FORMAT, path)


def _identity(tokens: np.ndarray, vocab_size: int, made_from: Mapping[str, Any]) -> dict[str, Any]:
    return {**made_from, "rows": len(tokens), "vocab_size": vocab_size}


def _offset_type(rows: int) -> np.dtype:
    return np.dtype(np.uint32 if rows < 1 << 32 else np.uint64)


def _write_suffixes(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    if len(tokens) == 0:
        raise InputError(f"{path}: the text has no tokens; expected at least one")
    layout = Layout(_offset_type(len(tokens)), (len(tokens),))
    with publishing(path / FILE) as making:
        make_room(path, {making.name: layout}, FORMAT.kind, "make room")
        suffixes = np.load(making, mmap_mode="r+")
        sort_suffixes(tokens, vocab_size, suffixes)
        suffixes.flush()


def sort_suffixes(tokens: np.ndarray, vocab_size: int, suffixes: np.ndarray) -> None:
    """Writes the offsets of a text's suffixes in lexicographic order.

    Each token is written as bytes, the highest first, and the suffixes of the bytes are sorted:
    those that begin where a token begins are in the order of the tokens' suffixes. Sorting takes
    five bytes of memory for each of these bytes, or nine from 2^31 bytes on.

    Args:
        tokens: unsigned `[N]`, below `vocab_size`.
        suffixes: unsigned `[N]`, to be written.
    """
    width = max(-(-(vocab_size - 1).bit_length() // 8), 1)
    packed = np.empty((len(tokens), width), dtype=np.uint8)
    for byte in range(width):
        packed[:, byte] = tokens >> np.asarray(8 * (width - 1 - byte), tokens.dtype)
    of_bytes = divsufsort(packed.reshape(-1))
    done = 0
    for first in range(0, len(of_bytes), BLOCK):
        block = of_bytes[first : first + BLOCK]
        offsets, inside = np.divmod(block, width)
        offsets = offsets[inside == 0]
        suffixes[done : done + len(offsets)] = offsets
        done += len(offsets)


def _checked(text: np.ndarray, positions: np.ndarray) -> np.ndarray:
    if len(positions) and not 0 <= positions.min() <= positions.max() <= len(text):
        raise ValueError(
            f"positions from {positions.min()} to {positions.max()} in a text of {len(text)} tokens"
        )
    return _read_only(text)


def _read_only(array: np.ndarray) -> np.ndarray:
    """A read-only view. Loops are compiled for each type of array, and read-only arrays, such as
    those mapped from disk, are a type of their own."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def _distinct(matches: Matches) -> tuple[Matches, np.ndarray]:
    """The distinct phrases, and which of them each phrase is, int64 `[n]`: frequent ones, which
    take long, recur."""
    order = np.lexsort((matches.lengths, matches.begins))
    ordered = np.stack([column[order] for column in matches])
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)
    inverse = np.empty(len(order), dtype=np.int64)
    inverse[order] = new.cumsum() - 1
    return Matches(*ordered[:, new]), inverse
