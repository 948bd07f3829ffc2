"""Perplexity from target log-probabilities, reduced over ranks by torchmetrics."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenLoss(Metric):
    """Mean negative log-likelihood in nats per token; perplexity is its exponential.

    The sum is kept in float64 and the count as an integer, so that the result does not depend on
    how the tokens were batched.

    >>> loss = TokenLoss()
    >>> loss.update(torch.tensor([0.5, 0.25]).log())
    >>> loss.compute()
    {'loss': tensor(1.0397, dtype=torch.float64), 'tokens': tensor(2)}
    """

    full_state_update = False

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, log_probs: Tensor) -> None:
        """Adds the natural-log probabilities of some targets, any shape."""
        self.total = self.total - log_probs.double().sum()
        self.tokens = self.tokens + log_probs.numel()

    def compute(self) -> dict[str, Tensor]:
        """Over all ranks: `loss`, float64, NaN if no token was added, and `tokens`, int64."""
        return {"loss": self.total / self.tokens, "tokens": self.tokens}
