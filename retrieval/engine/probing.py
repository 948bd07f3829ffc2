"""Chooses the inverted lists of an index that a query visits."""

from functools import cached_property

import faiss
import numpy as np

from neighborlm.common.contracts import NProbe
from neighborlm.retrieval.engine.loops import choose_lists
from neighborlm.retrieval.engine.parallel import in_parallel, product

FEWEST, MOST = 8, 32
"""Numbers of lists that `auto` visits."""
SLACK = 1.25
"""How much farther than the nearest list another may be for `auto`, in units of the mean squared
distance from a centroid to the nearest other one; docs/index.md compares other values."""
NEIGHBORHOOD = 8
"""Groups of so many lists are not ordered further, see `Probing.ranks`."""


class Probing:
    """Chooses the lists to visit.

    A fixed number visits as many lists for a query near a centroid, whose neighbours all lie in
    that list, as for a query between many lists. `auto` visits a list if its centroid is at most
    `slack` farther than the nearest one. SPANN allows a share of the distance instead (Chen et al.,
    NeurIPS 2021, equation 3), which gives queries next to a centroid too few lists.

    Args:
        ivf: a trained index; its nprobe is set.
        nprobe: see `NProbe`.
        sample: centroids on which their middle and the mean distance to the nearest other one are
            measured.
        block: distances to centroids that are computed at a time, so that they stay in the cache.

    Attributes:
        most: the largest number of lists that a query visits.
        similar: whether a large distance is near, as with inner products.
        middle: fp32 `[d]`, amid the centroids, or zeros for inner products.
        centroids: fp32 `[nlist, d]`, relative to the middle.
        slack: squared distance, for inner products half of one; infinite where every query visits
            `most` lists. It scales with the keys as distances do, and is the same for indexes with
            the same centroids, such as those of a datastore's shards.
    """

    def __init__(
        self, ivf: faiss.IndexIVF, nprobe: NProbe, sample: int = 1024, block: int = 1 << 18
    ) -> None:
        self.ivf = ivf
        self.block = block
        self.most = min(MOST if nprobe == "auto" else nprobe, ivf.nlist)
        self.slack = np.inf
        self.similar = ivf.metric_type == faiss.METRIC_INNER_PRODUCT
        ivf.nprobe = self.most
        self.centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)
        self.middle = np.zeros(ivf.d, dtype=np.float32)
        if not self.similar:  # distances from far away would lose their digits
            # Of a sample, and the median, which a few centroids far out do not move.
            self.middle = np.median(self.centroids[:: -(-ivf.nlist // sample)], axis=0)
            self.centroids -= self.middle
        self.compares_all = isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexFlat)
        if nprobe == "auto" and self.most > FEWEST:
            some = np.ascontiguousarray(self.centroids[:: -(-ivf.nlist // sample)])
            self.slack = SLACK * faiss.knn(some, self.centroids, 2)[0][:, 1].mean()
            if self.similar:
                self.slack /= 2

    def nearest(self, queries: np.ndarray, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The lists to visit, the nearest one first.

        Where faiss would compare a query with every centroid, this is done here: its heap of the
        nearest takes longer than the distances.

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
        if self.compares_all:
            rows = max(self.block // self.ivf.nlist, 1)
            blocks = [queries[first : first + rows] for first in range(0, len(queries), rows)]
            if len(blocks) < 2:  # handing it to a thread takes longer than doing it
                distances, lists = self._of_all(queries)
            else:
                found = in_parallel(self._of_all, blocks, threads)
                distances, lists = map(np.concatenate, zip(*found, strict=True))
        else:
            distances, numbers = self.ivf.quantizer.search(queries, self.most)
            columns = self._choose(-distances if self.similar else distances)
            distances = np.take_along_axis(distances, columns, axis=1)
            lists = np.where(columns < 0, -1, np.take_along_axis(numbers, columns, axis=1))
        lists[~finite] = -1
        return distances, lists

    def _choose(self, far: np.ndarray) -> np.ndarray:
        """Columns of the lists to visit, from distances fp32 `[n, lists]`; see `choose_lists`."""
        columns = np.empty((len(far), self.most), dtype=np.int64)
        choose_lists(far, FEWEST, np.float32(self.slack), columns)
        return columns

    def _of_all(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `nearest`, by comparison with all centroids."""
        relative = queries - self.middle
        far = product(relative * np.float32(-1 if self.similar else -2), self.centroids.T)
        if not self.similar:
            far += self._lengths
        lists = self._choose(far)
        far = np.take_along_axis(far, lists, axis=1)
        if self.similar:
            return -far, lists
        far += np.vecdot(relative, relative)[:, None]
        return np.maximum(far, 0, out=far), lists

    @cached_property
    def ranks(self) -> np.ndarray:
        """Ranks of the lists, int64 `[nlist]`, in an order that keeps most near lists close
        together: the centroids are halved along the direction of their largest variance, then each
        half, and so on."""
        ranks = np.empty(len(self.centroids), dtype=np.int64)
        parts = [np.arange(len(ranks))]
        ranked = 0
        while parts:
            part = parts.pop()
            if len(part) <= NEIGHBORHOOD:
                ranks[part] = np.arange(ranked, ranked + len(part))
                ranked += len(part)
            else:
                along = _along_most_varied(self.centroids[part])
                parts += reversed(np.array_split(part[np.argsort(along, kind="stable")], 2))
        return ranks

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Squared lengths of the centroids, fp32 `[nlist]`."""
        return np.vecdot(self.centroids, self.centroids)


def _along_most_varied(vectors: np.ndarray) -> np.ndarray:
    """Projections fp32 `[n]` of vectors fp32 `[n, d]` on, approximately, the direction of the
    largest variance, found by a few steps of power iteration."""
    vectors = vectors - vectors.mean(0)
    direction = vectors[np.vecdot(vectors, vectors).argmax()]
    for _ in range(4):
        direction = vectors.T @ (vectors @ direction)
        direction /= max(np.linalg.norm(direction), np.finfo(np.float32).tiny)
    return vectors @ direction
