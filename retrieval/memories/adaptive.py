"""`AdaptiveMemory`: a small network decides before each search whether it is worth its time, and
foretells how much the neighbours are to weigh (He, Neubig and Berg-Kirkpatrick, EMNLP 2021).

With x what is known of a token before it and before any search,

    log(1 - lmbda), log lmbda = f(x),

and the share `skip` of the tokens with the smallest lmbda is not searched for: the language model
predicts them alone. x is the key, the model's entropy and largest probability, and log(1 + count)
of how often the last 1 to 4 tokens occur in the training text and of how many different tokens
follow them there. f is trained on nine tenths of the validation split by the loss of the mixture,

    -log((1 - lmbda) p_LM + lmbda p_kNN) + .05 lmbda,

and the other tenth chooses the epoch and the threshold of lmbda.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from neighborlm.common.all_ranks import from_all_ranks
from neighborlm.common.contracts import Distribution, Mixer, Opinion, Resources, Scored, Want
from neighborlm.common.errors import InputError
from neighborlm.common.progress import progress_bars
from neighborlm.retrieval.memories.gate import copied, standardised, standards
from neighborlm.retrieval.memories.knn_memory import KNNMemory
from neighborlm.retrieval.memories.mixers import ConstantMixer, held_out
from neighborlm.retrieval.memories.suffix_array import SuffixArray

DISTANCES = ("nearest_distance", "kth_distance")
"""The features of `KNNMemory`."""
LONGEST = 4
"""Tokens of the longest phrase before a token whose frequency is read."""
SHARE, HIDDEN, LAYERS, DROPOUT = 25, 128, 4, 0.2
"""Dimensions of each of the five groups of features, and the layers behind them."""
PENALTY, LEARNING_RATE, BATCH, EPOCHS = 0.05, 5e-4, 64, 10
HELD_OUT = 0.1
AT_ONCE = 8192
"""Tokens whose features are in fp64 at a time."""


@dataclass
class AdaptiveSettings:
    """The memory that decides before the search.

    Args:
        skip: share of the tokens that are not searched for, those where the neighbours promise
            least; the language model predicts them alone. 0 searches for all.
    """

    skip: float = 0.5

    def check(self) -> None:
        """Raises InputError where a value alone cannot be right."""
        if not 0 <= self.skip < 1:
            raise InputError(f"--adaptive.skip is {self.skip}; expected 0 or more, and less than 1")


class AdaptiveMemory(KNNMemory):
    """Neighbours that are searched for only where they are worth it; see `KNNMemory` for all other
    arguments.

    Args:
        suffix_array: of the training text.
        skip: see `AdaptiveSettings`.
        seed: of the network's first weights, its dropout, and the order of the tokens.

    Attributes:
        gate: the network; None before `tune`.
        threshold: tokens with a smaller log lmbda are not searched for.
    """

    def __init__(
        self, *args, suffix_array: SuffixArray, skip: float, seed: int = 1, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self.suffix_array = suffix_array
        self.skip = skip
        self.seed = seed
        self.gate: Gate | None = None
        self.threshold = -np.inf
        self.text = np.empty(0, dtype=suffix_array.tokens.dtype)
        self.heard: list[tuple[Tensor, Tensor, list[Tensor]]] = []
        """Positions, log-probabilities and features of the tokens that `tune` will read."""

    @classmethod
    def arguments_of(cls, resources: Resources) -> dict:
        """See `KNNMemory.arguments_of`."""
        folder, text = resources.folder("train-suffix_array"), resources.tokens("train")
        made_from = resources.made_from("train")
        array = SuffixArray.ensure(folder, text, resources.vocab_size, made_from)
        own = {"suffix_array": array, "skip": resources.settings.adaptive.skip}
        return super().arguments_of(resources) | own

    @property
    def want(self) -> Want:
        """See `Memory`."""
        return super().want.and_also(Want(entropy=True, top=1))

    @property
    def needs_tuning(self) -> bool:
        """Whether there is no network yet, so that it searches for all and collects."""
        return self.gate is None

    def begin_pass(self, text: np.ndarray) -> None:
        """See `Memory.begin_pass`."""
        super().begin_pass(text)
        self.text, self.heard = text.reshape(-1), []

    def features(self, asked: Scored) -> list[Tensor]:
        """What the network reads, fp32 `[n, ...]` each; none looks at the target."""
        counts = self.suffix_array.frequencies(self.text, asked.positions.numpy(), LONGEST)
        columns = [
            asked.keys[self.key_type],
            asked.top_log_probs[:, :1].exp(),
            asked.entropy[:, None],
        ]
        return columns + [torch.from_numpy(np.log1p(count)).float() for count in counts]

    def say(self, asked: Scored) -> Opinion:
        """log p_kNN of the targets, -inf where no search was made. Features are those of
        `KNNMemory`, infinite where none was; `searched`, 1 where one was; and `lmbda`, the weight
        that the network foretells.

        While it needs tuning, it searches for all and gives every target probability 0.
        """
        features = self.features(asked)
        if self.needs_tuning:
            self.heard.append((asked.positions, asked.log_probs, features))
            return super().say(asked)
        searched, said = self._decided(features)
        log_probs = torch.full(searched.shape, -torch.inf)
        if searched.any():
            found = super().say(asked.some(searched))
            log_probs[searched] = found.log_probs
            self._fill(said, searched, found.features)
        return Opinion(log_probs, said)

    def distribution(self, asked: Scored) -> Distribution:
        """See `Memory.distribution`; all zeros where no search is made. Features as in `say`.

        Raises:
            InputError: it needs tuning, or nobody has asked the model for its entropy.
        """
        if self.needs_tuning:
            self._refuse_untuned()
        if asked.entropy is None:
            raise InputError(
                "--memories adaptive: decides by the model's entropy, which is not at hand here; "
                "expected --memories knn"
            )
        searched, said = self._decided(self.features(asked))
        n = len(searched)
        ids, probs = torch.zeros(n, self.k, dtype=torch.int64), torch.zeros(n, self.k)
        rows, scores = torch.full_like(ids, -1), torch.full_like(probs, -torch.inf)
        if searched.any():
            found = super().distribution(asked.some(searched))
            ids[searched], probs[searched] = found.ids, found.probs
            rows[searched], scores[searched] = found.rows, found.scores
            self._fill(said, searched, found.features)
        return Distribution(ids, probs, said, rows, scores)

    def _decided(self, features: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Which tokens are searched for, bool `[n]`, and the features of all, of which the
        distances are infinite."""
        log_lmbda = self.gate.log_weights(features)[:, 1]
        searched = log_lmbda >= self.threshold
        said = {name: torch.full(searched.shape, torch.inf) for name in DISTANCES}
        return searched, said | {"searched": searched.float(), "lmbda": log_lmbda.exp()}

    def _fill(self, said: dict[str, Tensor], searched: Tensor, found: Mapping[str, Tensor]) -> None:
        """Puts the distances of those that were searched for in their places."""
        for name in DISTANCES:
            said[name][searched] = found[name]

    def tune(self) -> Opinion:
        """Finds the temperature where it is not given, then trains the network.

        Returns:
            the opinion on all tokens, as if all had been searched for.
        """
        opinion = super().tune() if self.temperature is None else self.opinion_on(self.retrieved)
        parts = [part for of_rank in from_all_ranks(self.heard) for part in of_rank]
        self.heard = []
        positions = torch.cat([part[0] for part in parts])
        order = positions.argsort()
        lm = torch.cat([part[1] for part in parts])[order].double()
        groups = zip(*(part[2] for part in parts), strict=True)
        features = [torch.cat(group)[order] for group in groups]
        judged = held_out(len(lm), HELD_OUT, self.seed)
        log_probs = torch.stack([lm, opinion.log_probs.double()], dim=1)
        self.gate, self.threshold = trained(features, log_probs, judged, self.skip, self.seed)
        return opinion._replace(features={**self._decided(features)[1], **opinion.features})


