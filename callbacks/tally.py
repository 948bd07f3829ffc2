"""`Tally`: the loss of a mixture over a pass, and means of its memories' features and weights."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from neighborlm.callbacks.token_scores import ScoreTable, model_columns
from neighborlm.common.all_ranks import from_all_ranks
from neighborlm.common.contracts import Opinion, Scored
from neighborlm.models.metrics import TokenLoss
from neighborlm.retrieval.memories.mixers import LM, features_of, lm_opinion


class Tally:
    """The loss of the mixture, and means over tokens.

    Args:
        keep_scores: keep every token's log-probabilities and features, in `table`.

    Attributes:
        loss: of the mixture.
        table: by token `position`, `target`, `lm_log_prob`, `gnn_log_prob` of a graph network on
            the LM, of each memory `<memory>_log_prob` and `<memory>.<feature>`, `lm.<feature>`
            where the model was asked for it, and `log_prob` of the mixture; None where they are not
            kept.
    """

    def __init__(self, keep_scores: bool = False) -> None:
        self.loss = TokenLoss()
        self.table = ScoreTable() if keep_scores else None
        self.sums: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

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

    def _count(self, name: str, column: Tensor) -> None:
        self.sums[name] += column.double().sum().item()
        self.counts[name] += len(column)

    def opinions(self, memories: Sequence[str]) -> dict[str, Opinion]:
        """What the model and some memories said of all tokens of all ranks, in the order of the
        text, for `Mixer.fit`; from the table."""
        table = {name: torch.from_numpy(column) for name, column in self.table.gathered().items()}
        own = "gnn_log_prob" if "gnn_log_prob" in table else "lm_log_prob"
        log_probs = {LM: table[own], **{name: table[f"{name}_log_prob"] for name in memories}}
        return {
            source: Opinion(
                log_prob,
                {
                    name.removeprefix(f"{source}."): column
                    for name, column in table.items()
                    if name.startswith(f"{source}.")
                },
            )
            for source, log_prob in log_probs.items()
        }

    def to(self, device: torch.device) -> None:
        """Moves the loss to the device on which ranks add up theirs."""
        self.loss.to(device)

    def statistics(self) -> dict[str, float]:
        """Means over the tokens of all ranks: of each memory's features, where they are finite;
        under `<memory>.has_target` the share of tokens that it gives a probability; and under
        `weight.<source>` the weights."""
        sums, counts = Counter(), Counter()
        for of_rank in from_all_ranks((self.sums, self.counts)):  # a rank may have had no token
            sums.update(of_rank[0])
            counts.update(of_rank[1])
        return {name: sums[name] / counts[name] for name in counts if counts[name]}
