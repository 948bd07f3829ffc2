"""Searches a datastore in shards by all ranks together: each rank searches its own shards for all.

In a round every rank sends its queries to all others, searches its shards for all queries, and
sends back the neighbours; the rank that asked keeps the nearest. Rounds go on until no rank has
queries left.

Where rows are dealt round-robin, a rank with a share p of the rows has about k p of the k nearest.
It is first asked for so many that more are improbable (`local_k`). A query whose result could still
lack a neighbour asks every rank again for k, so the result does not depend on the placement of
rows.

Queries are sent in fp32, since rounded to halves they would find other neighbours. Rows are sent as
rows of the whole, with their values. Where distances to stored keys are wanted, each rank computes
those to its own keys and sends them beside the index's, by which the nearest are chosen as in one
index of the whole. Keys are never sent, so no host needs more of a datastore than its shards.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributions import Binomial

from neighborlm.common.contracts import Metric, Neighbors, Retriever
from neighborlm.common.errors import InputError
from neighborlm.retrieval.cluster.ranks import Ranks
from neighborlm.retrieval.search.index import (
    Search,
    lies_in_shards,
    open_retriever,
    open_shards,
)
from neighborlm.retrieval.search.rescoring import exact_distances
from neighborlm.retrieval.search.retriever import BaseRetriever
from neighborlm.retrieval.search.sharded_retriever import ShardedRetriever, nearest_of
from neighborlm.retrieval.store.datastore import Datastore, placement_of
from neighborlm.retrieval.store.shards import Placement

TIMEOUT = 1800.0
"""Seconds: more than a rank takes for a search, or to come to the next. One that dies is noticed at
once."""
TOLERANCE = 1e-6
"""How likely a query may be to be asked again."""
Found = tuple[np.ndarray, ...]
"""Of each neighbour, `[Q, n]`: distance fp32 by which it was chosen, row, value, and perhaps the
distance fp32 to its stored key."""


class DistributedRetriever(BaseRetriever):
    """Every rank of torch.distributed has one of the same datastore, and for each pass of searches
    calls `begin_pass`, then `search` as often as it likes, then `end_pass`.

    A process alone searches all shards by itself.

    Args:
        datastore: the whole, or the one shard of it that this rank reaches.
        open_shards: opens the shards of some numbers, as one.
        metric: what keys are compared by.
        rescore: give the distances to the stored keys, whatever the shards are searched by; nearest
            first is by the distances of the search all the same.
        timeout: see `Ranks`.
        tolerance: see `local_k`.
    """

    def __init__(
        self,
        datastore: Datastore,
        open_shards: Callable[[Iterable[int]], ShardedRetriever],
        metric: Metric,
        rescore: bool,
        timeout: float = TIMEOUT,
        tolerance: float = TOLERANCE,
    ) -> None:
        self.datastore = datastore
        self.open_shards = open_shards
        self.metric: Metric = metric
        self.exact = rescore
        self.timeout = timeout
        self.tolerance = tolerance
        self.placement = placement_of(datastore.whole)
        self.name = f"{datastore.path}, searched by all ranks"
        self.local: ShardedRetriever | None = None
        self.ranks: Ranks | None = None
        self.statistics: Counter[str] = Counter()

    def begin_pass(self) -> None:
        """Opens this rank's shards and the ways to the others, where that is not done yet, and
        counts from zero.

        Raises:
            InputError: a shard cannot be opened, is reached by no rank, or its index was trained
                apart from the others'.
            LostRank: not all ranks came.
        """
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and self.ranks is None:
            self.ranks = Ranks.connect(self.timeout)
        if self.local is None:
            self._open()
        self.statistics.clear()
        if self.ranks:
            self.ranks.traffic.clear()

    def _open(self) -> None:
        """Opens the shards that fall to this rank."""
        placement, part = self.placement, self.datastore.part
        reached = list(range(placement.shards)) if part is None else [part.number]
        numbers = deal(placement, self._gather(reached), self.datastore.path)
        self.shares = [sum(map(placement.size, of)) / placement.rows for of in numbers]
        # A rank without shards is never asked, but must know how the others search.
        self.local = self.open_shards(numbers[self.ranks.rank if self.ranks else 0] or reached[:1])
        trained = self._gather(self.local.trained)
        if len(set(trained)) > 1:
            raise InputError(
                f"{self.datastore.path}: its index began with {self.local.trained}, but those of "
                f"other ranks with {set(trained) - {self.local.trained}}; copy one "
                "*.faiss.trained and its .json beside the manifest.json of all hosts and build anew"
            )
        self.rescores = self.exact and not self.local.exact
        values = np.dtype(self.datastore.manifest["value_dtype"])
        self.types = [np.float32, np.min_scalar_type(-placement.rows), values]
        self.types += [np.float32] * self.rescores

    def _gather(self, value: Any) -> list[Any]:
        return self.ranks.gather(value) if self.ranks else [value]

    @property
    def communication(self) -> Mapping[str, float]:
        """Figures of this rank since `begin_pass`: `ranks`, `rounds`, queries `asked_again`,
        `seconds_searching` its shards, `bytes_sent` and `bytes_received`; empty where it is
        alone."""
        if self.ranks is None:
            return {}
        names = ("rounds", "asked_again", "seconds_searching")
        counts = {name: self.statistics[name] for name in names}
        return {"ranks": self.ranks.size, **counts, **self.ranks.traffic}

    def search(self, queries: np.ndarray, k: int, ordered: bool = True) -> Neighbors:
        """See `contracts.Retriever.search`; in any case ordered, and with values.

        Raises:
            LostRank: another rank cannot go on.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if self.ranks is None or len(queries) == 0:
            found = self._search_here(queries, k)
        else:
            found = self._search_everywhere(queries, k)
        self.checked(Neighbors(found[0], found[1]))
        return Neighbors(found[3 if self.rescores else 0], found[1], found[2])

    def _search_everywhere(self, queries: np.ndarray, k: int) -> Found:
        found, lacking = self._ask(queries, k, self.placement.kind == "round_robin")
        if lacking.any():
            self.statistics["asked_again"] += int(lacking.sum())
            again, _ = self._ask(queries[lacking], k, False)
            for column, right in zip(found, again, strict=True):
                column[lacking] = right
        return found

    def end_pass(self) -> None:
        """Takes part in the searches of the other ranks until none has any left."""
        nothing = np.empty((0, self.datastore.dim), dtype=np.float32)
        while self.ranks is not None and self._round(nothing, 0, False):
            pass

    def _ask(self, queries: np.ndarray, k: int, probable: bool) -> tuple[Found, np.ndarray]:
        """The k nearest of what all ranks find, and for which queries `[Q]` those may not be the
        k nearest, since a rank was asked for fewer and all that it gave are among them."""
        answers = self._round(queries, k, probable)
        found = nearest_of(answers, k, self.metric)
        kth = self._far(found)
        cut_off = [answer for answer in answers if 0 < answer[1].shape[1] < k]
        return found, np.any([self._far(answer) < kth for answer in cut_off], axis=0)

    def _far(self, found: Found) -> np.ndarray:
        """How far the last one is, `[Q]`; infinitely where it is missing."""
        distances, rows = found[0][:, -1], found[1][:, -1]
        return np.where(rows < 0, np.inf, distances if self.metric == "l2" else -distances)

    def _width(self, rank: int, k: int, probable: bool) -> int:
        """How many neighbours a rank is asked for."""
        share = self.shares[rank]
        if share == 0 or not probable:
            return k if share else 0
        return local_k(k, share, self.tolerance / len(self.shares))

    def _round(self, queries: np.ndarray, k: int, probable: bool) -> list[Found]:
        """Searches for all ranks.

        Args:
            queries: fp32 `[Q, d]`, this rank's own.
            k: of the whole.
            probable: ask each rank only for what it probably has of them.

        Returns:
            what each rank found for the queries; nothing if no rank had any.
        """
        self.statistics["rounds"] += 1
        asked, theirs = self.ranks.step(
            (len(queries), k, probable),
            [[queries]] * self.ranks.size,
            lambda asked: [[((n, self.datastore.dim), np.float32)] for n in asked[:, 0]],
        )
        if not asked[:, 0].any():
            return []
        widths = [self._width(self.ranks.rank, k, wish) for _, k, wish in asked.tolist()]
        try:
            answers = self._answers([blocks[0] for blocks in theirs], widths)
        except BaseException:
            self.ranks.fail()
            raise
        shapes = [(len(queries), self._width(rank, k, probable)) for rank in range(len(answers))]
        _, found = self.ranks.step(
            (0, 0, 0),
            answers,
            lambda _: [[(shape, kind) for kind in self.types] for shape in shapes],
        )
        return [(distances, rows.astype(np.int64), *more) for distances, rows, *more in found]

    def _answers(self, queries: list[np.ndarray], widths: list[int]) -> list[list[np.ndarray]]:
        """What this rank's shards have for each rank; the queries of those who ask for equally many
        are searched together."""
        answers: list[list[np.ndarray]] = [[] for _ in queries]
        for width in set(widths):
            alike = [rank for rank, of_rank in enumerate(widths) if of_rank == width]
            found = self._search_here(np.concatenate([queries[rank] for rank in alike]), width)
            ends = np.cumsum([len(queries[rank]) for rank in alike])[:-1]
            columns = [
                np.split(column.astype(kind, copy=False), ends)
                for column, kind in zip(found, self.types, strict=True)
            ]
            for rank, *answer in zip(alike, *columns, strict=True):
                answers[rank] = answer
        return answers

    def _search_here(self, queries: np.ndarray, k: int) -> Found:
        """The k nearest of this rank's shards."""
        if len(queries) == 0 or k == 0:
            nothing = np.empty((len(queries), k), dtype=np.float32)
            return tuple(map(nothing.astype, (np.float32, np.int64, *self.types[2:])))
        start = time.perf_counter()
        distances, rows, _ = self.local.search(queries, k)
        found = (distances, rows, self.datastore.values_of(rows))
        if self.rescores:
            found += (exact_distances(queries, rows, self.datastore, self.metric),)
        self.statistics["seconds_searching"] += time.perf_counter() - start
        return found


