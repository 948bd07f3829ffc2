"""Which inverted lists of an index a query visits."""

from typing import Literal

import faiss
import numpy as np

NProbe = int | Literal["auto"]
"""How many lists, or `auto`: those that are not much farther than the nearest one."""
FEWEST, MOST = 8, 32
"""Lists that `auto` visits."""
SLACK = 1.25
"""How much farther than the nearest one a list may be for `auto`, in mean squared distances between
a centroid and the nearest other one; docs/index.md has what others cost."""
SAMPLE = 1024
"""Centroids whose distance to the nearest other one is looked up."""


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
        slack: squared distance, for inner products half of one; infinite where all `most` are
            visited. It grows with the keys as distances do, and indexes with the same centroids,
            such as those of a datastore's shards, have the same.
    """

    def __init__(self, ivf: faiss.IndexIVF, nprobe: NProbe) -> None:
        self.ivf = ivf
        self.most = min(MOST if nprobe == "auto" else nprobe, ivf.nlist)
        self.slack = np.inf
        ivf.nprobe = self.most
        if nprobe == "auto" and self.most > FEWEST:
            centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)
            sample = np.ascontiguousarray(centroids[:: -(-ivf.nlist // SAMPLE)])
            self.slack = SLACK * faiss.knn(sample, centroids, 2)[0][:, 1].mean()
            if ivf.metric_type == faiss.METRIC_INNER_PRODUCT:
                self.slack /= 2

    def nearest(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lists to visit, nearest first.

        Args:
            queries: fp32 `[Q, d]`, as the index's lists see them.

        Returns:
            distances to their centroids fp32 and numbers int64 `[Q, most]`; -1 where there are
            fewer.
        """
        distances, lists = self.ivf.quantizer.search(queries, self.most)
        if self.slack < np.inf:
            farther = np.abs(distances[:, FEWEST:] - distances[:, :1])
            lists[:, FEWEST:][farther > self.slack] = -1
        return distances, lists
