"""Mixing distributions: the probability of a token under a mixture, and what all mixers share.

The mixture of the language model and its memories (Khandelwal et al., ICLR 2020, eq. 3, for one
memory): p(w) = sum over sources s of weight_s p_s(w), the language model being the first source.
Weights are fitted to a validation split by its likelihood, of which `fit_weights` finds the
maximum.
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.contracts import Mixer, Opinion, Scored, Want
from neighborlm.common.errors import InputError

LM = "lm"
"""What the language model is called among the sources."""
EM_STEPS = 1000
"""The largest number of steps; the likelihood is concave, so further ones only come closer."""
EM_CHANGE = 1e-7
"""EM ends when no weight changes by more."""
STRETCH = 256
"""Consecutive tokens that are held out together, as neighbours in a text are alike."""
STRETCHES = 8
"""The smallest number of stretches; those of a short text are shorter than `STRETCH`."""


# -- mixtures ------------------------------------------------------------------------------------


def mixture(log_probs: Sequence[Tensor], weights: Sequence[Tensor | float]) -> Tensor:
    """Natural logarithm of the sum of weight times probability, computed in log space.

    Args:
        log_probs: natural-log probabilities by each source; -inf for a probability of 0.
        weights: weight of each source, from 0 to 1; all broadcast.

    Returns:
        log-probabilities of the same type; a source of weight or probability 0 adds nothing.

    >>> mixture([torch.tensor(0.5).log(), torch.tensor(0.1).log()], [0.75, 0.25]).exp().item()
    0.4000000059604645
    """
    weighted = (
        log_prob + torch.as_tensor(weight, dtype=torch.float64).log().to(log_prob)
        for log_prob, weight in zip(log_probs, weights, strict=True)
    )
    return reduce(torch.logaddexp, weighted)


def lm_opinion(asked: Scored) -> Opinion:
    """The language model's own opinion on n tokens, with the features that it was asked for."""
    features = {}
    if asked.entropy is not None:
        features["entropy"] = asked.entropy
    if asked.top_log_probs is not None:
        features["top_prob"] = asked.top_log_probs[:, 0].exp()
    return Opinion(asked.log_probs, features)


def want_of(features: Sequence[str]) -> Want:
    """What the language model must be asked for, so that these features are there.

    >>> want_of(["knn.nearest_distance", "lm.entropy"]).entropy
    True
    """
    return Want(entropy=f"{LM}.entropy" in features, top=int(f"{LM}.top_prob" in features))


def source_log_probs(opinions: Mapping[str, Opinion]) -> Tensor:
    """Log-probabilities of the targets by all sources in their order, fp64 `[n, sources]`.

    In fp32 the result for a token would depend on the size of its batch, since torch computes
    single numbers and vectors by functions that differ in the last digit.
    """
    columns = (opinion.log_probs.double() for opinion in opinions.values())
    return torch.cat([x.reshape(len(x), -1) for x in columns], dim=1)


def weights_by_source(opinions: Mapping[str, Opinion], weights: Tensor) -> dict[str, Tensor]:
    """Weight of each source, `[n]`, all of its distributions added up, from `[n, sources]`."""
    widths = [math.prod(opinion.log_probs.shape[1:]) for opinion in opinions.values()]
    parts = weights.split(widths, dim=1)
    return {name: part.sum(dim=1) for name, part in zip(opinions, parts, strict=True)}


def weighed(opinions: Mapping[str, Opinion], mixer: Mixer) -> tuple[Tensor, dict[str, Tensor]]:
    """The mixture's log-probabilities of the targets, fp64 `[n]`, and the weight of each source,
    fp64 `[n]`, from the opinions of all sources."""
    log_probs = source_log_probs(opinions)
    weights = mixer.weights(features_of(opinions), len(log_probs))
    mixed = mixture(log_probs.unbind(dim=1), weights.unbind(dim=1))
    return mixed, weights_by_source(opinions, weights)


def features_of(opinions: Mapping[str, Opinion]) -> dict[str, Tensor]:
    """All features, by `<source>.<feature>`."""
    return {
        f"{source}.{name}": column
        for source, opinion in opinions.items()
        for name, column in opinion.features.items()
    }


def names_of(features: Mapping[str, Tensor]) -> list[str]:
    """Names of the features that a mixer reads which names none: those of the memories. The model's
    own are there or not by what else is kept of it, and figures must not depend on that."""
    return [name for name in features if not name.startswith(f"{LM}.")]