def deal(placement: Placement, reached: Sequence[Sequence[int]], path: Path) -> list[list[int]]:
    """Which shards each rank searches: each shard falls to the rank with the fewest rows so far of
    those that reach it.

    Args:
        placement: of the shards.
        reached: the shards that each rank reaches.
        path: of the datastore, for messages.

    Raises:
        InputError: a shard is reached by none.

    >>> deal(Placement(12, 3, 4), [[0, 1, 2], [0, 1, 2]], Path("store"))
    [[0, 2], [1]]
    """
    missing = sorted(set(range(placement.shards)).difference(*reached))
    if missing:
        raise InputError(
            f"{path}: no rank reaches the shards {missing} of {placement.shards}; expected each on "
            "some host, where --knn.shard or --neighbors.shard names it"
        )
    numbers: list[list[int]] = [[] for _ in reached]
    rows = [0] * len(reached)
    for number in range(placement.shards):
        able = [rank for rank, of_rank in enumerate(reached) if number in of_rank]
        rank = min(able, key=rows.__getitem__)
        numbers[rank].append(number)
        rows[rank] += placement.size(number)
    return numbers


@lru_cache(maxsize=1024)
def local_k(k: int, share: float, tolerance: float) -> int:
    """How many of a query's k nearest keys lie, but for a probability, at most where a share of all
    keys does: the quantile of the binomial distribution.

    Keys that are dealt at random are drawn without replacement, and then more are still less likely
    (Hoeffding, Probability inequalities for sums of bounded random variables, 1963, theorem 4).

    Args:
        k: neighbours in all.
        share: of the keys, 0 to 1.
        tolerance: probability of more.

    >>> local_k(1024, 0.25, 1e-6), local_k(1024, 1.0, 1e-6)
    (324, 1024)
    """
    if share in (0.0, 1.0):
        return round(k * share)
    count, chance = torch.tensor([k, share], dtype=torch.float64)
    exactly = Binomial(count, chance).log_prob(torch.arange(k + 1, dtype=torch.float64)).exp()
    at_least = exactly.flip(0).cumsum(0).flip(0)
    return int((at_least[1:] > tolerance).sum())


def open_distributed(datastore: Datastore, search: Search, rescore: bool = False) -> Retriever:
    """Opens what all ranks search a datastore by: of one in shards each rank searches some for all,
    unless there is an index of the whole, which each opens for itself.

    Args:
        datastore: the whole, or the one shard of it that this rank reaches.
        rescore: see `DistributedRetriever`; of what a rank searches for itself distances are those
            of the index all the same, see `exact`.

    Raises:
        InputError: no such index, or one of another datastore, metric or dimension.
    """
    if datastore.part is None and not lies_in_shards(datastore, search):
        return open_retriever(datastore, search)
    opening = partial(open_shards, datastore, search=search)
    return DistributedRetriever(datastore, opening, search.metric, rescore)
