"""A mixer of one's own: the nearer the nearest neighbour, the more the neighbours weigh."""

import numpy as np
import torch

from neighborlm.common.contracts import Mixer
from neighborlm.retrieval.memories import MIXERS


class ByDistance(Mixer):
    needs_fitting = False

    def weights(self, features, n):
        of_knn = 0.9 * torch.exp(-features["knn.nearest_distance"].double())
        return torch.stack([1 - of_knn, of_knn], dim=1)


def test_the_weight_follows_the_nearest_distance(evaluated, monkeypatch):
    monkeypatch.setitem(MIXERS, "by_distance", ByDistance)
    flags = ("--knnlm", "--mixer", "by_distance", "--knn.k", 8, "--knn.index", "flat")
    results, scores = evaluated(*flags)
    of_knn = 0.9 * np.exp(-scores["knn.nearest_distance"].astype(np.float64))
    assert of_knn.std() > 0.01
    lm, knn = (np.exp(scores[f"{name}_log_prob"].astype(np.float64)) for name in ("lm", "knn"))
    expected = np.exp(-np.log((1 - of_knn) * lm + of_knn * knn).mean())
    np.testing.assert_allclose(results["mixture"]["ppl"], expected, rtol=1e-6)
    np.testing.assert_allclose(results["mixture"]["weight.knn"], of_knn.mean(), rtol=1e-6)
