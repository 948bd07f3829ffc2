"""Whether an index file can be searched, and whether it is an index of the datastore's keys.

A file that this computer has not yet seen as it is (see `common.digests`) is tried out by another
process. An index that says nothing of what it was built from, such as one of another program, is
asked for the nearest keys of some keys: the distances that it gives must be those to the keys of
the numbers that it gives.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from neighborlm.common.digests import compare_once, keep_stamps, stamps_of
from neighborlm.common.errors import InputError
from neighborlm.retrieval.search import index_file
from neighborlm.retrieval.search.faiss_retriever import FaissRetriever
from neighborlm.retrieval.search.index_file import files_of
from neighborlm.retrieval.search.rescoring import exact_distances
from neighborlm.retrieval.search.retriever import faiss_reason

SAMPLE, K, SEED = 64, 8, 1
FEWEST_KEYS = 4 * K
"""Among fewer keys the nearest are not much nearer than others."""
ENOUGH = 0.3
"""Share of the difference between near and arbitrary keys that must be real: indexes of these keys
give 0.5 and more, even with two bits a dimension, and others 0.05 and less."""


def check_file(path: Path, kind: str = "faiss index") -> None:
    """Refuses a file that faiss cannot work with, before this process opens it. Which files are
    tried out, `compare_once` says; those that this program has written are not.

    Raises:
        InputError: it is damaged, or no index or codec.
    """
    files = dict.fromkeys(files_of(path), "")
    compare_once(_stamps(path), files, lambda _: _try_out(path, kind), small_bytes=0)


def is_sound(path: Path) -> None:
    """Remembers that a file was written by this program, see `check_file`."""
    files = files_of(path)
    keep_stamps(_stamps(path), stamps_of(files), dict.fromkeys(files, ""), small_bytes=0)


def _stamps(path: Path) -> Path:
    return path.with_name(f".{path.name}.tried")


def _try_out(path: Path, kind: str) -> None:
    command = (sys.executable, index_file.__file__, str(path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be tried out, as no other {sys.executable} can be started "
            f"({error.strerror}); expected that it can, or --verify never for files that you trust"
        ) from None
    if done.returncode == 0:
        return
    *_, reason = ("it says nothing", *done.stderr.strip().splitlines())
    if done.returncode < 0:
        reason = f"faiss ends with {signal.Signals(-done.returncode).name}"
    raise InputError(f"{path}: cannot be read as a {kind} ({faiss_reason(reason)})")


def check_belongs(retriever: FaissRetriever) -> None:
    """Refuses an index that was built from other keys than those of its datastore, or for another
    metric; few keys are not enough to tell.

    Raises:
        InputError: it was.
    """
    datastore, metric = retriever.datastore, retriever.metric
    if datastore.n_keys < FEWEST_KEYS:
        return
    rows, keys = datastore.sample(SAMPLE, SEED)
    found = retriever.search(keys, K)
    there = found.rows >= 0
    if not there.any():
        raise InputError(f"{retriever.name}: finds no key of {datastore.path}; expected its index")
    given = found.distances[there]
    real = exact_distances(keys, found.rows, datastore, metric)[there]
    everyone = np.broadcast_to(rows, (len(rows), len(rows)))
    arbitrary = exact_distances(keys, everyone, datastore, metric).mean()
    rounding = 1e-3 * (abs(given.mean()) + abs(arbitrary))
    if metric != "l2":
        distinct, which = np.unique(found.rows[there], return_inverse=True)
        lengths = np.linalg.norm(datastore.read(distinct), axis=1)[which]
        as_other = real * lengths if metric == "cosine" else real / np.maximum(lengths, 1e-30)
        error, other_error = (float(np.abs(given - x).mean()) for x in (real, as_other))
        if other_error < error / 4 and error > rounding:
            other = "ip" if metric == "cosine" else "cosine"
            raise InputError(
                f"{retriever.name}: was built for --knn.metric {other}, but {metric} is expected "
                "here; use a matching one"
            )
    gap = abs(given.mean() - arbitrary)
    nearer = (arbitrary - real.mean()) if metric == "l2" else (real.mean() - arbitrary)
    if nearer < ENOUGH * gap - rounding:
        raise InputError(
            f"{retriever.name}: is not an index of {datastore.path}: the neighbours that it finds "
            f"of {len(rows)} stored keys are on average {real.mean():.4g} away by {metric}, and "
            f"not {given.mean():.4g} as it says; expected one that was built from these keys"
        )