# -- the network ---------------------------------------------------------------------------------


class Gate(nn.Module):
    """Foretells the weight of the neighbours; fp64, on the CPU.

    Args:
        features: fp32 `[n, ...]` each, by which inputs are standardised.
    """

    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()
        self.standards = [standards(group) for group in features]
        widths = [
            len(standard["mean"]) + int(standard["may_miss"].sum()) for standard in self.standards
        ]
        self.groups = nn.ModuleList(
            nn.Sequential(nn.Linear(width, SHARE), nn.ReLU(), nn.Linear(SHARE, SHARE))
            for width in widths
        )
        layers: list[nn.Module] = []
        width = SHARE * len(widths)
        for _ in range(LAYERS):
            layers += [nn.Linear(width, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT)]
            width = HIDDEN
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))
        self.double()

    def forward(self, features: list[Tensor]) -> Tensor:
        """log(1 - lmbda) and log lmbda, `[n, 2]`."""
        groups = zip(self.groups, features, self.standards, strict=True)
        hidden = [
            layer(standardised(group.double(), standard)) for layer, group, standard in groups
        ]
        return self.layers(torch.cat(hidden, dim=1)).log_softmax(dim=1)

    @torch.no_grad()
    def log_weights(self, features: list[Tensor]) -> Tensor:
        """log(1 - lmbda) and log lmbda of some tokens, `[n, 2]`, a few of them at a time."""
        parts = zip(*(group.split(AT_ONCE) for group in features), strict=True)
        return torch.cat([self(list(part)) for part in parts])


