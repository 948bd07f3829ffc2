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
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from neighborlm.common.contracts import Metric, NProbe, Retriever
from neighborlm.common.errors import InputError
from neighborlm.common.progress import Report
from neighborlm.retrieval.search.index import EXHAUSTIVE
from neighborlm.retrieval.store.arrays import fill_rows, open_array, open_raw
from neighborlm.retrieval.store.datastore import Datastore, fingerprint_of
from neighborlm.retrieval.store.manifest import read_manifest, refuse_mismatch
from neighborlm.retrieval.store.shards import Placement, ShardedArray

KIND, VERSION = "neighbour table", 1
FIELDS = ("complete", "rows", "k", "dtype", "distances")
QUERIES_AT_ONCE = 8192


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
        distances: fp32 `[N, k]` as the retriever gave them (of missing neighbours infinitely far),
            or None where they were not kept.
    """

    path: Path
    manifest: dict[str, Any]
    rows: np.ndarray | ShardedArray
    distances: np.ndarray | ShardedArray | None

    @classmethod
    def open(cls, path: Path | str) -> "NeighborTable":
        """Opens a complete table.

        Args:
            path: its `.npy` or its manifest.

        Raises:
            InputError: missing, unfinished, or its files are not what its manifest says.
        """
        path = Path(path).with_suffix(".json")
        manifest = read_manifest(path, KIND, VERSION, FIELDS)
        if not manifest["complete"]:
            raise InputError(f"{path}: is unfinished; repeat the command that was writing it")
        shape, dtype = (manifest["rows"], manifest["k"]), np.dtype(manifest["dtype"])
        if "raw" in manifest:
            rows = open_raw(path, manifest["raw"], shape, dtype)
        else:
            rows = open_array(path.with_suffix(".npy"), shape, dtype)
        distances = None
        if manifest["distances"]:
            distances = open_array(_distances_of(path), shape, np.dtype(np.float32))
        return cls(path, manifest, rows, distances)

    @classmethod
    def join(cls, tables: Sequence["NeighborTable"], placement: Placement) -> "NeighborTable":
        """The tables of the shards of a split as one, as wide as the narrowest; its path and
        manifest are those of the first."""
        k = min(table.manifest["k"] for table in tables)
        first = tables[0]
        rows = ShardedArray([table.rows for table in tables], placement).narrowed(k)
        distances = None
        if all(table.distances is not None for table in tables):
            distances = ShardedArray([table.distances for table in tables], placement).narrowed(k)
        manifest = {**first.manifest, "rows": placement.rows, "k": k}
        return cls(first.path, manifest, rows, distances)

    def nearest(self, k: int) -> np.ndarray | ShardedArray:
        """The k nearest of every token, a view `[N, k]` of `rows`.

        Raises:
            InputError: the table has fewer.
        """
        found = self.manifest["k"]
        if k > found:
            raise InputError(f"{self.path}: has {found} neighbours a token; {k} are expected here")
        return self.rows.narrowed(k) if isinstance(self.rows, ShardedArray) else self.rows[:, :k]


def _distances_of(manifest: Path) -> Path:
    return manifest.with_name(f"{manifest.stem}-distances.npy")


def _identity(
    queries: Datastore,
    memory: Datastore,
    metric: Metric,
    index_name: str,
    nprobe: NProbe,
    exclude_window: int,
) -> dict[str, Any]:
    """What determines a table, but for k."""
    return {
        "rows": len(queries),
        "metric": metric,
        "index": index_name,
        "nprobe": None if index_name in EXHAUSTIVE else nprobe,
        "exclude_window": exclude_window,
        "queries": queries.fingerprint,
        "memory": fingerprint_of(memory.whole),
    }


def _is(manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    return all(manifest.get(field) == value for field, value in identity.items())


def _manifest_path(directory: Path, identity: Mapping[str, Any]) -> Path:
    """Where the table of an identity, k included, is or will be.

    Tables of one k that were made in different ways lie side by side: all but the first have a
    hash in their name.
    """
    name = f"neighbors-k{identity['k']}"
    plain = directory / f"{name}.json"
    parts = json.dumps(dict(identity), sort_keys=True)
    hashed = directory / f"{name}-{blake2b(parts.encode(), digest_size=4).hexdigest()}.json"
    if plain.exists() and not _is(read_manifest(plain, KIND, VERSION), identity):
        return hashed
    return hashed if hashed.exists() else plain


def find_table(
    queries: Datastore,
    memory: Datastore,
    metric: Metric,
    index_name: str,
    nprobe: NProbe,
    k: int,
    exclude_window: int = 0,
    distances: bool = False,
) -> NeighborTable | None:
    """The smallest complete table made in this way that has at least k neighbours; None where
    there is none. Of a split in shards there is one where all of them have one.

    Args:
        queries, memory, index_name, nprobe, k, exclude_window: see `NeighborSearch`.
        metric: how keys are compared.
        distances: only a table that keeps them will do.

    Raises:
        InputError: a manifest cannot be read, or its files are not what it says.
    """
    made_by = (memory, metric, index_name, nprobe, k, exclude_window, distances)
    shards = queries.shards()
    if shards:
        tables = [find_table(shard, *made_by) for shard in shards]
        return None if None in tables else NeighborTable.join(tables, shards[0].part.placement)
    identity = _identity(queries, memory, metric, index_name, nprobe, exclude_window)
    fitting = {}
    for path in sorted(queries.path.glob("neighbors-k*.json")):
        manifest = read_manifest(path, KIND, VERSION, FIELDS)
        kept = manifest["distances"] or not distances
        if manifest["complete"] and manifest["k"] >= k and kept and _is(manifest, identity):
            fitting.setdefault(manifest["k"], path)
    return NeighborTable.open(fitting[min(fitting)]) if fitting else None


class NeighborSearch:
    """Makes one neighbour table: searches for every token, and keeps what is done.

    Args:
        queries: the split's own datastore, or one shard of it; row i is the query of token i, rows
            without a key get no neighbours.
        memory: where to search, or one shard of it.
        retriever: searches all of it.
        index_name: `flat` or what the retriever's index is called, part of the table's identity.
        nprobe: which it visits.
        k: neighbours a token.
        exclude_window: of a split that searches itself, drop the rows less than this many tokens
            away from the query's own; k are found all the same.
        keep_distances: write them beside the rows.

    Raises:
        InputError: keys of different widths, or a window between different splits.
    """

    def __init__(
        self,
        queries: Datastore,
        memory: Datastore,
        retriever: Retriever,
        index_name: str,
        nprobe: NProbe,
        k: int,
        exclude_window: int = 0,
        keep_distances: bool = False,
    ) -> None:
        refuse_mismatch(queries.path, {"dim": queries.dim}, {"dim": memory.dim})
        tokens = len(queries) if queries.part is None else queries.part.placement.rows
        self.memory_rows = memory.whole["rows"]
        if exclude_window > 0 and tokens != self.memory_rows:
            raise InputError(
                f"{queries.path}: has {tokens} rows and {memory.path} {self.memory_rows}; "
                f"expected the same split where a window of {exclude_window} tokens is excluded"
            )
        self.queries = queries
        self.memory = memory
        self.retriever = retriever
        self.k = k
        self.exclude_window = exclude_window
        self.keep_distances = keep_distances
        self.identity = {
            "k": k,
            **_identity(queries, memory, retriever.metric, index_name, nprobe, exclude_window),
            "distances": keep_distances,
        }
        self.path = _manifest_path(queries.path, self.identity)

    def run(self, report: Report = lambda *_: None) -> NeighborTable:
        """Searches and publishes the table; continues an unfinished one.

        Args:
            report: called with a stage, how much of it is done, and how much there is.

        Raises:
            InputError: the disk has no room, or the unfinished table is damaged.
        """
        shape = (len(self.queries), self.k)
        dtype = _row_type(self.memory_rows)
        arrays = {self.path.with_suffix(".npy").name: (dtype, shape)}
        if self.keep_distances:
            arrays[_distances_of(self.path).name] = (np.dtype(np.float32), shape)
        fill_rows(
            self.path,
            KIND,
            VERSION,
            {**self.identity, "dtype": dtype.name},
            arrays,
            QUERIES_AT_ONCE,
            self._block,
            lambda done, total: report("searching", done, total),
        )
        return NeighborTable.open(self.path)

    @property
    def _farthest(self) -> float:
        return np.inf if self.retriever.metric == "l2" else -np.inf

    def _block(self, first: int, last: int) -> tuple[np.ndarray, ...]:
        """Rows, and distances where kept, `[last - first, k]` of these tokens."""
        positions = np.arange(first, last)
        positions = positions[~np.isin(positions, self.queries.masked)]
        rows = np.full((last - first, self.k), -1, dtype=np.int64)
        distances = np.full((last - first, self.k), self._farthest, dtype=np.float32)
        if len(positions):
            tokens = self.queries.in_whole(positions)
            found = self._search(self.queries.read(tokens), tokens)
            rows[positions - first], distances[positions - first] = found
        return (rows, distances) if self.keep_distances else (rows,)

    def _search(self, queries: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and distances `[n, k]`, those in the window left out.

        Few queries have much of their window among their neighbours: all fetch a little more than
        k, and those who then lack some four times as many, until what they fetch is enough in any
        case.
        """
        enough = self.k + max(2 * self.exclude_window - 1, 0)
        count = min(enough, self.k + max(16, self.k // 8))
        rows, distances, lacking = self._fetch(queries, positions, count)
        who = np.flatnonzero(lacking)
        while count < enough and len(who):
            count = min(4 * count, enough)
            rows[who], distances[who], lacking = self._fetch(queries[who], positions[who], count)
            who = who[lacking]
        return rows, distances

    def _fetch(
        self, queries: np.ndarray, positions: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows and distances `[n, k]` of what is left of `count` neighbours, and bool `[n]`, who
        has fewer than k though there are more to fetch."""
        n_keys = self.memory.n_keys_of_whole
        count = min(count, n_keys)
        distances, rows, _ = self.retriever.search(queries, count)
        kept = outside_window(rows, positions, self.exclude_window)
        lacking = (kept.sum(axis=1) < self.k) & (rows[:, -1] >= 0)
        return (
            compacted(rows, kept, self.k, -1),
            compacted(distances, kept, self.k, self._farthest),
            lacking & (count < n_keys),
        )


def _row_type(rows: int) -> np.dtype:
    """The smallest of int16, int32 and int64 that holds row numbers below `rows`."""
    types = map(np.dtype, (np.int16, np.int32, np.int64))
    return next(dtype for dtype in types if rows - 1 <= np.iinfo(dtype).max)
