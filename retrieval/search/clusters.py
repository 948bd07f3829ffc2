"""Clusters of a datastore's keys: the states of RetoMaton's automaton (Alon et al., ICML 2022).

Beside the keys, `clusters-<count>.npy` int32 [N] has the k-means cluster of each row, -1 for a row
without a key, and `clusters-<count>-centroids.npy` fp32 [count, d] the centroids. The manifest
`clusters-<count>.json` says how many rows are assigned, and a killed run goes on from there.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import faiss
import numpy as np

from neighborlm.common.errors import InputError
from neighborlm.common.progress import Report
from neighborlm.retrieval.store.arrays import Layout, open_array, save_array
from neighborlm.retrieval.store.artifact import Artifact, Format, Job, share_out
from neighborlm.retrieval.store.datastore import BLOCK_BYTES, Datastore

FORMAT = Format("set of clusters", 1, ("rows", "datastore", "clusters", "seed"), ("faiss", "numpy"))
KEYS_A_CLUSTER = 100
"""Keys to each cluster for `auto`, as in the paper."""
SAMPLE_A_CLUSTER = 64
"""Keys to each cluster in the sample for k-means; faiss asks for at least 39."""
ITERATIONS = 20


@dataclass(frozen=True)
class Clusters:
    """The clusters of all rows.

    Attributes:
        labels: int32 `[N]`, the cluster of each row, -1 for a row without a key.
        count: number of clusters.
        members: int64, rows of the first cluster in ascending order, then those of the next one.
        bounds: int64 `[count + 1]`; cluster i has `members[bounds[i] : bounds[i + 1]]`.
    """

    labels: np.ndarray
    count: int
    members: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, count: int) -> "Clusters":
        """The clusters that the labels of all rows describe.

        >>> clusters = Clusters.of(np.array([1, 0, -1, 1], np.int32), 2)
        >>> clusters.members.tolist(), clusters.bounds.tolist()
        ([1, 0, 3], [0, 1, 3])
        """
        order = np.argsort(labels, kind="stable")
        bounds = np.searchsorted(labels[order], np.arange(count + 1))
        return cls(labels, count, order[bounds[0] :], bounds - bounds[0])


def cluster_count(datastore: Datastore, clusters: int | Literal["auto"]) -> int:
    """The number of clusters that `auto` stands for; any other number as it is.

    Raises:
        InputError: more clusters than keys.
    """
    count = max(datastore.n_keys // KEYS_A_CLUSTER, 1) if clusters == "auto" else clusters
    if count > datastore.n_keys:
        raise InputError(
            f"--automaton.clusters is {count}, but {datastore.path} has only {datastore.n_keys} "
            "keys; expected fewer"
        )
    return count


def ensure_clusters(
    datastore: Datastore, count: int, seed: int = 1, report: Report = lambda *_: None
) -> Clusters:
    """Opens the clusters of a datastore, after making them where they are missing or unfinished. Of
    several processes one makes them and the others wait.

    Args:
        datastore: the whole datastore, not a shard.
        count: number of clusters.
        seed: of the sample and of k-means.
        report: called with a stage, how much of it is done, and how much there is.

    Raises:
        InputError: the clusters there are of another datastore or seed, or the disk has no room.
    """
    path = datastore.path / f"clusters-{count}.npy"
    artifact = Artifact(FORMAT, path.with_suffix(".json"), path)
    layout = Layout(np.dtype(np.int32), (len(datastore),))
    made_from = {
        "rows": len(datastore),
        "datastore": datastore.fingerprint,
        "clusters": count,
        "seed": seed,
    }

    def make() -> None:
        centroids = path.with_name(f"{path.stem}-centroids.npy")
        if not artifact.exists():
            report("clustering", 0, 1)
            save_array(centroids, _trained(datastore, count, seed))
            report("clustering", 1, 1)
        assign = partial(_assigned, datastore, np.load(centroids))
        step = max(BLOCK_BYTES // (4 * datastore.dim), 1)
        told = partial(report, "assigning")
        artifact.fill(made_from, {path.name: layout}, step, assign, told, [centroids])

    share_out([Job(artifact.lock(), lambda: artifact.is_complete(made_from), make)])
    artifact.open(made_from)
    return Clusters.of(open_array(path, layout), count)


def _assigned(
    datastore: Datastore, centroids: np.ndarray, first: int, last: int
) -> tuple[np.ndarray]:
    """Labels of rows `first` to `last`: the nearest of the centroids fp32 `[count, d]`."""
    labels = np.full(last - first, -1, dtype=np.int32)
    rows = np.setdiff1d(np.arange(first, last), datastore.masked, assume_unique=True)
    if len(rows):
        _, nearest = faiss.knn(datastore.read(rows), centroids, 1)
        labels[rows - first] = nearest[:, 0]
    return (labels,)


def _trained(datastore: Datastore, count: int, seed: int) -> np.ndarray:
    """Centroids fp32 `[count, d]`."""
    _, sample = datastore.sample(SAMPLE_A_CLUSTER * count, seed)
    kmeans = faiss.Kmeans(
        datastore.dim,
        count,
        niter=ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=SAMPLE_A_CLUSTER,
    )
    kmeans.train(sample)
    return kmeans.centroids
