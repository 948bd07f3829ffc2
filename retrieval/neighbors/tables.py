"""Neighbour tables: the k nearest datastore rows of every token of a split, which a GNN-LM (Meng et
al., ICLR 2022, section 2.2) makes its graphs of.

`neighbors-k<k>.npy` [N, k] lies in the directory of the split's own datastore, whose row i is the
query of token i, with `neighbors-k<k>.json` as its manifest. Until the table is complete the
manifest also says up to which row it is filled, and a killed run goes on from there. Of a split
whose datastore lies in shards each shard has a table of its own tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from neighborlm.common.contracts import Metric, NProbe, Retriever
from neighborlm.common.errors import InputError
from neighborlm.common.files import Lock, digest_of
from neighborlm.common.progress import Report
from neighborlm.retrieval.search.index import EXHAUSTIVE
from neighborlm.retrieval.store.arrays import Layout, open_array, open_raw
from neighborlm.retrieval.store.artifact import Artifact, Format, as_read, refuse_mismatch
from neighborlm.retrieval.store.datastore import Datastore, fingerprint_of
from neighborlm.retrieval.store.shards import Placement, ShardedArray

FIELDS = ("complete", "rows", "k", "dtype", "distances")
FORMAT = Format("neighbour table", 1, FIELDS, ("faiss", "torch", "numpy"))
QUERIES_AT_ONCE = 8192


@dataclass(frozen=True)
class TableSettings:
    """How the neighbours of a table are found: with the two datastores, this determines the table.

    Attributes:
        metric: how keys are compared.
        index: `flat` or what the index is called.
        nprobe: inverted lists that a query visits.
        k: neighbours of a token.
        exclude_window: where a split searches itself, rows less than this many tokens away from the
            query's own are left out; k other neighbours are found.
    """

    metric: Metric
    index: str
    nprobe: NProbe
    k: int
    exclude_window: int = 0


def artifact_of(manifest: Path) -> Artifact:
    """The table of a manifest as a product."""
    return Artifact(FORMAT, manifest, manifest)


def outside_window(rows: np.ndarray, positions: np.ndarray, window: int) -> np.ndarray:
    """Which neighbours are there and at least `window` tokens away from the query's own token.

    Args:
        rows: signed integers `[n, m]`, -1 where missing.
        positions: int64 `[n]`, the rows of the queries' own tokens.
        window: 0 keeps all, 1 drops the token itself, 2 the tokens beside it too, and so on.

    Returns:
        bool `[n, m]`.
    """
    return (rows >= 0) & (np.abs(rows - positions[:, None]) >= window)


def compacted(values: np.ndarray, kept: np.ndarray, k: int, missing: float) -> np.ndarray:
    """The first k values kept of every row, moved to the left in their order.

    Args:
        values: `[n, m]`.
        kept: bool `[n, m]`.
        k: how many, which may be more than m.
        missing: stands where a row keeps fewer.

    Returns:
        `[n, k]` of the type of `values`.

    >>> compacted(np.array([[7, 8, 9]]), np.array([[False, True, True]]), 4, -1).tolist()
    [[8, 9, -1, -1]]
    """
    kept = kept & (kept.cumsum(axis=1) <= k)
    result = np.full((len(values), k), missing, dtype=values.dtype)
    result[np.arange(k) < kept.sum(axis=1)[:, None]] = values[kept]
    return result


@dataclass(frozen=True)
class NeighborTable:
    """An opened neighbour table; arrays are memory-mapped.

    Attributes:
        path: its manifest.
        manifest: what that says.
        rows: int16, int32 or int64 `[N, k]`, rows of the memory, nearest first, -1 where missing.
    """

    path: Path
    manifest: dict[str, Any]
    rows: np.ndarray | ShardedArray

    @classmethod
    def open(cls, path: Path | str) -> "NeighborTable":
        """Opens a complete table.

        Args:
            path: its `.npy` or its manifest.

        Raises:
            InputError: missing, unfinished, or its files are not what its manifest says.
        """
        path = Path(path).with_suffix(".json")
        manifest = artifact_of(path).open()
        ((name, layout),) = _layouts(path, manifest).items()
        if "raw" in manifest:
            return cls(path, manifest, open_raw(path, manifest["raw"], layout))
        return cls(path, manifest, open_array(path.parent / name, layout))

    @classmethod
    def join(cls, tables: Sequence["NeighborTable"], placement: Placement) -> "NeighborTable":
        """The tables of the shards of a split as one, as wide as the narrowest; its path and
        manifest are those of the first."""
        k = min(table.manifest["k"] for table in tables)
        first = tables[0]
        rows = ShardedArray([table.rows for table in tables], placement).narrowed(k)
        manifest = {**first.manifest, "rows": placement.rows, "k": k}
        return cls(first.path, manifest, rows)

    def nearest(self, k: int) -> np.ndarray | ShardedArray:
        """The k nearest of every token, a view `[N, k]` of `rows`.

        Raises:
            InputError: the table has fewer.
        """
        found = self.manifest["k"]
        if k > found:
            raise InputError(f"{self.path}: has {found} neighbours a token; {k} are expected here")
        return self.rows.narrowed(k) if isinstance(self.rows, ShardedArray) else self.rows[:, :k]


def _layouts(path: Path, fields: Mapping[str, Any]) -> dict[str, Layout]:
    """Of the file beside the manifest `path`, by its fields."""
    shape = (fields["rows"], fields["k"])
    return {f"{path.stem}.npy": Layout(np.dtype(fields["dtype"]), shape)}


def _identity(queries: Datastore, memory: Datastore, settings: TableSettings) -> dict[str, Any]:
    """What determines a table, and but for k all its rows too."""
    reads_all = settings.index in EXHAUSTIVE
    return {
        "k": settings.k,
        "rows": len(queries),
        "metric": settings.metric,
        "index": settings.index,
        "nprobe": None if reads_all else settings.nprobe,
        "exclude_window": settings.exclude_window,
        "queries": queries.fingerprint,
        "memory": fingerprint_of(memory.whole),
        "distances": False,  # which earlier versions could keep beside the rows
    }


def table_of(queries: Datastore, memory: Datastore, settings: TableSettings) -> Artifact:
    """The table of a split in one piece or of a shard of one, whether it is there or not.

    Tables of one k that were made in different ways lie side by side: all but the first have a
    hash in their name.
    """
    identity, name = _identity(queries, memory, settings), f"neighbors-k{settings.k}"
    digest = digest_of(json.dumps(identity, sort_keys=True), size=4)
    plain, hashed = (
        artifact_of(queries.path / f"{name}{suffix}.json") for suffix in ("", f"-{digest}")
    )
    if plain.exists() and not plain.says(identity):
        return hashed
    return hashed if hashed.exists() else plain


def lock_of_tables(queries: Datastore, k: int) -> Lock:
    """To be held by whoever makes a table of k neighbours of a split, or of a shard of one."""
    return artifact_of(queries.path / f"neighbors-k{k}.json").lock()


def find_table(
    queries: Datastore, memory: Datastore, settings: TableSettings
) -> NeighborTable | None:
    """The smallest complete table made in this way that has at least k neighbours; None where there
    is none. Of a split in shards there is one where all of them have one.

    Args:
        queries: the split's own datastore.
        memory: the datastore that was searched.
        settings: how.

    Raises:
        InputError: a manifest cannot be read, or its files are not what it says.
    """
    shards = queries.shards()
    if shards:
        tables = [find_table(shard, memory, settings) for shard in shards]
        return None if None in tables else NeighborTable.join(tables, shards[0].part.placement)
    identity = as_read(_identity(queries, memory, settings))
    k, _ = identity.pop("k"), identity.pop("distances")
    fitting = {}
    for path in sorted(queries.path.glob("neighbors-k*.json")):
        manifest = artifact_of(path).read()
        if manifest["complete"] and manifest["k"] >= k and identity.items() <= manifest.items():
            fitting.setdefault(manifest["k"], path)
    return NeighborTable.open(fitting[min(fitting)]) if fitting else None


class NeighborSearch:
    """Makes one neighbour table: searches for every token, and goes on where a killed run stopped.

    Args:
        queries: the split's own datastore, or one shard of it; row i is the query of token i, rows
            without a key get no neighbours.
        memory: where to search, or one shard of it.
        retriever: searches all of it.
        settings: how it does.

    Raises:
        InputError: keys of different widths, or a window between different splits.
    """

    def __init__(
        self,
        queries: Datastore,
        memory: Datastore,
        retriever: Retriever,
        settings: TableSettings,
    ) -> None:
        refuse_mismatch(queries.path, {"dim": queries.dim}, {"dim": memory.dim})
        tokens = len(queries) if queries.part is None else queries.part.placement.rows
        self.memory_rows = memory.whole["rows"]
        window = settings.exclude_window
        if window > 0 and tokens != self.memory_rows:
            raise InputError(
                f"{queries.path}: has {tokens:,} rows and {memory.path} {self.memory_rows:,}; "
                f"expected the same split where a window of {window} tokens is excluded"
            )
        if retriever.metric != settings.metric:
            raise ValueError(f"a retriever by {retriever.metric} for a table by {settings.metric}")
        self.queries = queries
        self.memory = memory
        self.retriever = retriever
        self.settings = settings
        self.artifact = table_of(queries, memory, settings)
        self.path = self.artifact.manifest

    def run(self, report: Report = lambda *_: None) -> NeighborTable:
        """Searches and publishes the table; continues an unfinished one.

        Args:
            report: called with a stage, how much of it is done, and how much there is.

        Raises:
            InputError: the disk has no room, or the unfinished table is damaged.
        """
        fields = _identity(self.queries, self.memory, self.settings)
        fields["dtype"] = _row_type(self.memory_rows).name
        layouts = _layouts(self.path, fields)
        self.artifact.fill(
            fields, layouts, QUERIES_AT_ONCE, self._block, partial(report, "searching")
        )
        return NeighborTable.open(self.path)

    def _block(self, first: int, last: int) -> tuple[np.ndarray]:
        """Rows `[last - first, k]` of these tokens."""
        positions = np.arange(first, last)
        positions = positions[~np.isin(positions, self.queries.masked)]
        shape = (last - first, self.settings.k)
        rows = np.full(shape, -1, dtype=np.int64)
        if len(positions):
            tokens = self.queries.in_whole(positions)
            rows[positions - first] = self._search(self.queries.read(tokens), tokens)
        return (rows,)

    def _search(self, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rows `[n, k]`, those in the window left out.

        Few queries have much of their window among their neighbours. So all fetch a little more
        than k; those with fewer than k left then fetch four times as many, until they fetch enough
        for any window.
        """
        k = self.settings.k
        enough = k + max(2 * self.settings.exclude_window - 1, 0)
        count = min(enough, k + max(16, k // 8))
        rows, lacking = self._fetch(queries, positions, count)
        who = np.flatnonzero(lacking)
        while count < enough and len(who):
            count = min(4 * count, enough)
            rows[who], lacking = self._fetch(queries[who], positions[who], count)
            who = who[lacking]
        return rows

    def _fetch(
        self, queries: np.ndarray, positions: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows `[n, k]` of what is left of `count` neighbours, and bool `[n]`, who has fewer than k
        though there are more to fetch."""
        n_keys, k = self.memory.n_keys_of_whole, self.settings.k
        count = min(count, n_keys)
        rows = self.retriever.search(queries, count).rows
        kept = outside_window(rows, positions, self.settings.exclude_window)
        lacking = (kept.sum(axis=1) < k) & (rows[:, -1] >= 0)
        return compacted(rows, kept, k, -1), lacking & (count < n_keys)


def _row_type(rows: int) -> np.dtype:
    """The smallest of int16, int32 and int64 that holds row numbers below `rows`."""
    types = map(np.dtype, (np.int16, np.int32, np.int64))
    return next(dtype for dtype in types if rows - 1 <= np.iinfo(dtype).max)
