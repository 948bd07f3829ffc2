"""Makes smaller datastores from a datastore (He et al., EMNLP 2021): merges near entries with the
same value into one entry that stands for all of them, or keeps a random part of all entries.

The result is a datastore like others, but its rows no longer follow the text. Beside the keys,
`rows.npy` int64 [M] says which rows of the larger datastore they were and, where entries were
merged, `weights.npy` uint32 [M] how many entries each stands for. With weights s_j (the paper's
program uses s_j^(1/T)):

    p_kNN(w) = sum over j with v_j = w of s_j exp(-d_j / T)  /  sum over all j of s_j exp(-d_j / T)
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from neighborlm.common.errors import InputError
from neighborlm.retrieval.store.arrays import Layout, open_array, save_array
from neighborlm.retrieval.store.artifact import SYNC_SECONDS
from neighborlm.retrieval.store.datastore import BLOCK_BYTES, Datastore, DatastoreBuilder
from neighborlm.retrieval.store.shards import ShardedArray

WEIGHT = np.dtype(np.uint32)
Report = Callable[[int, int], None]
"""What is called with how much is done, and how much there is."""


def merged(
    datastore: Datastore,
    neighbors: np.ndarray | ShardedArray,
    seed: int = 1,
    report: Report = lambda *_: None,
) -> np.ndarray:
    """How many entries each entry stands for after greedy merging.

    Entries are visited in random order. An entry that has not been merged into another absorbs each
    neighbour that has the same value, has absorbed none and has not been absorbed.

    Args:
        neighbors: signed integers `[N, K]`, the nearest rows of each row's own key, -1 where
            missing; whether the row itself is among them does not matter.
        seed: of the order.
        report: called with how many entries are visited, and how many there are.

    Returns:
        uint32 `[N]`; 0 for entries that were absorbed, and for rows without a key.
    """
    weights = np.ones(len(datastore), dtype=WEIGHT)
    weights[datastore.masked] = 0
    order = np.random.default_rng(seed).permutation(len(datastore))
    values = np.asarray(datastore.values[:])
    step = max(BLOCK_BYTES // (8 * neighbors.shape[1]), 1)
    for first in range(0, len(order), step):
        report(first, len(order))
        rows = order[first : first + step]
        _merge(rows, np.asarray(neighbors[rows]), values, weights)
    report(len(order), len(order))
    return weights


@njit(nogil=True)
def _merge(rows, neighbors, values, weights):
    """Visits some rows int64 `[n]` with neighbours `[n, K]`, see `merged`."""
    for n in range(len(rows)):
        row = rows[n]
        if weights[row] == 0:
            continue
        for other in neighbors[n]:
            free = other >= 0 and other != row and weights[other] == 1
            if free and values[other] == values[row]:
                weights[row] += 1
                weights[other] = 0


def random_rows(datastore: Datastore, share: float, seed: int = 1) -> np.ndarray:
    """A random share of the rows that have a key, int64 in ascending order.

    Raises:
        InputError: no row would be left, or none would go.
    """
    count = round(share * datastore.n_keys)
    if not 0 < count < datastore.n_keys:
        raise InputError(
            f"--share is {share}, which keeps {count:,} of the {datastore.n_keys:,} keys of "
            f"{datastore.path}; expected some of them"
        )
    chosen = np.random.default_rng(seed).choice(datastore.n_keys, count, replace=False)
    return datastore.rows_of(np.sort(chosen))


def write_thinned(
    source: Datastore,
    output: Path,
    rows: np.ndarray,
    described: dict[str, Any],
    weights: np.ndarray | None = None,
    report: Report = lambda *_: None,
) -> Datastore:
    """Writes a datastore of some rows of another; goes on where a killed run stopped.

    Args:
        source: the whole of one.
        output: directory of the new one.
        rows: int64 `[M]`, ascending, each with a key.
        described: JSON-able, how they were chosen.
        weights: uint32 `[M]`, where entries were merged.
        report: called with how many rows are written, and how many there are.

    Raises:
        InputError: the source is such a one itself, something else is there, or the disk has no
            room.
    """
    manifest = source.manifest
    vocab_size = manifest.get("vocab_size") or int(np.asarray(source.values[:]).max()) + 1
    if "thinned" in manifest["made_from"]:
        raise InputError(
            f"{source.path}: has only some rows of another datastore; expected that one"
        )
    thinned = {"from": source.fingerprint, "weights": weights is not None, **described}
    made_from = {**manifest["made_from"], "thinned": thinned}
    none = np.empty(0, dtype=np.int64)
    builder = DatastoreBuilder(
        output, len(rows), source.dim, manifest["dtype"], vocab_size, made_from, none
    )
    save_array(output / "rows.npy", rows)
    if weights is not None:
        save_array(output / "weights.npy", weights.astype(WEIGHT))
    step = max(BLOCK_BYTES // (4 * source.dim), 1)
    last_sync = time.perf_counter()
    for first in range(0, len(rows), step):
        report(first, len(rows))
        new, old = np.arange(first, min(first + step, len(rows))), rows[first : first + step]
        if not builder.is_written(new):
            builder.write(new, source.keys[old], source.values[old])
        if time.perf_counter() - last_sync > SYNC_SECONDS:
            builder.sync()
            last_sync = time.perf_counter()
    builder.sync()
    report(len(rows), len(rows))
    return builder.finish()


def open_weights(datastore: Datastore) -> np.ndarray | None:
    """How many entries each row stands for, uint32 `[M]`; None where each stands for itself."""
    if not datastore.manifest["made_from"].get("thinned", {}).get("weights"):
        return None
    return open_array(datastore.path / "weights.npy", Layout(WEIGHT, (len(datastore),)))