def feature(features: Mapping[str, Tensor], name: str) -> Tensor:
    """One feature, fp64 `[n]` or `[n, f]`.

    Raises:
        InputError: no memory offers it.
    """
    if name not in features:
        offered = ", ".join(features) or "none"
        raise InputError(
            f"the mixer reads the feature {name}; expected one of those here: {offered}"
        )
    return features[name].double()


# -- fitting -------------------------------------------------------------------------------------


def fit_weights(
    log_probs: Tensor,
    cells: Tensor | None = None,
    prior: Tensor | None = None,
    strength: float = 0.0,
    change: float = EM_CHANGE,
) -> Tensor:
    """The weights of the highest likelihood in each cell, by expectation maximisation: the new
    weight of a source is its mean share of the probability of a token.

    With a prior they are the weights of the highest posterior (Dirichlet), as if the cell held
    `strength` more tokens with the shares of the prior.

    Args:
        log_probs: fp64 `[n, sources]`.
        cells: int64 `[n]`; by default all tokens are in one.
        prior: fp64 `[cells, sources]`; needed where a cell may be empty.
        strength: of the prior, in tokens.
        change: ends when no weight changes by as much.

    Returns:
        fp64 `[cells, sources]`.
    """
    possible = log_probs.amax(dim=1) > -torch.inf
    log_probs = log_probs[possible]
    n_cells = 1 if prior is None else len(prior)
    cells = torch.zeros(len(log_probs)).long() if cells is None else cells[possible]
    # A factor common to a token's probabilities does not change its shares.
    probs = (log_probs - log_probs.amax(dim=1, keepdim=True)).exp()
    order = cells.argsort(stable=True)
    probs, counts = probs[order], cells.bincount(minlength=n_cells)
    if prior is None:
        weights, strength = probs.new_full((1, probs.shape[1]), 1 / probs.shape[1]), 0.0
        pseudo = torch.zeros_like(weights)
    else:
        weights, pseudo = prior, strength * prior
    # A cell without tokens keeps its prior.
    filled = counts > 0
    totals = (counts + strength)[filled, None].double()
    for _ in range(EM_STEPS):
        parts = probs * weights.repeat_interleave(counts, dim=0)
        shares = parts / parts.sum(dim=1, keepdim=True)
        sums = torch.segment_reduce(shares, "sum", lengths=counts, axis=0)
        before, weights = weights, weights.clone()
        weights[filled] = (sums + pseudo)[filled] / totals
        if (weights - before).abs().max() < change:
            break
    return weights


def held_out(n: int, share: float, seed: int) -> Tensor:
    """Which of n tokens are held out, bool `[n]`: stretches of the text, chosen at random, at least
    one."""
    length = max(min(STRETCH, n // STRETCHES), 1)
    chosen = torch.zeros(-(-n // length), dtype=torch.bool)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    chosen[order[: max(round(share * len(chosen)), 1)]] = True
    return chosen.repeat_interleave(length)[:n]


# -- the simplest mixer --------------------------------------------------------------------------


class ConstantMixer(Mixer):
    """The same weights for every token.

    Args:
        shares: weights of the language model and of each memory, whose sum is one; None to have
            `fit` find them.
    """

    def __init__(self, shares: Sequence[float] | None = None) -> None:
        self.shares = None if shares is None else torch.tensor(shares, dtype=torch.float64)
        self.needs_fitting = shares is None

    def fit(self, opinions: Mapping[str, Opinion]) -> None:
        """See `Mixer.fit` and `fit_weights`."""
        self.shares = fit_weights(source_log_probs(opinions))[0]

    def weights(self, features: Mapping[str, Tensor], n: int) -> Tensor:
        """See `Mixer.weights`."""
        refuse_unfitted(self.shares)
        return self.shares.expand(n, -1)

    def mixed(self, log_probs: Sequence[Tensor]) -> Tensor:
        """log p of the mixture, `[n]`, from the log-probabilities `[n]` of each source."""
        return mixture(log_probs, self.weights({}, len(log_probs[0])).unbind(dim=1))

    def state(self) -> dict[str, np.ndarray]:
        """See `Mixer.state`."""
        refuse_unfitted(self.shares)
        return {"shares": self.shares.numpy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See `Mixer.restore`."""
        self.shares = torch.from_numpy(state["shares"])
        self.needs_fitting = False


def refuse_unfitted(fitted: object) -> None:
    """Raises InputError where nothing was fitted."""
    if fitted is None:
        raise InputError("the mixture has no weights yet; expected them given or fitted")
