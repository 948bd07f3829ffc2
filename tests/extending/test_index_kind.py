"""An index kind of one's own: all distances at once, in numpy."""

import numpy as np

from neighborlm.common.contracts import Neighbors
from neighborlm.retrieval.search import INDEX_KINDS, BaseRetriever


class AllAtOnce(BaseRetriever):
    metric, exact = "l2", True

    def __init__(self, datastore, search):
        self.datastore = datastore
        self.keys = np.concatenate(list(datastore.blocks())).astype(np.float64)

    def search(self, queries, k, ordered=True):
        distances = ((queries[:, None] - self.keys) ** 2).sum(axis=2)
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
        distances = np.take_along_axis(distances, nearest, axis=1).astype(np.float32)
        return Neighbors(distances, self.datastore.rows_of(nearest))


def test_what_it_finds_is_mixed_in(evaluated, monkeypatch):
    monkeypatch.setitem(INDEX_KINDS, "all_at_once", AllAtOnce)
    flags = ("--knnlm", "--knn.k", 16, "--knn.lmbda", 0.4, "--knn.temperature", 0.5)
    results, scores = evaluated(*flags, "--knn.index", "all_at_once")
    lm, knn = (np.exp(scores[f"{name}_log_prob"].astype(np.float64)) for name in ("lm", "knn"))
    assert (knn > 0).mean() > 0.5
    expected = np.exp(-np.log(0.6 * lm + 0.4 * knn).mean())
    np.testing.assert_allclose(results["knn"]["ppl"], expected, rtol=1e-6)
    exact, _ = evaluated(*flags, "--knn.index", "flat")
    np.testing.assert_allclose(results["knn"]["ppl"], exact["knn"]["ppl"], rtol=1e-5)
