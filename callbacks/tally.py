"""`Tally`: the losses of mixtures over a pass, and means of memories' features and weights."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from neighborlm.callbacks.token_scores import ScoreTable, model_columns
from neighborlm.common.all_ranks import from_all_ranks
from neighborlm.common.contracts import Mixer, Opinion, Scored
from neighborlm.models.metrics import TokenLoss
from neighborlm.retrieval.memories.mixers import LM, features_of, lm_opinion, weighed


class Tally:
    """The loss of the mixture of all memories, those of the mixtures with one of them alone, and
    means over tokens.

    Args:
        keep_scores: keep every token's log-probabilities and features, in `table`.
        alone: names of memories that are mixed alone too.
        n_tokens: of the split, which says how far apart the tokens of `sample` lie; all are in it
            where it is not given.

    Attributes:
        loss: of the mixture.
        alone: the losses of mixtures with one memory alone, by its name.
        searches: queries that this rank's memories have searched for, by name.
        sample: as `table`, of about `SAMPLE` tokens that lie evenly over the split, and with the
            weights `weight.<source>`.
        shown: some tokens of the sample with their keys, of this rank; None without keys.
        table: by token `position`, `target`, `lm_log_prob`, `gnn_log_prob` of a graph network on
            the LM, of each memory `<memory>_log_prob` and `<memory>.<feature>`, `lm.<feature>`
            where the model was asked for it, and `log_prob` of the mixture; None where they are not
            kept.
    """

    def __init__(
        self, keep_scores: bool = False, alone: Iterable[str] = (), n_tokens: int = 0
    ) -> None:
        self.loss = TokenLoss()
        self.alone = {name: TokenLoss() for name in alone}
        self.searches: Counter[str] = Counter()
        self.table = ScoreTable() if keep_scores else None
        self.sample, self.apart = ScoreTable(), max(n_tokens // SAMPLE, 1)
        self.shown: Scored | None = None
        self.sums: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def mix(
        self,
        asked: Scored,
        opinions: Mapping[str, Opinion],
        mixer: Mixer,
        alone: Mapping[str, Mixer],
    ) -> None:
        """Mixes what is said of n tokens, and adds them.

        Args:
            asked: what the model says of them.
            opinions: by memory.
            mixer: weighs the model and all memories.
            alone: by memory, what weighs the model and this memory alone.
        """
        sources = {LM: lm_opinion(asked), **opinions}
        self.add(asked, opinions, *weighed(sources, mixer))
        for name, of_two in alone.items():
            mixed, weights = weighed({LM: sources[LM], name: sources[name]}, of_two)
            self.alone[name].update(mixed)
            self._count(f"{ALONE}.{name}", weights[name])

    def add(
        self,
        asked: Scored,
        opinions: Mapping[str, Opinion],
        mixed: Tensor | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds n tokens.

        Args:
            asked: what the model says of them.
            opinions: by memory.
            mixed: fp64 `[n]`, the mixture's log-probabilities, if there is a mixture.
            weights: fp64 `[n]` of the model, under `lm`, and of each memory.
        """
        columns = {"position": asked.positions, "target": asked.targets, **model_columns(asked)}
        for name, opinion in opinions.items():
            columns[f"{name}_log_prob"] = opinion.log_probs.float()
            possible = ~opinion.log_probs.isneginf()
            self._count(f"{name}.has_target", possible.reshape(len(possible), -1).any(dim=1))
        for name, column in features_of({LM: lm_opinion(asked), **opinions}).items():
            columns[name] = column
            self._count(name, column[column.isfinite()])
        for name, weight in (weights or {}).items():
            self._count(f"weight.{name}", weight)
        if mixed is not None:
            self.loss.update(mixed)
            columns["log_prob"] = mixed.float()
        if self.table is not None:
            self.table.add(**{name: column.numpy() for name, column in columns.items()})
        columns |= {f"weight.{name}": weight for name, weight in (weights or {}).items()}
        sampled = (asked.positions % self.apart == 0).nonzero()[:, 0]
        self.sample.add(**{name: column[sampled].numpy() for name, column in columns.items()})
        if self.shown is None and asked.keys and len(sampled):
            self.shown = asked.some(sampled[:: -(-len(sampled) // SHOWN)])

    def _count(self, name: str, column: Tensor) -> None:
        self.sums[name] += column.double().sum().item()
        self.counts[name] += len(column)

    def heard(self, memories: Sequence[str]) -> tuple[Scored, dict[str, Opinion]]:
        """What the model and some memories said of all tokens of all ranks, in the order of the
        text, for `Mixer.fit`; from the table."""
        table = {name: torch.from_numpy(column) for name, column in self.table.gathered().items()}
        of_lm, of_network = table["lm_log_prob"], table.get("gnn_log_prob")
        top_prob = table.get(f"{LM}.top_prob")
        asked = Scored(
            table["position"],
            table["target"],
            of_lm if of_network is None else of_network,
            entropy=table.get(f"{LM}.entropy"),
            top_log_probs=None if top_prob is None else top_prob.log()[:, None],
            lm_log_probs=None if of_network is None else of_lm,
        )
        opinions = {
            memory: Opinion(
                table[f"{memory}_log_prob"],
                {
                    name.removeprefix(f"{memory}."): column
                    for name, column in table.items()
                    if name.startswith(f"{memory}.")
                },
            )
            for memory in memories
        }
        return asked, opinions

    def to(self, device: torch.device) -> None:
        """Moves the losses to the device on which ranks add up theirs."""
        for loss in (self.loss, *self.alone.values()):
            loss.to(device)

    def statistics(self) -> dict[str, float]:
        """Means over the tokens of all ranks: of each memory's features, where they are finite;
        under `<memory>.has_target` the share of tokens that it gives a probability; under
        `weight.<source>` the weights; and under `alone.<memory>` the weight of a memory in the
        mixture with it alone."""
        sums, counts = summed(self.sums), summed(self.counts)
        return {name: sums[name] / counts[name] for name in counts if counts[name]}


SAMPLE = 4096
"""Tokens whose figures are kept of every pass."""

SHOWN = 5
"""Of these, tokens whose keys are kept too."""

ALONE = "alone"
"""What names the weights of memories that are mixed alone."""


def summed(own: Counter[str]) -> Counter[str]:
    """The sums over all ranks, any of which may have had no token."""
    total: Counter[str] = Counter()
    for of_rank in from_all_ranks(own):
        total.update(of_rank)
    return total
