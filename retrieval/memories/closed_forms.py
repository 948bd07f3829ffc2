"""Published formulas for the weight of a kNN memory, which depends on the distances of its
neighbours.

`DrozdovMixer`: one lmbda for each bucket of the nearest distance (Drozdov et al., Findings of EMNLP
2022). `NestMixer`: the relative confidence of NEST (Li et al., NeurIPS 2024),

    lmbda_LM = sigmoid((d_nearest / d_farthest - alpha) / tau),

where d_nearest and d_farthest are squared distances among the k neighbours. Both mix the language
model with that memory alone.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.contracts import Mixer, Opinion
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.buckets import bucket_of, equal_count_edges, scalar_feature
from neighborlm.retrieval.memories.mixers import (
    features_of,
    mixture,
    refuse_unfitted,
    source_log_probs,
)

LMBDAS = torch.arange(100, dtype=torch.float64) / 100
"""Weights of the memory that `DrozdovMixer.fit` tries."""
ALPHAS = torch.arange(21, dtype=torch.float64) / 20
TAUS = torch.tensor([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0], dtype=torch.float64)
"""Constants that `NestMixer.fit` tries; the paper's suit stores of a few documents."""


class DrozdovMixer(Mixer):
    """One lmbda for each bucket of the nearest distance.

    Args:
        buckets: their number, with equally many validation tokens in each; 32 did best in the
            paper, its program has 64.
        memory: name of the memory whose feature `nearest_distance` is read.

    Attributes:
        edges: fp64, where each bucket but the first begins.
        lmbdas: fp64 `[buckets + 1]`, the last for NaN.
    """

    needs_fitting = True

    def __init__(self, buckets: int = 32, memory: str = "knn") -> None:
        self.buckets = buckets
        self.nearest = f"{memory}.nearest_distance"
        self.edges: Tensor | None = None
        self.lmbdas: Tensor | None = None

    def fit(self, opinions: Mapping[str, Opinion]) -> None:
        """Finds, for each bucket, the lmbda from 0 to .99 in steps of .01 that gives its tokens the
        highest likelihood.

        Raises:
            InputError: there is another memory, or no such feature.
        """
        log_probs = two_sources(opinions, type(self).__name__)
        column = scalar_feature(features_of(opinions), self.nearest)
        self.edges = equal_count_edges(column, self.buckets)
        bucket = bucket_of(column, self.edges)
        losses = torch.zeros(len(LMBDAS), len(self.edges) + 2, dtype=torch.float64)
        for total, lmbda in zip(losses, LMBDAS, strict=True):
            total.scatter_add_(0, bucket, -mixture(log_probs, [1 - lmbda, lmbda]))
        self.lmbdas = LMBDAS[losses.argmin(dim=0)]

    def weights(self, features: Mapping[str, Tensor], n: int) -> Tensor:
        """See `Mixer.weights`."""
        refuse_unfitted(self.lmbdas)
        lmbda = self.lmbdas[bucket_of(scalar_feature(features, self.nearest), self.edges)]
        return torch.stack([1 - lmbda, lmbda], dim=1)

    def state(self) -> dict[str, np.ndarray]:
        """See `Mixer.state`."""
        refuse_unfitted(self.lmbdas)
        arrays = {"edges": self.edges.numpy(), "lmbdas": self.lmbdas.numpy()}
        return arrays | {"nearest": np.array(self.nearest)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See `Mixer.restore`."""
        self.edges, self.lmbdas = (torch.from_numpy(state[name]) for name in ("edges", "lmbdas"))
        self.nearest = str(state["nearest"])
        self.needs_fitting = False


class NestMixer(Mixer):
    """The weight of the language model grows with the ratio of the nearest to the farthest
    distance; it is 1 where there are no neighbours.

    Args:
        alpha, tau: constants of the formula, .3 and .1 in the paper; None to have `fit` find both.
        memory: name of the memory whose features `nearest_distance` and `kth_distance` are read.

    Raises:
        InputError: only one of the two is given, or tau is not more than 0.
    """

    def __init__(
        self, alpha: float | None = None, tau: float | None = None, memory: str = "knn"
    ) -> None:
        if (alpha is None) != (tau is None) or (tau is not None and not tau > 0):
            raise InputError(
                f"NEST has alpha {alpha} and tau {tau}; expected both, tau more than 0, or neither"
            )
        self.alpha, self.tau = alpha, tau
        self.needs_fitting = alpha is None
        self.names = (f"{memory}.nearest_distance", f"{memory}.kth_distance")

    def fit(self, opinions: Mapping[str, Opinion]) -> None:
        """Finds the alpha and tau of the highest likelihood in a grid that includes the paper's.

        Raises:
            InputError: there is another memory, or the features are missing or no distances.
        """
        log_probs = two_sources(opinions, type(self).__name__)
        ratio = self._ratio(features_of(opinions))
        losses = {
            (alpha, tau): -mixture(log_probs, nest_weights(ratio, alpha, tau)).sum().item()
            for alpha in ALPHAS.tolist()
            for tau in TAUS.tolist()
        }
        self.alpha, self.tau = min(losses, key=lambda pair: losses[pair])

    def _ratio(self, features: Mapping[str, Tensor]) -> Tensor:
        """d_nearest / d_farthest, fp64 `[n]`; 0 where both are 0, infinite without neighbours."""
        nearest, farthest = (scalar_feature(features, name) for name in self.names)
        some = nearest.isfinite()
        if (some & ((nearest < 0) | (nearest > farthest))).any():
            raise InputError(
                f"NEST reads squared distances, but {self.names[0]} is below 0 or above "
                f"{self.names[1]}; expected --knn.metric l2"
            )
        return torch.where(some, (nearest / farthest).nan_to_num(nan=0.0), torch.inf)

    def weights(self, features: Mapping[str, Tensor], n: int) -> Tensor:
        """See `Mixer.weights`."""
        refuse_unfitted(self.alpha)
        return torch.stack(nest_weights(self._ratio(features), self.alpha, self.tau), dim=1)

    def state(self) -> dict[str, np.ndarray]:
        """See `Mixer.state`."""
        refuse_unfitted(self.alpha)
        return {"alpha_tau": np.array([self.alpha, self.tau]), "features": np.array(self.names)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See `Mixer.restore`."""
        self.alpha, self.tau = state["alpha_tau"].tolist()
        self.names = tuple(state["features"].tolist())
        self.needs_fitting = False


def nest_weights(ratio: Tensor, alpha: float, tau: float) -> tuple[Tensor, Tensor]:
    """Weights of the language model and of the memory, `[n]` each, by d_nearest / d_farthest."""
    exponent = (ratio - alpha) / tau
    return exponent.sigmoid(), (-exponent).sigmoid()


def two_sources(opinions: Mapping[str, Opinion], mixer: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the language model and of the only memory, fp64 `[n]` each.

    Raises:
        InputError: there is no memory, or more than one.
    """
    log_probs = source_log_probs(opinions)
    if log_probs.shape[1] != 2:
        memories = ", ".join(list(opinions)[1:])
        raise InputError(
            f"{mixer} weighs the language model and one memory, but there are {log_probs.shape[1]} "
            f"sources ({memories}); expected --memories knn"
        )
    return log_probs[:, 0], log_probs[:, 1]
