"""Mixing distributions: the probability of a token under a mixture, and what weighs its sources.

The mixture of the language model and its memories (Khandelwal et al., ICLR 2020, eq. 3, for one
memory): p(w) = sum over sources s of weight_s p_s(w), the language model being the first source.
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from neighborlm.common.contracts import Mixer, Opinion
from neighborlm.common.errors import InputError

EM_STEPS = 1000
"""At most; the likelihood is concave, so more of them only come closer."""
EM_CHANGE = 1e-7
"""Of any weight, below which nothing more changes."""


def mixture(log_probs: Sequence[Tensor], weights: Sequence[Tensor | float]) -> Tensor:
    """log of the sum of weight times probability, in log space.

    Args:
        log_probs: of each source, natural logarithms; -inf for a probability of 0.
        weights: of each source, from 0 to 1; all broadcast.

    Returns:
        of the log-probabilities' type; a source without weight or probability has no part in it.

    >>> mixture([torch.tensor(0.5).log(), torch.tensor(0.1).log()], [0.75, 0.25]).exp().item()
    0.4000000059604645
    """
    weighted = (
        log_prob + torch.as_tensor(weight, dtype=torch.float64).log().to(log_prob)
        for log_prob, weight in zip(log_probs, weights, strict=True)
    )
    return reduce(torch.logaddexp, weighted)


def features_of(opinions: Mapping[str, Opinion]) -> dict[str, Tensor]:
    """The features of all memories, by `<memory>.<feature>`."""
    return {
        f"{name}.{feature}": column
        for name, opinion in opinions.items()
        for feature, column in opinion.features.items()
    }


class ConstantMixer(Mixer):
    """The same weights for every token.

    Args:
        shares: of the language model and of each memory, summing to one; None to have `fit` find
            them.
    """

    def __init__(self, shares: Sequence[float] | None = None) -> None:
        self.shares = None if shares is None else torch.tensor(shares, dtype=torch.float64)
        self.needs_fitting = shares is None

    def fit(self, lm_log_probs: Tensor, opinions: Sequence[Opinion]) -> None:
        """The weights of the highest likelihood, by expectation maximisation: each source's new
        weight is the mean share that it has in the probability of a token."""
        log_probs = [lm_log_probs, *(opinion.log_probs for opinion in opinions)]
        table = torch.stack([log_prob.double() for log_prob in log_probs], dim=1)
        # A token's probabilities may be scaled as one likes: its shares stay the same.
        probs = (table - table.amax(dim=1, keepdim=True)).exp()
        shares = table.new_full((table.shape[1],), 1 / table.shape[1])
        for _ in range(EM_STEPS):
            before, parts = shares, probs * shares
            shares = (parts / parts.sum(dim=1, keepdim=True)).mean(dim=0)
            if (shares - before).abs().max() < EM_CHANGE:
                break
        self.shares = shares

    def weights(self, features: Mapping[str, Tensor], n: int) -> Tensor:
        """See `Mixer.weights`."""
        if self.shares is None:
            raise InputError("the mixture has no weights yet; expected them given or fitted")
        return self.shares.expand(n, -1)

    def mixed(self, log_probs: Sequence[Tensor]) -> Tensor:
        """log p of the mixture, `[n]`, from the log-probabilities `[n]` of each source."""
        return mixture(log_probs, self.weights({}, len(log_probs[0])).unbind(dim=1))
