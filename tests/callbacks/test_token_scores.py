"""Per-token scores: every rank's tokens, in corpus order, under one position a row."""

from types import SimpleNamespace

import numpy as np
import torch

from neighborlm.callbacks.token_scores import LMScores, ScoreTable
from neighborlm.common import all_ranks
from neighborlm.common.contracts import Scored


def table_of(positions: np.ndarray, batch: int = 3, **columns: np.ndarray) -> ScoreTable:
    """A table filled `batch` tokens at a time."""
    table = ScoreTable()
    for start in range(0, len(positions), batch):
        part = slice(start, start + batch)
        table.add(position=positions[part], **{name: c[part] for name, c in columns.items()})
    return table


class ThisRank:
    """Stands in for torch.distributed on one of several ranks, with what the others hold."""

    def __init__(self, rank: int, parts: list) -> None:
        self.rank, self.parts = rank, parts
        self.is_available = self.is_initialized = lambda: True
        self.get_rank, self.get_world_size = lambda: rank, lambda: len(parts)

    def all_gather_object(self, out: list, mine) -> None:
        assert mine == self.parts[self.rank]
        out[:] = self.parts


def test_columns_share_their_rows():
    rng = np.random.default_rng(0)
    target, knn = rng.integers(0, 9, 20), rng.normal(size=20).astype(np.float32)
    order = rng.permutation(20)
    gathered = table_of(order, 3, target=target[order], knn_log_prob=knn[order]).gathered()
    assert set(gathered) == {"position", "target", "knn_log_prob"}
    np.testing.assert_array_equal(gathered["position"], np.arange(20))
    np.testing.assert_array_equal(gathered["target"], target)
    np.testing.assert_array_equal(gathered["knn_log_prob"], knn)
    assert gathered["knn_log_prob"].dtype == np.float32


def test_ranks_are_put_together(monkeypatch):
    """One rank has no batch at all."""
    x = np.random.default_rng(0).normal(size=11)
    of_rank = [np.array([10, 0, 4]), np.array([], np.int64), np.array([9, 8, 7, 6, 5, 3, 2, 1])]
    tables = [table_of(positions, x=x[positions]) for positions in of_rank]
    for rank, table in enumerate(tables):
        ranks = ThisRank(rank, [t.batches for t in tables])
        monkeypatch.setattr(all_ranks, "dist", ranks)
        np.testing.assert_array_equal(table.gathered()["x"], x)


def test_lm_scores_take_every_batch():
    callback = LMScores()
    log_probs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.bfloat16)
    for part in ([2, 0], [], [1]):
        chosen = torch.tensor(part, dtype=torch.int64)
        outputs = Scored(chosen, chosen + 10, log_probs[chosen])
        callback.on_test_batch_end(None, SimpleNamespace(), outputs, None, 0)
    table = callback.table.gathered()
    assert table["target"].tolist() == [10, 11, 12]
    assert table["lm_log_prob"].tolist() == [-1.0, -2.0, -3.0]
    assert table["lm_log_prob"].dtype == np.float32
