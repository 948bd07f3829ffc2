"""Stores what one pass of retrieval found for every scored token of a split, so that any lmbda,
temperature, smaller k and mixer can be tried without the model and without a search.

A directory with `manifest.json` and, row i belonging to token i of the split:

    lm_log_prob.npy        fp32 [N]          of the target; NaN where the token is not scored
    targets.npy            unsigned [N]      the targets, 0 where not scored
    scores.npy             fp32 [N, k]       of the neighbours, nearest first, -inf where missing
    values.npy             unsigned [N, k]   the tokens that followed them; any where missing
    rows.npy               signed [N, k]     their rows of the datastore, -1 where missing
    weights.npy            uint32 [N, k]     how many entries each stands for (merged ones)
    entropy.npy            fp32 [N]          of the model's distribution, in nats
    top_ids.npy            unsigned [N, t]   the model's t most probable tokens, 16 as a rule
    top_log_probs.npy      fp32 [N, t]       their log-probabilities, the largest first
    alone_log_prob.npy     fp32 [N]          of the target by the LM that a graph network stands on

The first four are always there, the others where the manifest says so (`Extent`): format 1 had none
of them. The unsigned type is the smallest that holds the vocabulary, the signed one the smallest
that holds the datastore's rows. The first k columns are the nearest k neighbours. A cache that is
not complete is written anew.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.contracts import Scored, Want
from neighborlm.common.errors import InputError
from neighborlm.retrieval.store.arrays import Layout, open_array
from neighborlm.retrieval.store.artifact import Artifact, Format, refuse_mismatch

FIELDS = ("complete", "rows", "k", "vocab_size", "scored", "results", "made_from")
FORMAT = Format("retrieval", 2, FIELDS, ("faiss", "torch", "numpy"))
BLOCK_BYTES = 16 << 20
"""Bytes of a cache that are in memory at a time."""
TOP = 16
"""Most probable tokens of the model that a cache keeps, with their probabilities."""


class Extent(NamedTuple):
    """What a cache keeps besides what tuning needs.

    Attributes:
        datastore_rows: of the datastore, which decides on the type of the neighbours' rows; 0 where
            these are not kept.
        top: how many of the model's most probable tokens; with any, the entropy is kept too.
        weighted: whether the datastore's entries have weights.
        on_lm: whether the model stands on an LM whose log-probabilities are kept too.
    """

    datastore_rows: int = 0
    top: int = 0
    weighted: bool = False
    on_lm: bool = False

    @property
    def want(self) -> Want:
        """What the model must be asked for."""
        return Want(entropy=self.top > 0, top=self.top)


class Retrieved(NamedTuple):
    """The neighbours of n tokens, enough to try any lmbda and temperature.

    Attributes:
        positions: int64 `[n]`, of the tokens in the split.
        targets: int64 `[n]`.
        lm_log_prob: fp32 `[n]`.
        scores: fp32 `[n, k]`, -inf where missing.
        hits: bool `[n, k]`, whether there is a neighbour whose value is the target.
        values: int64 `[n, k]`, the tokens that followed the neighbours, any where missing; None
            where nobody asks for more than hits.
        weights: fp32 `[n, k]`, how many entries each neighbour stands for; None where all stand for
            themselves.
    """

    positions: Tensor
    targets: Tensor
    lm_log_prob: Tensor
    scores: Tensor
    hits: Tensor
    values: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class RetrievalCache:
    """An opened cache, memory-mapped. Iterating over it, any number of times, reads it from disk
    block by block; `len` is the number of blocks.

    Attributes:
        path: its directory.
        manifest: the content of `manifest.json`.
        k: how many neighbours of each token are read, the nearest ones.
        lm_log_prob, targets, scores, values, rows, weights, entropy, top_ids, top_log_probs,
            alone_log_prob: the files, a row for each token of the split; None where not kept.
    """

    path: Path
    manifest: dict[str, Any]
    k: int
    lm_log_prob: np.ndarray
    targets: np.ndarray
    scores: np.ndarray
    values: np.ndarray
    rows: np.ndarray | None = None
    weights: np.ndarray | None = None
    entropy: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_log_probs: np.ndarray | None = None
    alone_log_prob: np.ndarray | None = None

    @classmethod
    def open(cls, path: Path | str) -> "RetrievalCache":
        """Opens a complete cache.

        Raises:
            InputError: missing, unfinished, or its files are not what its manifest says.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such directory; expected a cache of retrieved neighbours")
        inside = sorted(manifest.parent for manifest in path.glob("*/manifest.json"))
        if inside and not (path / "manifest.json").exists():
            raise InputError(f"{path}: is no cache of a split; expected one, such as {inside[0]}")
        manifest = Artifact.folder(FORMAT, path).open()
        return cls(path, manifest, manifest["k"], **open_arrays(path, manifest))

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

    @property
    def extent(self) -> Extent:
        """What it keeps besides what tuning needs."""
        return extent_of(self.manifest)

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
        weight = 0 if self.weights is None else 4
        row = 8 + self.k * (self.scores.itemsize + self.values.itemsize + 1 + weight)
        return max(BLOCK_BYTES // row, 1)

    def __len__(self) -> int:
        return -(-len(self.targets) // self._block_rows)

    def __iter__(self) -> Iterator[Retrieved]:
        return self.blocks()

    def blocks(self, values: bool = False) -> Iterator[Retrieved]:
        """The scored tokens in order, a bounded number of bytes at a time.

        Args:
            values: whether the values of the neighbours are wanted too.
        """
        for first in range(0, len(self.targets), self._block_rows):
            block = slice(first, first + self._block_rows)
            lm_log_prob = self.lm_log_prob[block]
            scored = np.flatnonzero(~np.isnan(lm_log_prob))
            scores = torch.from_numpy(self.scores[block, : self.k][scored])
            targets = self.targets[block][scored]
            found = self.values[block, : self.k][scored]
            weights = self.weights
            if weights is not None:
                weights = torch.from_numpy(weights[block, : self.k][scored].astype(np.float32))
            yield Retrieved(
                torch.from_numpy(scored + first),
                torch.from_numpy(targets.astype(np.int64)),
                torch.from_numpy(lm_log_prob[scored]),
                scores,
                torch.from_numpy(found == targets[:, None]) & ~scores.isneginf(),
                torch.from_numpy(found.astype(np.int64)) if values else None,
                weights,
            )

    def scored(self) -> Scored:
        """What the model said of all scored tokens, as far as it is kept; keys are not."""
        at = np.flatnonzero(~np.isnan(self.lm_log_prob))

        def column(array: np.ndarray | None, dtype: type = np.float32) -> Tensor | None:
            return None if array is None else torch.from_numpy(array[at].astype(dtype))

        return Scored(
            torch.from_numpy(at),
            column(self.targets, np.int64),
            column(self.lm_log_prob),
            entropy=column(self.entropy),
            top_ids=column(self.top_ids, np.int64),
            top_log_probs=column(self.top_log_probs),
            lm_log_probs=column(self.alone_log_prob),
        )


# -- the files -----------------------------------------------------------------------------------


def extent_of(fields: Mapping[str, Any]) -> Extent:
    """From the manifest's fields, which has none of these in format 1."""
    return Extent(**{name: fields[name] for name in Extent._fields if name in fields})


def layouts_of(fields: Mapping[str, Any]) -> dict[str, Layout]:
    """Layouts of the files by their names without `.npy`, from the manifest's fields."""
    token, real = np.min_scalar_type(fields["vocab_size"] - 1), np.dtype(np.float32)
    rows, k, extent = fields["rows"], fields["k"], extent_of(fields)
    layouts = {
        "lm_log_prob": Layout(real, (rows,)),
        "targets": Layout(token, (rows,)),
        "scores": Layout(real, (rows, k)),
        "values": Layout(token, (rows, k)),
    }
    if extent.datastore_rows:
        layouts["rows"] = Layout(np.min_scalar_type(-extent.datastore_rows), (rows, k))
    if extent.weighted:
        layouts["weights"] = Layout(np.dtype(np.uint32), (rows, k))
    if extent.top:
        layouts["entropy"] = Layout(real, (rows,))
        layouts["top_ids"] = Layout(token, (rows, extent.top))
        layouts["top_log_probs"] = Layout(real, (rows, extent.top))
    if extent.on_lm:
        layouts["alone_log_prob"] = Layout(real, (rows,))
    return layouts


def open_arrays(path: Path, fields: Mapping[str, Any], mode: str = "r") -> dict[str, np.ndarray]:
    """The files by their names without `.npy`."""
    layouts = layouts_of(fields).items()
    return {name: open_array(path / f"{name}.npy", layout, mode) for name, layout in layouts}
