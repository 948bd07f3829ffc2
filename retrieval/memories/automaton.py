"""`AutomatonMemory`: each neighbour points to the entry that follows it in the datastore, and while
enough pointers are right no search is made (RetoMaton; Alon et al., ICML 2022).

Row i of a datastore is token i of its text, so row i + 1 follows row i. Once a token is known, each
entry that voted for it moves on to the next row; these rows are the pointers for the next token.
While there are at least `min_pointers`, they vote in place of neighbours, together with the other
members of their clusters, if the datastore has clusters. With fewer, a search is made, and its
neighbours and the pointers vote together. Every vote is weighed by the distance to the current
query, as in a kNN-LM.

The text is cut into walks of `walk_length` positions, and each walk begins with a search. All walks
of a batch take each step together, so that they search together. The opinion on a token does not
depend on how the text is cut into batches.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from neighborlm.common.contracts import (
    Distribution,
    Memory,
    Metric,
    Opinion,
    Resources,
    Retriever,
    Scored,
    Want,
)
from neighborlm.common.errors import InputError
from neighborlm.common.progress import progress_bars
from neighborlm.retrieval.memories.knn import (
    check_similarity,
    knn_log_prob,
    knn_weights,
    neighbor_scores,
)
from neighborlm.retrieval.memories.pointers import (
    Stretches,
    count_states,
    moved_on,
    with_members,
    without_doubles,
)
from neighborlm.retrieval.search.clusters import Clusters, cluster_count, ensure_clusters
from neighborlm.retrieval.search.rescoring import exact_distances
from neighborlm.retrieval.search.retriever import normalized
from neighborlm.retrieval.store.datastore import Datastore

FEATURES = ("nearest_distance", "pointers", "searched")
IMPOSSIBLE = -10000.0
"""log p of a target that no entry carries, in the original program."""
Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From queries fp32 `[W, d]` and rows int64 `[W, n]` to distances fp32 `[W, n]`; any number where a
row is -1."""


