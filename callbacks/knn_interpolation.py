"""`KNNInterpolation`: mixes a model's test-time log-probabilities with the kNN distribution."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import faiss
import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from neighborlm.callbacks.background import Background
from neighborlm.callbacks.mixture import Mixture
from neighborlm.common.contracts import Metric, Neighbors, Retriever
from neighborlm.retrieval.memories.cache import RetrievalCacheBuilder
from neighborlm.retrieval.memories.knn import neighbor_scores
from neighborlm.retrieval.search.rescoring import exact_distances
from neighborlm.retrieval.search.retriever import in_parts, votes_of, with_values
from neighborlm.retrieval.store.datastore import Datastore

FIRST_QUERIES, QUERIES_AT_ONCE = 2048, 10240
"""Queries of the first search, so that it begins soon, and at most: lists that many queries visit
are read once. Each search has twice as many as the one before."""
SWITCH_SECONDS = 5e-5
"""How long Python lets one thread keep another waiting: a hundredth of what it does by default,
since the model and the search call many functions that take less than a millisecond."""


class KNNInterpolation(Callback):
    """Searches with the keys that `test_step` returns, while the model computes the next batch.

    Args:
        datastore: whose values vote.
        retriever: finds its rows.
        k: neighbours per token.
        lmbda, temperature: see `Mixture`.
        distances: `exact` computes them from the stored keys, `index` takes the retriever's.
        similarity: what `exact` computes; by default the retriever's metric.
        missing: `left_out`, or `last_row` to count the last row in place of missing neighbours,
            as the original program does.
        rescoring: datastore of the same text with keys of another type; distances are then those
            from the model's `rescoring_keys` to its keys.
        cache: gets what is retrieved for every token.
        keep_scores: keep the per-token log-probabilities.

    Attributes:
        mixture: what the mixture says of the tokens of the last pass.
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
        cache: RetrievalCacheBuilder | None = None,
        keep_scores: bool = False,
    ) -> None:
        self.datastore = datastore
        self.retriever = retriever
        self.k = k
        self.similarity: Metric = similarity or retriever.metric
        known = retriever.exact and self.similarity == retriever.metric
        # Missing neighbours that the last row stands for have a distance that nobody knows yet.
        self.rescores = distances == "exact" and not (known and missing == "left_out")
        self.missing = missing
        self.ordered = cache is not None  # which gives the nearest few of them again
        self.rescoring = rescoring
        self.cache = cache
        # Nobody asks who the neighbours are.
        self.votes_at_once = not (
            self.rescores or rescoring is not None or cache is not None or missing == "last_row"
        )
        self.temperature = temperature
        self.new_mixture = partial(Mixture, lmbda, self.similarity, keep_scores)
        self.mixture = self.new_mixture()
        self.waiting: list = []
        self.enough = FIRST_QUERIES
        self.background = Background()
        self.threads = self.share = torch.get_num_threads()
        """Of the model and the search together, and of a search that the model is not ahead of."""
        self.submitted = self.begun = self.ended = 0
        """Searches; each number is changed by one thread only."""
        self.hooks: list[RemovableHandle] = []
        self.switch_seconds = sys.getswitchinterval()
        self.seconds: Counter[str] = Counter()
        """Spent on `search`, `rescore` and `mix` in the background, and by the model's loop on
        waiting for them (`wait`). Votes that are counted while the search goes on are part of it.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Where both compute on the CPU, and at the same time, the search takes half of the model's
        threads. Its thread loads what the first search would wait for."""
        self.threads = torch.get_num_threads()
        on_cpu = trainer.strategy.root_device.type == "cpu"
        self.share = max(self.threads // 2, 1) if on_cpu else self.threads
        self.background = Background(threads=self.share)
        self.background.submit(self.retriever.prepare)
        self.background.drain()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets threads take turns more often, and has each part of the model take those that are
        free; connects the ranks where all search together."""
        self.switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        if pl_module.device.type == "cpu":
            parts = pl_module.modules()  # of which each may begin after a search has ended
            self.hooks = [part.register_forward_pre_hook(self._share_threads) for part in parts]
        self.retriever.begin_pass()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the threads back."""
        for hook in self.hooks:
            hook.remove()
        torch.set_num_threads(self.threads)
        sys.setswitchinterval(self.switch_seconds)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts new sums."""
        self.seconds.clear()
        self.waiting, self.enough = [], FIRST_QUERIES
        self.submitted = self.begun = self.ended = 0
        self.mixture = self.new_mixture()

    def _share_threads(self, *_) -> None:
        """The model takes what the search leaves, all threads while nothing is searched for."""
        searching = self.submitted > self.ended
        torch.set_num_threads(max(self.threads - self.share * searching, 1))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx, *_
    ) -> None:
        """Queues the search for a batch's keys, once enough have come together."""
        others = outputs.keys if self.rescoring is None else outputs.rescoring_keys
        columns = (outputs.positions, outputs.targets, outputs.log_probs)
        columns += (outputs.keys.float(), others.float())
        self.waiting.append([column.cpu() for column in columns])
        if sum(len(columns[0]) for columns in self.waiting) >= self.enough:
            self.enough = min(2 * self.enough, QUERIES_AT_ONCE)
            self._submit()

    def _submit(self) -> None:
        if self.waiting:
            columns = [torch.cat(parts) for parts in zip(*self.waiting, strict=True)]
            self.waiting = []
            self.submitted += 1
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
        self.begun += 1
        if len(positions):
            self._find(positions, targets, lm_log_prob, keys, others)
        self.ended += 1

    def _find(
        self, positions: Tensor, targets: Tensor, lm_log_prob: Tensor, keys: Tensor, others: Tensor
    ) -> None:
        """Retrieves and weighs the neighbours of some tokens."""
        queries = keys.numpy()
        another_waits = self.submitted > self.begun
        faiss.omp_set_num_threads(self.threads if another_waits else self.share)
        if self.votes_at_once:
            with self._timed("search"):
                votes = self.retriever.vote(queries, self.k, targets.numpy(), self.temperature)
        else:
            found = self._neighbors(queries, others.numpy())
            with self._timed("mix"):
                votes = votes_of(found, targets.numpy(), self.temperature, self.similarity)

            def keep(part: slice) -> None:
                distances, rows, values = (column[part] for column in found)
                scores = neighbor_scores(distances, rows, self.similarity)
                columns = (column[part] for column in (positions, targets, lm_log_prob))
                self.cache.write(*columns, scores, values)

            with self._timed("mix"):
                if self.cache is not None:
                    in_parts(keep, len(positions))
        with self._timed("mix"):
            self.mixture.add(positions, lm_log_prob, votes)

    def _neighbors(self, queries: np.ndarray, others: np.ndarray) -> Neighbors:
        """The neighbours of some tokens and their values.

        Args:
            others: keys of the type of those to rescore by.
        """
        with self._timed("search"):
            distances, rows, values = self.retriever.search(queries, self.k, self.ordered)
        if self.missing == "last_row":
            rows, values = np.where(rows < 0, len(self.datastore) - 1, rows), None
        with self._timed("rescore"):
            if self.rescoring is not None:
                distances = exact_distances(others, rows, self.rescoring, self.similarity)
            elif self.rescores:
                distances = exact_distances(queries, rows, self.datastore, self.similarity)
        return with_values(Neighbors(distances, rows, values), self.datastore)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for the last searches, which take the model's threads too, also those of the other
        ranks where all search together."""
        self.share = self.threads
        self._submit()
        with self._timed("wait"):
            self.background.submit(self.retriever.end_pass)
            self.background.drain()
        if self.cache is not None:
            self.cache.sync()
        self.mixture.to(pl_module.device)
