"""`BucketMixer`: weights that depend on features, such as the distance of the nearest neighbour or
the length of the suffix that was found.

Each feature is cut into buckets with equally many validation tokens; a cell is a combination of
buckets. The weights of a cell maximise the likelihood of its tokens and of `strength` more that
have the shares of the next coarser cell, the one without the last feature; the coarsest cell holds
all tokens. So a cell with few tokens has almost the weights of the coarser one, and an empty cell
has just those.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.contracts import Mixer, Opinion
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.mixers import (
    feature,
    features_of,
    fit_weights,
    held_out,
    mixture,
    names_of,
    refuse_unfitted,
    source_log_probs,
    want_of,
)

BUCKETS, STRENGTH = 8, 50.0
"""Buckets of a feature, and how many tokens with the shares of the coarser cell are added."""
FEATURES_AT_MOST, LEAST_GAIN = 3, 1e-3
"""How many features are chosen at most, and the least gain of each in nats a token."""
ROUGHLY = 1e-4
"""EM ends at this change of the weights while features are compared."""


class BucketMixer(Mixer):
    """Weights by cells of features.

    Args:
        features: names such as `knn.nearest_distance`, the most important first: coarser cells
            leave out the last. None to have `fit` choose them, one after another, by the likelihood
            of a held-out quarter.
        buckets: of each feature; fewer where many tokens have the same value.
        strength: how many tokens with the shares of the coarser cell are added to a cell.
        seed: of the choice of the held-out tokens.
    """

    needs_fitting = True

    def __init__(
        self,
        features: Sequence[str] | None = None,
        buckets: int = BUCKETS,
        strength: float = STRENGTH,
        seed: int = 1,
    ) -> None:
        self.features = features
        self.buckets = buckets
        self.strength = strength
        self.seed = seed
        self.want = want_of(features or ())
        self.chosen: list[str] = []
        self.edges: list[Tensor] = []
        self.cell_weights: Tensor | None = None
        """fp64 `[cells, sources]`."""

    def fit(self, opinions: Mapping[str, Opinion]) -> None:
        """See `Mixer.fit`.

        Raises:
            InputError: a feature is missing, or is more than one number.
        """
        log_probs, features = source_log_probs(opinions), features_of(opinions)
        names = list(self.features) if self.features is not None else None
        if names is None:
            names = self._chosen_among(log_probs, features)
        self.chosen = names
        self.edges = [
            equal_count_edges(scalar_feature(features, name), self.buckets) for name in names
        ]
        self.cell_weights = fit_weights(log_probs)
        for depth in range(1, len(names) + 1):
            cells, n_cells = cells_of(features, names[:depth], self.edges)
            prior = self.cell_weights.repeat_interleave(n_cells // len(self.cell_weights), dim=0)
            self.cell_weights = fit_weights(log_probs, cells, prior, self.strength)

    def _chosen_among(self, log_probs: Tensor, features: Mapping[str, Tensor]) -> list[str]:
        """The features that improve the loss of the held-out tokens most, one after another."""
        judged = held_out(len(log_probs), 0.25, self.seed)
        fitted = ~judged
        edges = {
            name: equal_count_edges(column[fitted].double(), self.buckets)
            for name, column in features.items()
            if column.dim() == 1 and name in names_of(features)
        }
        chosen: list[str] = []
        weights = fit_weights(log_probs[fitted], change=ROUGHLY)
        best = mean_loss(log_probs[judged], weights)
        while len(chosen) < FEATURES_AT_MOST:
            tried = {}
            for name in edges.keys() - chosen:
                names = [*chosen, name]
                cells, n_cells = cells_of(features, names, [edges[x] for x in names])
                prior = weights.repeat_interleave(n_cells // len(weights), dim=0)
                found = fit_weights(log_probs[fitted], cells[fitted], prior, self.strength, ROUGHLY)
                tried[name] = mean_loss(log_probs[judged], found[cells[judged]]), found
            if not tried:
                break
            name = min(sorted(tried), key=lambda name: tried[name][0])
            loss, found = tried[name]
            if not loss < best - LEAST_GAIN:
                break
            chosen, weights, best = [*chosen, name], found, loss
        return chosen

    def weights(self, features: Mapping[str, Tensor], n: int) -> Tensor:
        """See `Mixer.weights`.

        Raises:
            InputError: a feature is missing.
        """
        refuse_unfitted(self.cell_weights)
        if not self.chosen:
            return self.cell_weights.expand(n, -1)
        return self.cell_weights[cells_of(features, self.chosen, self.edges)[0]]

    def state(self) -> dict[str, np.ndarray]:
        """See `Mixer.state`."""
        refuse_unfitted(self.cell_weights)
        edges = {f"edges.{i}": edges.numpy() for i, edges in enumerate(self.edges)}
        return {
            "features": np.array(self.chosen, str),
            "weights": self.cell_weights.numpy(),
        } | edges

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See `Mixer.restore`."""
        self.chosen = self.features = state["features"].tolist()
        self.edges = [torch.from_numpy(state[f"edges.{i}"]) for i in range(len(self.chosen))]
        self.cell_weights = torch.from_numpy(state["weights"])
        self.want = want_of(self.chosen)
        self.needs_fitting = False


def scalar_feature(features: Mapping[str, Tensor], name: str) -> Tensor:
    """One feature, fp64 `[n]`.

    Raises:
        InputError: it is missing, or is more than one number.
    """
    column = feature(features, name)
    if column.dim() > 1:
        raise InputError(
            f"the feature {name} is {column.shape[1]} numbers a token; expected one that can be "
            "cut into buckets"
        )
    return column


def equal_count_edges(column: Tensor, buckets: int) -> Tensor:
    """Where each bucket but the first begins, fp64, ascending, so that all hold equally many
    numbers. Equal numbers share a bucket, so there may be fewer buckets. NaN is left out.

    >>> equal_count_edges(torch.tensor([4.0, 1.0, 2.0, 3.0]).double(), 2).tolist()
    [3.0]
    """
    ordered = column[~column.isnan()].sort().values
    if not len(ordered):
        return column.new_empty(0)
    edges = ordered[torch.arange(1, buckets) * len(ordered) // buckets].unique()
    return edges[edges > ordered[0]]


def bucket_of(column: Tensor, edges: Tensor) -> Tensor:
    """The bucket of each number, int64 `[n]`: the number of edges that are not above it. NaN has a
    bucket of its own, the last."""
    bucket = torch.searchsorted(edges, column.contiguous(), right=True)
    return torch.where(column.isnan(), len(edges) + 1, bucket)


def cells_of(
    features: Mapping[str, Tensor], names: Sequence[str], edges: Sequence[Tensor]
) -> tuple[Tensor, int]:
    """The cell of each token, int64 `[n]`, and the number of cells. Cells that differ in the last
    feature alone follow one another, so that division gives the coarser cell."""
    cells, n_cells = torch.zeros((), dtype=torch.int64), 1
    for name, of_name in zip(names, edges, strict=False):
        size = len(of_name) + 2
        cells = cells * size + bucket_of(scalar_feature(features, name), of_name)
        n_cells *= size
    return cells, n_cells


def mean_loss(log_probs: Tensor, weights: Tensor) -> float:
    """Mean negative log-likelihood, nats a token, of weights `[n or 1, sources]`."""
    return -mixture(log_probs.unbind(dim=1), weights.unbind(dim=1)).mean().item()
