"""`KNNInterpolation`: mixes a model's test-time log-probabilities with the kNN distribution."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from callbacks.background import Background
from callbacks.token_scores import ScoreTable
from models.metrics import TokenLoss
from retrieval.datastore import Datastore
from retrieval.knn import exact_distances, interpolate, knn_log_prob, neighbor_scores
from retrieval.retriever import Metric, Retriever

QUERIES_AT_ONCE = 4096
MIXED_AT_ONCE = 256
"""Tokens whose neighbours are weighed at a time: what they are weighed by stays in the cache."""


class Retrieved(NamedTuple):
    """What was retrieved for `n` tokens, enough to try any lmbda and temperature.

    Attributes:
        lm_log_prob: fp32 `[n]`.
        scores: fp32 `[n, k]`, -inf where missing.
        hits: bool `[n, k]`, whether the neighbour's value is the target.
    """

    lm_log_prob: Tensor
    scores: Tensor
    hits: Tensor


class KNNInterpolation(Callback):
    """Searches with the keys that `test_step` returns, while the model computes the next batch.

    Args:
        datastore: whose values vote.
        retriever: finds its rows.
        k: neighbours per token.
        lmbda: weight of p_kNN.
        temperature: divides the scores.
        distances: `exact` computes them from the stored keys, `index` takes the retriever's.
        similarity: what `exact` computes; by default the retriever's metric.
        missing: `left_out`, or `last_row` to count the last row in place of missing neighbours,
            as the original program does.
        rescoring: datastore of the same text with keys of another type; distances are then those
            from the model's `rescoring_keys` to its keys.
        keep_retrieved: keep scores and hits of every token, for tuning.
        keep_scores: keep the per-token log-probabilities.
    """

    def __init__(
        self,
        datastore: Datastore,
        retriever: Retriever,
        k: int,
        lmbda: float,
        temperature: float = 1.0,
        distances: str = "exact",
        similarity: Metric | None = None,
        missing: str = "left_out",
        rescoring: Datastore | None = None,
        keep_retrieved: bool = False,
        keep_scores: bool = False,
    ) -> None:
        self.datastore = datastore
        self.retriever = retriever
        self.k = k
        self.lmbda = lmbda
        self.temperature = temperature
        self.similarity: Metric = similarity or retriever.metric
        known = retriever.exact and self.similarity == retriever.metric
        # Missing neighbours that the last row stands for have a distance that nobody knows yet.
        self.rescores = distances == "exact" and not (known and missing == "left_out")
        self.missing = missing
        self.rescoring = rescoring
        self.keep_retrieved = keep_retrieved
        self.table = ScoreTable() if keep_scores else None
        self.kept: list[Retrieved] = []
        self.waiting: list = []
        self.background = Background()
        self.threads = 0
        self.seconds: Counter[str] = Counter()
        """Spent on `search`, `rescore` and `mix` in the background, and by the model's loop on
        waiting for them (`wait`)."""
        self.loss = TokenLoss()
        self.means = MetricCollection(
            {
                "nearest_distance": MeanMetric(),
                "kth_distance": MeanMetric(),
                "target_among_neighbors": MeanMetric(),
            },
            compute_groups=False,
        )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes half of the model's threads for the search where both compute on the CPU."""
        self.threads = torch.get_num_threads()
        searching = self.threads
        if pl_module.device.type == "cpu":
            searching = max(self.threads // 2, 1)
            torch.set_num_threads(max(self.threads - searching, 1))
        self.background = Background(threads=searching)
        if pl_module.device.type == "cpu":
            torch.set_num_threads(max(self.threads - searching, 1))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the threads back."""
        torch.set_num_threads(self.threads)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts new sums."""
        self.seconds.clear()
        self.loss.reset()
        self.means.reset()
        self.waiting, self.kept = [], []
        if self.table is not None:
            self.table = ScoreTable()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx, *_
    ) -> None:
        """Queues the search for a batch's keys, once enough have come together."""
        others = outputs.keys if self.rescoring is None else outputs.rescoring_keys
        columns = (outputs.positions, outputs.targets, outputs.log_probs)
        columns += (outputs.keys.float(), others.float())
        self.waiting.append([column.cpu() for column in columns])
        if sum(len(columns[0]) for columns in self.waiting) >= QUERIES_AT_ONCE:
            self._submit()

    def _submit(self) -> None:
        if self.waiting:
            columns = [torch.cat(parts) for parts in zip(*self.waiting, strict=True)]
            self.waiting = []
            with self._timed("wait"):
                self.background.submit(self._retrieve, *columns)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start

    @torch.inference_mode()
    def _retrieve(
        self, positions: Tensor, targets: Tensor, lm_log_prob: Tensor, keys: Tensor, others: Tensor
    ) -> None:
        if len(positions) == 0:
            return
        queries = keys.numpy()
        with self._timed("search"):
            distances, rows = self.retriever.search(queries, self.k)
        if self.missing == "last_row":
            rows = np.where(rows < 0, len(self.datastore) - 1, rows)
        with self._timed("rescore"):
            if self.rescoring is not None:
                distances = exact_distances(others.numpy(), rows, self.rescoring, self.similarity)
            elif self.rescores:
                distances = exact_distances(queries, rows, self.datastore, self.similarity)
        with self._timed("mix"):
            for first in range(0, len(rows), MIXED_AT_ONCE):
                part = slice(first, first + MIXED_AT_ONCE)
                self._mix(
                    positions[part], targets[part], lm_log_prob[part], distances[part], rows[part]
                )

    def _mix(
        self,
        positions: Tensor,
        targets: Tensor,
        lm_log_prob: Tensor,
        distances: np.ndarray,
        rows: np.ndarray,
    ) -> None:
        scores = neighbor_scores(distances, rows, self.similarity)
        values = self.datastore.values[rows]  # of the last row where missing: its score is -inf
        hits = torch.from_numpy(values == targets.numpy()[:, None]) & ~scores.isneginf()
        knn = knn_log_prob(scores, hits, self.temperature)
        mixed = interpolate(lm_log_prob, knn, self.lmbda)
        self.loss.update(mixed)
        self._describe(distances, rows, hits)
        if self.keep_retrieved:
            self.kept.append(Retrieved(lm_log_prob, scores, hits))
        if self.table is not None:
            self.table.add(
                position=positions.numpy(), knn_log_prob=knn.numpy(), log_prob=mixed.numpy()
            )

    def _describe(self, distances: np.ndarray, rows: np.ndarray, hits: Tensor) -> None:
        self.means["target_among_neighbors"].update(hits.any(dim=1).float())
        some = (rows >= 0).any(axis=1)  # of a token without neighbours there is no distance
        found, distances = rows[some] >= 0, distances[some]
        nearest = np.where(found, distances, np.inf).min(axis=1)
        farthest = np.where(found, distances, -np.inf).max(axis=1)
        if self.similarity != "l2":  # similarities: large is near
            nearest, farthest = farthest, nearest
        self.means["nearest_distance"].update(torch.from_numpy(nearest))
        self.means["kth_distance"].update(torch.from_numpy(farthest))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for the last searches."""
        self._submit()
        with self._timed("wait"):
            self.background.drain()
        self.loss.to(pl_module.device)
        self.means.to(pl_module.device)

    def statistics(self) -> dict[str, float]:
        """Means over all tokens and ranks: distances of the nearest and the k-th neighbour, share
        of tokens whose target is among the neighbours."""
        return {name: mean.item() for name, mean in self.means.compute().items()}

    def retrieved(self) -> Retrieved:
        """All that was kept on this rank; nothing, if the split had no batch for it."""
        nothing = torch.empty(0, self.k)
        kept = [Retrieved(torch.empty(0), nothing, nothing.bool()), *self.kept]
        return Retrieved(*(torch.cat(parts) for parts in zip(*kept, strict=True)))
