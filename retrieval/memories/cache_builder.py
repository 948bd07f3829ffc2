"""Writes the cache of what was retrieved, see `retrieval.memories.cache`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.cache import (
    FORMAT,
    Extent,
    RetrievalCache,
    layouts_of,
    open_arrays,
)
from neighborlm.retrieval.store.arrays import make_room
from neighborlm.retrieval.store.artifact import Artifact


class RetrievalCacheBuilder:
    """Writes a cache, any rows in any order, by any number of processes, each its own rows.

    After a kill all rows are written anew.

    Args:
        path: the directory.
        rows: tokens N of the split.
        k: neighbours a token.
        vocab_size: targets and values are below it.
        made_from: JSON-able settings that determine the content.
        extent: what is kept besides what tuning needs; by default nothing.
        text: the settings by which the corpus is found, for those who show the tokens as text.

    Raises:
        InputError: the directory holds something else, or the disk has no room.
    """

    def __init__(
        self,
        path: Path | str,
        rows: int,
        k: int,
        vocab_size: int,
        made_from: dict[str, Any],
        extent: Extent = Extent(),  # noqa: B008 (a tuple)
        text: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.artifact = Artifact.folder(FORMAT, self.path)
        self.extent = extent._replace(top=min(extent.top, vocab_size))
        self.fields = {"rows": rows, "k": k, "vocab_size": vocab_size, "made_from": made_from}
        self.fields |= self.extent._asdict()
        self.text = dict(text or {})
        self.path.mkdir(parents=True, exist_ok=True)
        with self.artifact.lock():
            if not self._is_begun():
                self._create()
        self.arrays = open_arrays(self.path, self.fields, "r+")

    def _is_begun(self) -> bool:
        """Whether another process of this run, or a killed run of the same content, has made the
        files. In either case every scored row is written again."""
        if self.artifact.is_complete():
            raise InputError(f"{self.path}: already holds a complete cache; expected none")
        return self.artifact.says(self.fields)

    def _create(self) -> None:
        self.artifact.manifest.unlink(missing_ok=True)
        files = {f"{name}.npy": layout for name, layout in layouts_of(self.fields).items()}
        make_room(self.path, files, "cache", "make room or choose a smaller --knn.k")
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
        **others: ArrayLike,
    ) -> None:
        """Stores the neighbours of n scored tokens, and what else the cache keeps of them.

        Args:
            positions: int64 `[n]`, of the tokens in the split.
            targets: `[n]`.
            lm_log_prob: fp32 `[n]`, natural logarithms.
            scores: fp32 `[n, k]` in any order, -inf where missing.
            values: `[n, k]`.
            others: `rows` `[n, k]`, -1 where missing, `weights` `[n, k]`, `entropy` `[n]`,
                `top_ids` and `top_log_probs` `[n, top]` and `alone_log_prob` `[n]`, those that
                `extent` says.

        Raises:
            InputError: a log-probability or a score is NaN.
            ValueError: a position, target, value or row is out of range, or a column is missing.
        """
        positions = np.asarray(positions)
        columns = {"targets": targets, "lm_log_prob": lm_log_prob, "scores": scores}
        columns = {
            name: np.asarray(column)
            for name, column in {**columns, "values": values, **others}.items()
        }
        if columns.keys() != self.arrays.keys():
            expected = ", ".join(self.arrays)
            raise ValueError(f"{', '.join(columns)} for {self.path}; expected {expected}")
        vocab_size = self.fields["vocab_size"]
        limits = {"positions": (0, self.fields["rows"]), "rows": (-1, self.extent.datastore_rows)}
        limits |= dict.fromkeys(("targets", "values", "top_ids"), (0, vocab_size))
        for name, array in {"positions": positions, **columns}.items():
            lowest, limit = limits.get(name, (None, None))
            if (
                limit is not None
                and array.size
                and not lowest <= array.min() <= array.max() < limit
            ):
                raise ValueError(f"{name} from {array.min()} to {array.max()} in {self.path}")
            if array.dtype.kind == "f" and np.isnan(array).any():
                raise InputError(
                    f"{self.path}: a log-probability or a neighbour's score is NaN; mend the model"
                )
        by_neighbor = [name for name in ("values", "rows", "weights") if name in columns]
        ordered = nearest_first(columns["scores"], *(columns[name] for name in by_neighbor))
        columns |= dict(zip(("scores", *by_neighbor), ordered, strict=True))
        for name, column in columns.items():
            self.arrays[name][positions] = column

    def sync(self) -> None:
        """Brings to disk what was written."""
        for array in self.arrays.values():
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
            scored = int(np.count_nonzero(~np.isnan(self.arrays["lm_log_prob"])))
            fields = {**self.fields, "scored": scored, "results": results, "text": self.text}
            files = [self.path / f"{name}.npy" for name in self.arrays]
            self.artifact.write(fields, complete=True, files=files)
        return RetrievalCache.open(self.path)


def nearest_first(scores: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """Scores fp32 and other columns `[n, k]` by descending scores; of equal ones the first stays
    first.

    >>> nearest_first(np.array([[-2, -np.inf, -1]], np.float32), np.array([[7, 8, 9]]))[1].tolist()
    [[9, 7, 8]]
    """
    if (scores[:, 1:] <= scores[:, :-1]).all():
        return scores, *columns
    # Score and place in one integer: numpy sorts those faster than it argsorts, and stably.
    bits = np.ascontiguousarray(scores, np.float32).view(np.int32)
    descending = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    pairs = (descending.astype(np.int64) << 32) | np.arange(scores.shape[1])
    pairs.sort(axis=1)
    order = pairs & 0xFFFFFFFF
    return tuple(np.take_along_axis(column, order, 1) for column in (scores, *columns))
