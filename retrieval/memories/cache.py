"""Stores the neighbours that one pass of retrieval found for every scored token of a split, so that
any lmbda, temperature and smaller k can be tried without the model and without a search.

A directory with `manifest.json` and, row i belonging to token i of the split:

    lm_log_prob.npy   fp32 [N]          of the target; NaN where the token is not scored
    targets.npy       unsigned [N]      the targets, 0 where not scored
    scores.npy        fp32 [N, k]       of the neighbours, nearest first, -inf where missing
    values.npy        unsigned [N, k]   the tokens that followed them; any where missing

The unsigned type is the smallest that holds the vocabulary. The first k columns are the nearest k
neighbours. A cache that is not complete is written anew.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from neighborlm.common.errors import InputError
from neighborlm.retrieval.store.arrays import Layout, make_room, open_array
from neighborlm.retrieval.store.artifact import Artifact, Format, refuse_mismatch

FIELDS = ("complete", "rows", "k", "vocab_size", "scored", "results", "made_from")
FORMAT = Format("retrieval", 1, FIELDS, ("faiss", "torch", "numpy"))
BLOCK_BYTES = 16 << 20
"""Bytes of a cache that are in memory at a time."""


class Retrieved(NamedTuple):
    """The neighbours of n tokens, enough to try any lmbda and temperature.

    Attributes:
        positions: int64 `[n]`, of the tokens in the split.
        targets: int64 `[n]`.
        lm_log_prob: fp32 `[n]`.
        scores: fp32 `[n, k]`, -inf where missing.
        hits: bool `[n, k]`, whether there is a neighbour whose value is the target.
    """

    positions: Tensor
    targets: Tensor
    lm_log_prob: Tensor
    scores: Tensor
    hits: Tensor


@dataclass(frozen=True)
class RetrievalCache:
    """An opened cache, memory-mapped. Iterating over it, any number of times, reads it from disk
    block by block; `len` is the number of blocks.

    Attributes:
        path: its directory.
        manifest: the content of `manifest.json`.
        k: how many neighbours of each token are read, the nearest ones.
    """

    path: Path
    manifest: dict[str, Any]
    k: int
    lm_log_prob: np.ndarray
    targets: np.ndarray
    scores: np.ndarray
    values: np.ndarray

    @classmethod
    def open(cls, path: Path | str) -> "RetrievalCache":
        """Opens a complete cache.

        Raises:
            InputError: missing, unfinished, or its files are not what its manifest says.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such directory; expected a cache of retrieved neighbours")
        manifest = Artifact.folder(FORMAT, path).open()
        layouts = _layouts(manifest)
        opened = (open_array(path / name, layout) for name, layout in layouts.items())
        return cls(path, manifest, manifest["k"], *opened)

    @staticmethod
    def is_complete(path: Path) -> bool:
        """Whether a finished cache lies there.

        Raises:
            InputError: there is a manifest, but not a cache's.
        """
        return Artifact.folder(FORMAT, path).is_complete()

    @property
    def n_scored(self) -> int:
        """The number of scored tokens, the only ones in `blocks`."""
        return self.manifest["scored"]

    def fits(self, expected: Mapping[str, Any]) -> None:
        """Refuses a cache that does not suit the data at hand; one with more neighbours suits a
        smaller k.

        Args:
            expected: any of `rows`, `k`, `vocab_size` and the settings that it must be made from.

        Raises:
            InputError: one sentence that names the first difference and both sides of it.
        """
        found = {name: self.manifest[name] for name in ("rows", "vocab_size")}
        found |= {**self.manifest["made_from"], "k": min(self.k, expected.get("k", self.k))}
        refuse_mismatch(self.path, found, expected)

    def nearest(self, k: int) -> "RetrievalCache":
        """The same cache with only the nearest k neighbours of each token.

        They are the nearest by the stored scores. Where these are exact but those of the index are
        not, a search for k neighbours alone may have found others.

        Raises:
            InputError: k is less than 1 or more than the cache holds.
        """
        if not 1 <= k <= self.manifest["k"]:
            raise InputError(f"{self.path}: keeps {self.manifest['k']} neighbours a token, not {k}")
        return replace(self, k=k)

    @property
    def _block_rows(self) -> int:
        row = 8 + self.k * (self.scores.itemsize + self.values.itemsize + 1)
        return max(BLOCK_BYTES // row, 1)

    def __len__(self) -> int:
        return -(-len(self.targets) // self._block_rows)

    def __iter__(self) -> Iterator[Retrieved]:
        return self.blocks()

    def blocks(self) -> Iterator[Retrieved]:
        """The scored tokens in order, a bounded number of bytes at a time."""
        for first in range(0, len(self.targets), self._block_rows):
            block = slice(first, first + self._block_rows)
            lm_log_prob = self.lm_log_prob[block]
            scored = np.flatnonzero(~np.isnan(lm_log_prob))
            scores = torch.from_numpy(self.scores[block, : self.k][scored])
            targets = self.targets[block][scored]
            same = self.values[block, : self.k][scored] == targets[:, None]
            yield Retrieved(
                torch.from_numpy(scored + first),
                torch.from_numpy(targets.astype(np.int64)),
                torch.from_numpy(lm_log_prob[scored]),
                scores,
                torch.from_numpy(same) & ~scores.isneginf(),
            )


class RetrievalCacheBuilder:
    """Writes a cache, any rows in any order, by any number of processes, each its own rows.

    After a kill all rows are written anew.

    Args:
        path: the directory.
        rows: tokens N of the split.
        k: neighbours a token.
        vocab_size: targets and values are below it.
        made_from: JSON-able settings that determine the content.

    Raises:
        InputError: the directory holds something else, or the disk has no room.
    """

    def __init__(
        self, path: Path | str, rows: int, k: int, vocab_size: int, made_from: dict[str, Any]
    ) -> None:
        self.path = Path(path)
        self.artifact = Artifact.folder(FORMAT, self.path)
        self.fields = {"rows": rows, "k": k, "vocab_size": vocab_size, "made_from": made_from}
        layouts = _layouts(self.fields)
        self.path.mkdir(parents=True, exist_ok=True)
        with self.artifact.lock():
            if not self._is_begun():
                self._create(layouts)
        self.lm_log_prob, self.targets, self.scores, self.values = (
            open_array(self.path / name, layout, "r+") for name, layout in layouts.items()
        )

    def _is_begun(self) -> bool:
        """Whether another process of this run, or a killed run of the same content, has made the
        files. In either case every scored row is written again."""
        if self.artifact.is_complete():
            raise InputError(f"{self.path}: already holds a complete cache; expected none")
        return self.artifact.says(self.fields)

    def _create(self, layouts: Mapping[str, Layout]) -> None:
        self.artifact.manifest.unlink(missing_ok=True)
        make_room(self.path, layouts, "cache", "make room or choose a smaller --knn.k")
        lm_log_prob = np.load(self.path / "lm_log_prob.npy", mmap_mode="r+")
        lm_log_prob[:] = np.nan
        lm_log_prob.flush()
        self.artifact.write({**self.fields, "scored": 0, "results": None}, complete=False)

    def write(
        self,
        positions: ArrayLike,
        targets: ArrayLike,
        lm_log_prob: ArrayLike,
        scores: ArrayLike,
        values: ArrayLike,
    ) -> None:
        """Stores the neighbours of n scored tokens.

        Args:
            positions: int64 `[n]`, of the tokens in the split.
            targets: `[n]`.
            lm_log_prob: fp32 `[n]`, natural logarithms.
            scores: fp32 `[n, k]` in any order, -inf where missing.
            values: `[n, k]`.

        Raises:
            InputError: a log-probability or a score is NaN.
            ValueError: a position, target or value is out of range.
        """
        positions, lm_log_prob = np.asarray(positions), np.asarray(lm_log_prob, np.float32)
        targets, scores, values = map(np.asarray, (targets, scores, values))
        limits = {"positions": (positions, self.fields["rows"])}
        limits |= {"targets": (targets, self.fields["vocab_size"])}
        limits |= {"values": (values, self.fields["vocab_size"])}
        for name, (array, limit) in limits.items():
            if array.size and not 0 <= array.min() <= array.max() < limit:
                raise ValueError(f"{name} from {array.min()} to {array.max()} in {self.path}")
        if np.isnan(lm_log_prob).any() or np.isnan(scores).any():
            raise InputError(
                f"{self.path}: a log-probability or a neighbour's score is NaN; mend the model"
            )
        self.lm_log_prob[positions] = lm_log_prob
        self.targets[positions] = targets
        self.scores[positions], self.values[positions] = nearest_first(scores, values)

    def sync(self) -> None:
        """Brings to disk what was written."""
        for array in (self.lm_log_prob, self.targets, self.scores, self.values):
            array.flush()

    def finish(self, results: dict[str, Any] | None = None) -> RetrievalCache:
        """Marks the cache complete, once, after every process has called `sync`.

        Args:
            results: JSON-able figures of the pass, for the manifest.

        Raises:
            InputError: another command has taken the directory meanwhile.
        """
        with self.artifact.lock():
            if not self.artifact.says(self.fields):
                raise InputError(f"{self.path}: was taken by another command; choose another place")
            scored = int(np.count_nonzero(~np.isnan(self.lm_log_prob)))
            fields = {**self.fields, "scored": scored, "results": results}
            self.artifact.write(fields, complete=True)
        return RetrievalCache.open(self.path)


def nearest_first(scores: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores fp32 and values `[n, k]` by descending scores; of equal ones the first stays first.

    >>> nearest_first(np.array([[-2, -np.inf, -1]], np.float32), np.array([[7, 8, 9]]))[1].tolist()
    [[9, 7, 8]]
    """
    if (scores[:, 1:] <= scores[:, :-1]).all():
        return scores, values
    # Score and place in one integer: numpy sorts those faster than it argsorts, and stably.
    bits = np.ascontiguousarray(scores, np.float32).view(np.int32)
    descending = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    pairs = (descending.astype(np.int64) << 32) | np.arange(scores.shape[1])
    pairs.sort(axis=1)
    order = pairs & 0xFFFFFFFF
    return np.take_along_axis(scores, order, 1), np.take_along_axis(values, order, 1)


def _layouts(fields: Mapping[str, Any]) -> dict[str, Layout]:
    """Layouts of the files, from the manifest's fields."""
    token, real = np.min_scalar_type(fields["vocab_size"] - 1), np.dtype(np.float32)
    rows, k = fields["rows"], fields["k"]
    return {
        "lm_log_prob.npy": Layout(real, (rows,)),
        "targets.npy": Layout(token, (rows,)),
        "scores.npy": Layout(real, (rows, k)),
        "values.npy": Layout(token, (rows, k)),
    }
