"""Neighbour tables of the original GNN-LM, raw maps without a header, read in place."""

from pathlib import Path
from typing import Literal

import numpy as np

from neighborlm.common.digests import path_from
from neighborlm.common.errors import InputError
from neighborlm.common.files import digest_of
from neighborlm.common.progress import Report
from neighborlm.retrieval.neighbors.tables import NeighborTable, artifact_of
from neighborlm.retrieval.store.arrays import Layout, map_raw
from neighborlm.retrieval.store.artifact import refuse_mismatch
from neighborlm.retrieval.store.datastore import Datastore

ROWS_AT_ONCE = 8192
"""Rows that are checked at a time."""


def imported_path(queries: Datastore, k: int | Literal["*"]) -> Path:
    """Path of the manifest of a split's imported table; `*` gives a pattern for any k."""
    return queries.path / f"neighbors-k{k}-imported.json"


def open_imported(queries: Datastore, memory: Datastore, k: int) -> NeighborTable:
    """Opens the smallest imported table with at least k neighbours.

    Raises:
        InputError: there is none, or it is of other datastores.
    """
    paths = queries.path.glob(imported_path(queries, "*").name)
    found = {artifact_of(path).read()["k"]: path for path in paths}
    enough = [size for size in found if size >= k]
    if not enough:
        raise InputError(
            f"{queries.path}: has imported tables of {sorted(found)} neighbours; expected one of "
            f"{k} or more, which neighborlm neighbors imports"
        )
    table = NeighborTable.open(found[min(enough)])
    fingerprints = {"queries": queries.fingerprint, "memory": memory.fingerprint}
    refuse_mismatch(table.path, table.manifest, fingerprints)
    return table


def import_table(
    path: Path,
    k: int,
    queries: Datastore,
    memory: Datastore,
    report: Report = lambda *_: None,
) -> NeighborTable:
    """Registers a raw table of the original program, in place: int64 `[N, k]` without a header.

    Args:
        path: the file, `neighbors.mmap.<k>`.
        k: neighbours per token.
        queries: datastore of the split; the manifest is written there.
        memory: datastore whose rows the table holds.
        report: called with the progress; see `common.progress.Report`.

    Raises:
        InputError: the file is missing, of another size, or holds rows that `memory` lacks.
    """
    layout = Layout(np.dtype(np.int64), (len(queries), k))
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected neighbours of the original program")
    rows, offset = map_raw(path, layout)
    _check_rows(path, rows, memory, report)
    sample = rows[np.unique(np.linspace(0, len(rows) - 1, 256).astype(np.int64))]
    fields = {
        "k": k,
        "rows": len(queries),
        "queries": queries.fingerprint,
        "memory": memory.fingerprint,
        "content": digest_of(sample.tobytes()),
        "dtype": layout.dtype.name,
        "distances": False,
        "raw": {"path": path_from(queries.path, path), "offset": offset},
    }
    artifact = artifact_of(imported_path(queries, k))
    with artifact.lock():
        artifact.write(fields, complete=True, files=[path])
    return NeighborTable.open(artifact.manifest)


def _check_rows(path: Path, rows: np.ndarray, memory: Datastore, report: Report) -> None:
    """Raises InputError if a table int64 `[N, k]` holds a row that the memory lacks."""
    for first in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[first : first + ROWS_AT_ONCE]
        last, lowest, highest = first + len(block), block.min(), block.max()
        if lowest < -1 or highest >= len(memory):
            raise InputError(
                f"{path}: holds rows from {lowest} to {highest} for tokens {first} to {last - 1}; "
                f"expected -1 or below the {len(memory):,} of {memory.path}"
            )
        report("checking", last, len(rows))
