"""Per-token scores of an evaluation: gathered from all ranks, in corpus order."""

from itertools import chain

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from neighborlm.common.all_ranks import from_all_ranks
from neighborlm.common.contracts import Scored, Want


class ScoreTable:
    """Columns of per-token figures that arrive in batches, in any order."""

    def __init__(self) -> None:
        self.batches: list[dict[str, np.ndarray]] = []

    def add(self, **columns: np.ndarray) -> None:
        """Adds some tokens; `position` must be among the columns."""
        self.batches.append(columns)

    def gathered(self) -> dict[str, np.ndarray]:
        """All ranks' tokens, sorted by position; every rank gets them."""
        batches = list(chain.from_iterable(from_all_ranks(self.batches)))
        columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        order = np.argsort(columns["position"])
        return {name: column[order] for name, column in columns.items()}


def model_columns(scored: Scored) -> dict[str, Tensor]:
    """The log-probabilities fp32 `[n]` that a model gives: `lm_log_prob`, and `gnn_log_prob` where
    a graph network sits on the LM."""
    if scored.lm_log_probs is None:
        return {"lm_log_prob": scored.log_probs.float()}
    return {
        "lm_log_prob": scored.lm_log_probs.float(),
        "gnn_log_prob": scored.log_probs.float(),
    }


class LMScores(Callback):
    """Keeps `position`, `target` and `lm_log_prob` of every token of a test run, and
    `gnn_log_prob` where a graph network sits on the LM."""

    want = Want()

    def __init__(self) -> None:
        self.table = ScoreTable()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Scored, batch, batch_idx, *_
    ) -> None:
        """Adds what the test step of a `Scorer` returned."""
        self.table.add(
            position=outputs.positions.cpu().numpy(),
            target=outputs.targets.cpu().numpy(),
            **{name: column.cpu().numpy() for name, column in model_columns(outputs).items()},
        )
