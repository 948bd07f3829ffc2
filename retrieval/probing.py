"""Which inverted lists of an index a query visits."""

from functools import cached_property
from typing import Literal

import faiss
import numpy as np

from retrieval.loops import choose_lists
from retrieval.parallel import in_parallel, product

NProbe = int | Literal["auto"]
"""How many lists, or `auto`: those that are not much farther than the nearest one."""
FEWEST, MOST = 8, 32
"""Lists that `auto` visits."""
SLACK = 1.25
"""How much farther than the nearest one a list may be for `auto`, in mean squared distances between
a centroid and the nearest other one; docs/index.md has what others cost."""
SAMPLE = 1024
"""Centroids whose distance to the nearest other one is looked up."""
BLOCK = 1 << 18
"""Distances to centroids that are looked at together: they stay in the cache."""


class Probing:
    """Chooses the lists to visit.

    A fixed number spends as much on a query in the middle of its list, whose neighbours all lie
    there, as on one that lies between many. `auto` visits a list if its centroid is at most `slack`
    farther than the nearest one; SPANN does the same with a share of the distance (Chen et al.,
    NeurIPS 2021, equation 3), which leaves queries next to a centroid with too few.

    Args:
        ivf: a trained index; its nprobe is set.
        nprobe: see `NProbe`.

    Attributes:
        most: lists that a query visits at most.
        similar: whether large is near.
        middle: fp32 `[d]`, of all centroids, or zeros for inner products.
        centroids: fp32 `[nlist, d]`, relative to the middle.
        slack: squared distance, for inner products half of one; infinite where all `most` are
            visited. It grows with the keys as distances do, and indexes with the same centroids,
            such as those of a datastore's shards, have the same.
    """

    def __init__(self, ivf: faiss.IndexIVF, nprobe: NProbe) -> None:
        self.ivf = ivf
        self.most = min(MOST if nprobe == "auto" else nprobe, ivf.nlist)
        self.slack = np.inf
        self.similar = ivf.metric_type == faiss.METRIC_INNER_PRODUCT
        ivf.nprobe = self.most
        self.centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)
        self.middle = np.zeros(ivf.d, dtype=np.float32)
        if not self.similar:  # distances from far away would lose their digits
            self.middle = self.centroids.mean(0)
            self.centroids -= self.middle
        self.compares_all = isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexFlat)
        if nprobe == "auto" and self.most > FEWEST:
            sample = np.ascontiguousarray(self.centroids[:: -(-ivf.nlist // SAMPLE)])
            self.slack = SLACK * faiss.knn(sample, self.centroids, 2)[0][:, 1].mean()
            if self.similar:
                self.slack /= 2

    def nearest(self, queries: np.ndarray, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The lists to visit, the nearest one first.

        faiss keeps the nearest in a heap, which takes longer than all distances; where it compares
        a query with every centroid it is done here.

        Args:
            queries: fp32 `[Q, d]`, as the index's lists see them.
            threads: how many may work at a time.

        Returns:
            distances to their centroids fp32 and numbers int64 `[Q, most]`; -1 where there are
            fewer, and for a query that is not finite.
        """
        finite = np.isfinite(queries).all(axis=1)
        if not finite.all():
            queries = np.where(finite[:, None], queries, np.float32(0))
        far = np.empty((len(queries), self.most), dtype=np.float32)
        lists = np.empty((len(queries), self.most), dtype=np.int64)
        rows = max(BLOCK // self.ivf.nlist, 1)

        def choose(first: int) -> None:
            part = slice(first, first + rows)
            of_part, numbers = self._compare(queries[part])
            choose_lists(of_part, FEWEST, np.float32(self.slack), lists[part])
            far[part] = np.take_along_axis(of_part, lists[part], axis=1)
            if numbers is not None:
                found = np.take_along_axis(numbers, lists[part], axis=1)
                lists[part] = np.where(lists[part] < 0, -1, found)

        in_parallel(choose, range(0, len(queries), rows), threads if self.compares_all else 1)
        lists[~finite] = -1
        if self.similar:
            return -far, lists
        relative = queries - self.middle
        far += np.vecdot(relative, relative)[:, None]
        return np.maximum(far, 0, out=far), lists

    def _compare(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """How far centroids are fp32 `[n, lists]`, for l2 less the query's squared length; and
        their numbers int64, if these are not all."""
        relative = queries - self.middle
        if self.compares_all:
            far = product(relative * np.float32(-1 if self.similar else -2), self.centroids.T)
            if not self.similar:
                far += self._lengths
            return far, None
        distances, lists = self.ivf.quantizer.search(queries, self.most)
        if self.similar:
            return -distances, lists
        return distances - np.vecdot(relative, relative)[:, None], lists

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Squared lengths of the centroids, fp32 `[nlist]`."""
        return np.vecdot(self.centroids, self.centroids)
