"""`GateMixer`: a small network that gives every token weights of its own.

    weights = softmax(tanh(x W_1 + b_1) W_2 + b_2)

where x are standardised features, known before the token. The network is trained on the loss of the
mixture itself. `neighbors_by_k.MetaKMixer` is this network with the features of meta-k.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.contracts import Mixer, Opinion
from neighborlm.retrieval.memories.mixers import (
    feature,
    features_of,
    fit_weights,
    held_out,
    names_of,
    refuse_unfitted,
    source_log_probs,
    want_of,
)

WIDTH = 32
LEARNING_RATE, BATCH = 1e-2, 1024
EPOCHS, PATIENCE = 100, 8
"""The largest number of epochs, and after how many without a better held-out loss training
stops."""
HELD_OUT = 0.1
"""Share of the validation tokens whose loss decides when to stop."""
FARTHEST = 5.0
"""Standardised features are clamped to so many standard deviations."""


class GateMixer(Mixer):
    """Weights by a network, on the CPU.

    A feature that is infinite or NaN is replaced by its mean. Each feature that was so anywhere on
    the validation split has one more input, which says that it is missing.

    Args:
        features: names such as `knn.nearest_distance`; None for all features of the memories.
        width: of the hidden layer.
        seed: of the first weights, the order of the tokens and the choice of the held-out ones.

    Attributes:
        losses: of the held-out tokens after each epoch, nats a token; before the first, those of
            the best constant weights.
    """

    needs_fitting = True

    def __init__(
        self, features: Sequence[str] | None = None, width: int = WIDTH, seed: int = 1
    ) -> None:
        self.features = features
        self.width = width
        self.seed = seed
        self.want = want_of(features or ())
        self.losses: list[float] = []
        self.names: list[str] = []
        self.fitted: dict[str, Tensor] | None = None

    def fit(self, opinions: Mapping[str, Opinion]) -> None:
        """See `Mixer.fit`.

        Raises:
            InputError: a feature is missing.
        """
        log_probs, features = source_log_probs(opinions), features_of(opinions)
        self.names = names_of(features) if self.features is None else list(self.features)
        columns = columns_of(features, self.names, len(log_probs))
        standard = standards(columns)
        judged = held_out(len(log_probs), HELD_OUT, self.seed)
        self.fitted = standard | self._trained(standardised(columns, standard), log_probs, judged)

    @torch.enable_grad()
    def _trained(self, inputs: Tensor, log_probs: Tensor, judged: Tensor) -> dict[str, Tensor]:
        """The network with the lowest loss on the held-out tokens."""
        possible = log_probs.amax(dim=1) > -torch.inf
        training = torch.nonzero(possible & ~judged)[:, 0]
        judged = possible & judged
        generator = torch.Generator().manual_seed(self.seed)
        first = torch.randn(inputs.shape[1], self.width, generator=generator, dtype=torch.float64)
        network = {
            "w_1": first / max(inputs.shape[1], 1) ** 0.5,
            "b_1": torch.zeros(self.width, dtype=torch.float64),
            "w_2": torch.zeros(self.width, log_probs.shape[1], dtype=torch.float64),
            "b_2": fit_weights(log_probs[training])[0].clamp(min=1e-6).log(),
        }
        for parameter in network.values():
            parameter.requires_grad_()
        optimizer = torch.optim.Adam(network.values(), LEARNING_RATE)

        def loss_of(tokens: Tensor) -> Tensor:
            mixed = log_weights(inputs[tokens], network) + log_probs[tokens]
            return -mixed.logsumexp(dim=1).mean()

        def judge() -> float:
            with torch.no_grad():
                return loss_of(judged).item()

        self.losses = [judge()]
        best = copied(network)
        while len(self.losses) <= EPOCHS:
            order = training[torch.randperm(len(training), generator=generator)]
            for batch in order.split(BATCH):
                optimizer.zero_grad()
                loss_of(batch).backward()
                optimizer.step()
            self.losses.append(judge())
            at = int(np.argmin(self.losses))
            if at == len(self.losses) - 1:
                best = copied(network)
            elif len(self.losses) - 1 - at >= PATIENCE:
                break
        return best

    def weights(self, features: Mapping[str, Tensor], n: int) -> Tensor:
        """See `Mixer.weights`.

        Raises:
            InputError: a feature is missing.
        """
        refuse_unfitted(self.fitted)
        inputs = standardised(columns_of(features, self.names, n), self.fitted)
        return log_weights(inputs, self.fitted).exp()

    def state(self) -> dict[str, np.ndarray]:
        """See `Mixer.state`."""
        refuse_unfitted(self.fitted)
        arrays = {name: array.numpy() for name, array in self.fitted.items()}
        return arrays | {"features": np.array(self.names, str)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See `Mixer.restore`."""
        self.names = self.features = state["features"].tolist()
        names = ("mean", "scale", "may_miss", "w_1", "b_1", "w_2", "b_2")
        self.fitted = {name: torch.from_numpy(state[name]) for name in names}
        self.want = want_of(self.names)
        self.needs_fitting = False


# -- the network's parts -------------------------------------------------------------------------


def columns_of(features: Mapping[str, Tensor], names: Sequence[str], n: int) -> Tensor:
    """Features side by side, fp64 `[n, f]`."""
    columns = [feature(features, name).reshape(n, -1) for name in names]
    return torch.cat(columns, dim=1) if columns else torch.zeros(n, 0, dtype=torch.float64)


def standards(columns: Tensor) -> dict[str, Tensor]:
    """How to standardise columns `[n, f]`: `mean` and `scale` of the finite numbers, and
    `may_miss`, which columns have others; `[f]` each."""
    finite = columns.isfinite()
    counts = finite.sum(dim=0).clamp(min=1)
    mean = columns.where(finite, 0.0).sum(dim=0) / counts
    variance = (columns - mean).where(finite, 0.0).square().sum(dim=0) / counts
    scale = variance.sqrt()
    scale[scale == 0] = 1.0
    return {"mean": mean, "scale": scale, "may_miss": ~finite.all(dim=0)}


def standardised(columns: Tensor, standard: Mapping[str, Tensor]) -> Tensor:
    """The network's inputs from columns `[n, f]`, fp64."""
    finite = columns.isfinite()
    numbers = ((columns - standard["mean"]) / standard["scale"]).clamp(-FARTHEST, FARTHEST)
    missing = ~finite[:, standard["may_miss"]]
    return torch.cat([numbers.where(finite, 0.0), missing.double()], dim=1)


def log_weights(inputs: Tensor, network: Mapping[str, Tensor]) -> Tensor:
    """Logarithms of the weights, fp64 `[n, sources]`, of inputs `[n, f]`."""
    hidden = (inputs @ network["w_1"] + network["b_1"]).tanh()
    return (hidden @ network["w_2"] + network["b_2"]).log_softmax(dim=1)


def copied(network: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a network's parameters."""
    return {name: parameter.detach().clone() for name, parameter in network.items()}