def trained(
    features: list[Tensor], log_probs: Tensor, judged: Tensor, skip: float, seed: int
) -> tuple[Gate, float]:
    """The network of the epoch that was best on the held-out tokens, and the threshold of log lmbda
    below which a share `skip` of these are.

    Args:
        features: fp32 `[n, ...]` each.
        log_probs: fp64 `[n, 2]` of the targets by the language model and by the neighbours.
        judged: bool `[n]`, which tokens are held out.
        skip: share of the tokens that are to be predicted by the language model alone.
        seed: of the first weights, of dropout and of the order of the tokens.
    """
    seeded = torch.random.fork_rng(devices=[])
    with seeded, torch.enable_grad(), progress_bars("gate", transient=True) as report:
        torch.manual_seed(seed)
        gate = Gate([group[~judged] for group in features])
        training = torch.nonzero(~judged)[:, 0]
        optimizer = torch.optim.Adam(gate.parameters(), LEARNING_RATE)
        best: tuple[float, dict[str, Tensor], float] | None = None
        for epoch in range(EPOCHS):
            report("epochs", epoch, EPOCHS)
            gate.train()
            for batch in training[torch.randperm(len(training))].split(BATCH):
                optimizer.zero_grad()
                weights = gate([group[batch] for group in features])
                loss = -(weights + log_probs[batch]).logsumexp(dim=1).mean()
                (loss + PENALTY * weights[:, 1].exp().mean()).backward()
                optimizer.step()
            gate.eval()
            weights = gate.log_weights([group[judged] for group in features])
            threshold = threshold_of(weights[:, 1], skip)
            loss = loss_with_gate(weights, log_probs[judged], threshold)
            if best is None or loss < best[0]:
                best = loss, copied(gate.state_dict()), threshold
        gate.load_state_dict(best[1])
    return gate, best[2]


def threshold_of(log_lmbda: Tensor, skip: float) -> float:
    """The number below which a share `skip` of some numbers `[n]` are; -inf for a share of 0."""
    number = round(skip * len(log_lmbda))
    return log_lmbda.sort().values[number].item() if number else -np.inf


def loss_with_gate(weights: Tensor, log_probs: Tensor, threshold: float) -> float:
    """Nats a token where those below the threshold are predicted by the language model alone."""
    mixed = (weights + log_probs).logsumexp(dim=1)
    return -torch.where(weights[:, 1] < threshold, log_probs[:, 0], mixed).mean().item()


# -- what weighs it ------------------------------------------------------------------------------


class ForetoldMixer(Mixer):
    """The weight that the network foretells, where a search was made."""

    needs_fitting = False

    def weights(self, features: Mapping[str, Tensor], n: int) -> Tensor:
        """See `Mixer.weights`."""
        lmbda = features["adaptive.lmbda"].double() * features["adaptive.searched"].double()
        return torch.stack([1 - lmbda, lmbda], dim=1)


class WhereSearchedMixer(ConstantMixer):
    """One weight wherever a search was made; fitted as if all tokens had been searched for."""

    def weights(self, features: Mapping[str, Tensor], n: int) -> Tensor:
        """See `Mixer.weights`."""
        lmbda = super().weights(features, n)[:, 1] * features["adaptive.searched"].double()
        return torch.stack([1 - lmbda, lmbda], dim=1)