@dataclass
class AutomatonSettings:
    """How the automaton walks.

    Args:
        min_pointers: a search is made where fewer pointers are left. 1 saves the most searches; a
            larger number saves fewer and comes nearer to the perplexity of searching always.
        max_pointers: largest number of pointers that vote, members of their clusters included.
        clusters: number of k-means clusters of the keys; with each pointer the other members of its
            cluster vote too. 0 for no clusters, `auto` for one to every hundred keys.
        counting: what is compared with `min_pointers`. `paper` counts the clusters that are pointed
            to, or pointers where there are no clusters; no entry votes twice, and no pointer leads
            from one document into the next. `program` does what the original program does: it
            counts pointers, one that is also a neighbour or a member of its cluster votes twice,
            pointers lead across documents, and a token that no entry carries has log p = -10000.
        walk_length: number of tokens after which a walk ends and the next one begins with a search.
            Shorter walks make more searches, and more of them at a time.
        document_end: id of the token that ends a document, after which no pointer goes on; by
            default the datastore is one document.
    """

    min_pointers: int = 1
    max_pointers: int = 1024
    clusters: int | Literal["auto"] = 0
    counting: Literal["paper", "program"] = "paper"
    walk_length: int = 64
    document_end: int | None = None

    def check(self) -> None:
        """Raises InputError where a value alone cannot be right."""
        least = {"min_pointers": 1, "max_pointers": 1, "clusters": 0, "walk_length": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value != "auto" and value < lowest:
                raise InputError(f"--automaton.{name} is {value}; expected at least {lowest}")


class Walks(NamedTuple):
    """The state of W walks.

    Attributes:
        pointers: int64 `[W, m]`, rows, the nearest first and -1 after the last.
        idle: int64 `[W]`, steps since the last search.
    """

    pointers: np.ndarray
    idle: np.ndarray

    def some(self, which: np.ndarray | slice) -> "Walks":
        """Some of the walks."""
        return Walks(self.pointers[which], self.idle[which])


class Entries(NamedTuple):
    """The entries that vote in one step of W walks.

    Attributes:
        rows: int64 `[W, n]`, -1 where there is no entry.
        values: `[W, n]`, the tokens that followed; any where there is no entry.
        scores: fp32 `[W, n]`, larger is nearer; -inf where there is no entry.
        walks: the walks before the step.
        searched: whether a search was made for all of them, or for none.
    """

    rows: np.ndarray
    values: np.ndarray
    scores: np.ndarray
    walks: Walks
    searched: bool

    def some(self, which: np.ndarray | slice) -> "Entries":
        """The entries of some walks."""
        rows, values, scores = (column[which] for column in self[:3])
        return Entries(rows, values, scores, self.walks.some(which), self.searched)

    def left_aligned(self) -> "Entries":
        """The same entries, those of each walk moved to the left, so that no gap is between
        them."""
        order = np.argsort(self.rows < 0, axis=1, kind="stable")
        columns = (np.take_along_axis(column, order, axis=1) for column in self[:3])
        return Entries(*columns, *self[3:])

    def carry(self, tokens: np.ndarray) -> np.ndarray:
        """Which entries carry the token int64 `[W]` of their walk as value, bool `[W, n]`."""
        return (self.values == tokens[:, None].astype(self.values.dtype)) & (self.rows >= 0)


class AutomatonMemory(Memory):
    """Follows the datastore's text while the running text agrees with it.

    Args:
        datastore: whose entries vote.
        retriever: finds its rows.
        k: neighbours of a search.
        temperature: divides the scores.
        settings: how it walks.
        key_type: type of the keys; the datastore's own by default.
        distances: `exact` computes all distances from the stored keys; `index` uses the retriever's
            for neighbours, and distances to the index's codes for pointers.
        similarity: what `exact` computes; by default the retriever's metric.
        clusters: clusters of the datastore's keys, whose members vote.

    Attributes:
        counts: since the pass began, the `tokens` asked about, the `searches` made for them, the
            `pointers` available to them, and the steps `between` two searches.
        seconds: spent on `search`, on distances (`measure`), and on everything (`walk`).

    Raises:
        InputError: the datastore is one shard, or its rows do not follow one another; or
            `similarity` is not the retriever's metric though distances are those of the index.
    """

    in_order = True

    def __init__(
        self,
        datastore: Datastore,
        retriever: Retriever,
        k: int,
        temperature: float = 1.0,
        settings: AutomatonSettings | None = None,
        *,
        key_type: str | None = None,
        distances: Literal["exact", "index"] = "exact",
        similarity: Metric | None = None,
        clusters: Clusters | None = None,
    ) -> None:
        check_rows(datastore)
        self.datastore = datastore
        self.made_by = datastore.manifest["made_from"].get("model")
        self.retriever = retriever
        self.k = k
        self.temperature = temperature
        self.settings = settings or AutomatonSettings()
        self.as_program = self.settings.counting == "program"
        made_from = datastore.manifest["made_from"]
        self.key_type = key_type or made_from.get("key_type", "last_ffn_input")
        self.similarity: Metric = similarity or retriever.metric
        check_similarity(distances, self.similarity, retriever.metric)
        at_hand = retriever.exact and self.similarity == retriever.metric
        self.rescores = distances == "exact" and not at_hand
        self.measure = measure_of(datastore, retriever, distances, self.similarity)
        self.clusters = clusters
        document_end = None if self.as_program else self.settings.document_end
        self.ends = ends_of(datastore, document_end)
        self.want = Want(keys=(self.key_type,))
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.length = self.gap = 0
        """Positions of each of several texts, 0 where there is one; what is added to them, so that
        walks begin at the same places of each."""
        self.begun: dict[int, Walks] = {}
        """Walks that go on, by the position of their next token."""
        self.positions = np.empty(0, dtype=np.int64)
        """Positions of the tokens that were asked about last."""
        self.last_steps: list[tuple[np.ndarray, Entries]] = []
        """Numbers of those tokens that end a stretch, and the entries that voted for them."""

    @classmethod
    def of(cls, resources: Resources) -> "AutomatonMemory":
        """Makes the memory that the sections `knn` and `automaton` of the settings describe, and
        the clusters where they are missing."""
        knn, settings = resources.settings.knn, resources.settings.automaton
        datastore = resources.datastore()
        check_rows(datastore)
        clusters = None
        if settings.clusters != 0:
            count = cluster_count(datastore, settings.clusters)
            with progress_bars(f"{count} clusters") as report:
                clusters = ensure_clusters(datastore, count, report=report)
        return cls(
            datastore,
            resources.retriever(),
            knn.k,
            knn.temperature,
            settings,
            key_type=knn.key_type,
            distances=knn.distances,
            similarity=knn.similarity,
            clusters=clusters,
        )

    @property
    def warm_up(self) -> int:
        """See `Memory`: behind so many tokens a walk has begun, wherever the first of them was."""
        return self.settings.walk_length - 1

    def prepare(self) -> None:
        """Loads what a first search would wait for."""
        self.retriever.prepare()

    def begin_pass(self, text: np.ndarray | None = None) -> None:
        """Forgets all walks; connects the ranks where all search together. It does not read the
        text itself. Walks begin at the same places of each of several texts."""
        self.length = text.shape[1] if text is not None and text.ndim == 2 else 0
        self.gap = -self.length % self.settings.walk_length
        self.begun, self.last_steps = {}, []
        self.counts.clear()
        self.seconds.clear()
        self.retriever.begin_pass()

    def end_pass(self) -> None:
        """Searches for the other ranks until none has any query left."""
        self.retriever.end_pass()

    @property
    def searches(self) -> int:
        """See `Memory`."""
        return self.counts["searches"]

    @property
    def searches_saved(self) -> float:
        """Share of the tokens for which no search was made. The original program does not count
        the tokens after the last search of a walk."""
        counts = self.counts
        if self.as_program:
            return counts["between"] / max(counts["between"] + counts["searches"], 1)
        return 1 - counts["searches"] / max(counts["tokens"], 1)

    # -- questions -----------------------------------------------------------------------------

    def say(self, asked: Scored) -> Opinion:
        """log p of the targets. Features are `nearest_distance`, the distance of the nearest entry,
        infinite where there is none; `pointers`, their number; and `searched`, 1 where a search was
        made."""
        targets, log_probs = asked.targets.numpy(), torch.zeros(len(asked.targets))
        features = {name: torch.zeros(len(targets)) for name in FEATURES}
        with self._timed("walk"):
            for which, entries in self._steps(asked):
                hits = torch.from_numpy(entries.carry(targets[which]))
                scores = torch.from_numpy(entries.scores)
                # Sums in fp64: in fp32 they would depend on the width of the table.
                votes = knn_log_prob(scores.double(), hits, self.temperature)
                log_probs[which] = votes.float()
                self._count(features, which, entries)
        if self.as_program:
            log_probs.masked_fill_(log_probs.isneginf(), IMPOSSIBLE)
        return Opinion(log_probs, features)

    def distribution(self, asked: Scored) -> Distribution:
        """See `Memory.distribution`: the entries' values and weights; features as in `say`. Within
        a stretch of text each target decides the pointers of the next token; for the last target
        `observe` does."""
        features = {name: torch.zeros(len(asked.positions)) for name in FEATURES}
        steps = []
        with self._timed("walk"):
            for which, entries in self._steps(asked):
                self._count(features, which, entries)
                steps.append((which, entries.left_aligned()))
        widest = max((entries.rows.shape[1] for _, entries in steps), default=0)
        ids = torch.zeros(len(asked.positions), widest, dtype=torch.int64)
        probs, rows = torch.zeros(len(asked.positions), widest), torch.full_like(ids, -1)
        for which, entries in steps:
            width = entries.rows.shape[1]
            scores = torch.from_numpy(entries.scores).double()  # see `say`
            ids[which, :width] = torch.from_numpy(entries.values.astype(np.int64))
            rows[which, :width] = torch.from_numpy(entries.rows)
            probs[which, :width] = knn_weights(scores, self.temperature).float()
        ids = ids.masked_fill_(probs == 0, 0)
        return Distribution(ids, probs, features, rows)

    def _count(self, features: dict[str, Tensor], which: np.ndarray, entries: Entries) -> None:
        """Notes the features of some tokens, and adds them to the counts."""
        sign = -1 if self.similarity == "l2" else 1
        features["nearest_distance"][which] = sign * torch.from_numpy(entries.scores).amax(dim=1)
        there_were = (entries.walks.pointers >= 0).sum(axis=1)
        features["pointers"][which] = torch.from_numpy(there_were).float()
        self.counts.update(tokens=len(which), pointers=int(there_were.sum()))
        if entries.searched:
            features["searched"][which] = 1
            between = int(entries.walks.idle.sum())
            self.counts.update(searches=len(which), between=between)

    def observe(self, tokens: Tensor) -> None:
        """Moves the walks on by tokens int64 `[n]`, the true ones at the positions asked about
        last."""
        for position in self.positions.tolist():
            self.begun.pop(position, None)
        for which, entries in self.last_steps:
            walks = self._moved_on(entries, tokens.numpy()[which])
            for number, position in enumerate((self.positions[which] + 1).tolist()):
                if position % self.settings.walk_length:
                    self.begun[position] = walks.some(slice(number, number + 1))
        self.last_steps = []

    def follow(self, texts: Tensor) -> None:
        """See `Memory.follow`: the walks that end at the last tokens of the texts go on in those
        that follow them."""
        texts, self.begun, length = texts.numpy(), {}, self.length + self.gap
        of_text, place = np.divmod(self.positions, length)
        last = np.zeros(len(texts), dtype=np.int64)
        np.maximum.at(last, of_text, place)
        steps = []
        for which, entries in self.last_steps:
            numbers = np.full(len(texts), -1)
            is_last = place[which] == last[of_text[which]]
            numbers[of_text[which][is_last]] = np.flatnonzero(is_last)
            followers = np.flatnonzero(numbers[texts] >= 0)
            steps.append((followers, entries.some(numbers[texts[followers]])))
        self.last_steps = steps
        self.positions = np.arange(len(texts)) * length + last[texts]

    # -- walking -------------------------------------------------------------------------------

    def _steps(self, asked: Scored) -> Iterator[tuple[np.ndarray, Entries]]:
        """Numbers int64 `[W]` of some tokens, and the entries that vote for them. All stretches of
        tokens take a step together: first those that search, then those with enough pointers."""
        positions = asked.positions.numpy()
        if self.length:
            positions = positions + positions // self.length * self.gap
        self.positions, self.last_steps = positions, []
        queries, targets = asked.keys[self.key_type].numpy(), asked.targets.numpy()
        stretches = Stretches.of(self.positions, self.settings.walk_length)
        walks = self._walks_at(self.positions[stretches.order[stretches.starts]])
        for step in range(stretches.lengths.max(initial=0)):
            active, lasting = stretches.longer_than(step), stretches.longer_than(step + 1)
            tokens = stretches.order[stretches.starts[:active] + step]
            walks = walks.some(slice(active))
            searching = self._counted(walks.pointers) < self.settings.min_pointers
            groups, moved = [], []
            for search in (True, False):
                group = np.flatnonzero(searching == search)
                if not len(group):
                    continue
                which = tokens[group]
                entries = self._entries(queries[which], walks.some(group), search)
                yield which, entries
                last = group >= lasting
                if last.any():
                    self.last_steps.append((which[last], entries.some(last)))
                groups.append(group)
                moved.append(self._moved_on(entries, targets[which]))
            walks = together(moved, groups)

    def _walks_at(self, positions: np.ndarray) -> Walks:
        """The walks whose next tokens are at some positions int64 `[S]`. A walk begins anew where
        the token before was not observed."""
        nowhere = Walks(np.empty((1, 0), dtype=np.int64), np.zeros(1, dtype=np.int64))
        found = [self.begun.get(position, nowhere) for position in positions.tolist()]
        return together(found, np.arange(len(found))[:, None])

    def _moved_on(self, entries: Entries, tokens: np.ndarray) -> Walks:
        """The walks after the tokens int64 `[W]` that the entries voted on."""
        pointers = moved_on(entries.rows, entries.scores, entries.carry(tokens), self.ends)
        idle = entries.walks.idle
        return Walks(pointers, np.zeros_like(idle) if entries.searched else idle + 1)

    def _entries(self, queries: np.ndarray, walks: Walks, search: bool) -> Entries:
        """The entries that vote for the next tokens of some walks.

        Args:
            queries: fp32 `[W, d]`.
            search: whether to search for neighbours too.
        """
        rows = pointers = self._with_members(walks.pointers)
        if search:
            with self._timed("search"):
                found = self.retriever.search(queries, self.k, ordered=self.as_program)
            if not self.as_program:
                pointers = without_doubles(pointers, found.rows, len(self.datastore))
            rows = np.concatenate([found.rows, pointers], axis=1)
        with self._timed("measure"):
            measured = rows if self.rescores else pointers
            distances = self.measure(queries, measured)
        if search and not self.rescores:
            distances = np.concatenate([found.distances, distances], axis=1)
        scores = neighbor_scores(distances, rows, self.similarity).numpy()
        return Entries(rows, self.datastore.values_of(rows), scores, walks, search)

    def _counted(self, pointers: np.ndarray) -> np.ndarray:
        """The number that is compared with `min_pointers`, int64 `[W]`."""
        if self.clusters is None or self.as_program:
            return (pointers >= 0).sum(axis=1)
        return count_states(pointers, self.clusters)

    def _with_members(self, pointers: np.ndarray) -> np.ndarray:
        """Pointers, and members of their clusters, that vote: int64 `[W, n]`."""
        most = self.settings.max_pointers
        if self.clusters is None or not pointers.size:
            return pointers[:, :most]
        return with_members(pointers, self.clusters, most, doubles=self.as_program)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start


def together(parts: Sequence[Walks], numbers: Sequence[np.ndarray]) -> Walks:
    """Joins walks; `numbers` int64 `[W]` gives the places of each part's walks in the result."""
    count = sum(map(len, numbers))
    widest = max((part.pointers.shape[1] for part in parts), default=0)
    walks = Walks(np.full((count, widest), -1, dtype=np.int64), np.zeros(count, dtype=np.int64))
    for (pointers, idle), which in zip(parts, numbers, strict=True):
        walks.pointers[which, : pointers.shape[1]] = pointers
        walks.idle[which] = idle
    return walks


def check_rows(datastore: Datastore) -> None:
    """Refuses a datastore in which the row after an entry is not what followed it.

    Raises:
        InputError: it is one shard, or was thinned.
    """
    if datastore.part is not None:
        raise InputError(
            f"{datastore.path}: is one of {datastore.part.placement.shards} shards, but the "
            "automaton walks through all rows; expected no --knn.shard"
        )
    if "thinned" in datastore.manifest["made_from"]:
        raise InputError(
            f"{datastore.path}: has only some rows of another datastore, so that the automaton "
            "cannot tell which entry follows which; expected that one"
        )


def ends_of(datastore: Datastore, document_end: int | None = None) -> np.ndarray:
    """Rows that no row follows, int64 in ascending order: the last one, those before a row without
    a key, and those whose value ends a document."""
    ends = [np.array([len(datastore) - 1]), datastore.masked - 1]
    if document_end is not None:
        ends.append(np.flatnonzero(datastore.values[:] == document_end))
    return np.unique(np.concatenate(ends))


def measure_of(
    datastore: Datastore,
    retriever: Retriever,
    distances: Literal["exact", "index"],
    similarity: Metric,
) -> Measure:
    """The function that measures the distances of pointers, as exactly as those of neighbours.

    Raises:
        InputError: distances to the codes of an index are wanted, but each shard has its own index.
    """
    index = getattr(retriever, "index", None)
    if distances == "index" and isinstance(index, faiss.Index):
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is not None:
            faiss.downcast_index(ivf).make_direct_map()
        return partial(coded_distances, index=index, datastore=datastore, metric=similarity)
    if distances == "index" and datastore.n_shards > 1:
        raise InputError(
            "--knn.distances index: the automaton measures pointers by the codes of one index, but "
            f"each of the {datastore.n_shards} shards of {datastore.path} has its own; expected "
            "exact"
        )
    return partial(exact_distances, datastore=datastore, metric=similarity)


def coded_distances(
    queries: np.ndarray, rows: np.ndarray, index: faiss.Index, datastore: Datastore, metric: Metric
) -> np.ndarray:
    """Distances to the keys that an index decodes from its codes.

    Args:
        queries: fp32 `[W, d]`.
        rows: int64 `[W, n]`, -1 where missing.

    Returns:
        fp32 `[W, n]`, 0 where missing.
    """
    walks, columns = np.nonzero(rows >= 0)
    distances = np.zeros(rows.shape, dtype=np.float32)
    if len(walks):
        of_pairs = normalized(queries, metric)[walks]
        ids = rows[walks, columns]
        if index.ntotal != len(datastore):  # its ids count keys, not rows
            ids = ids - np.searchsorted(datastore.masked, ids)
        keys = index.reconstruct_batch(ids)
        if metric == "l2":
            distances[walks, columns] = np.square(of_pairs - keys).sum(axis=1)
        else:
            distances[walks, columns] = (of_pairs * keys).sum(axis=1)
    return distances
