"""`KNNMemory`: the nearest stored contexts vote for the tokens that followed them (Khandelwal et
al., ICLR 2020)."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch

from neighborlm.common.contracts import (
    Distribution,
    Memory,
    Metric,
    Neighbors,
    Opinion,
    Resources,
    Retriever,
    Scored,
    Votes,
    Want,
)
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.cache import RetrievalCache, Retrieved
from neighborlm.retrieval.memories.cache_builder import RetrievalCacheBuilder, nearest_first
from neighborlm.retrieval.memories.knn import (
    check_similarity,
    extremes,
    knn_log_prob,
    knn_weights,
    neighbor_scores,
    votes_of_scores,
    weighted_scores,
)
from neighborlm.retrieval.memories.neighbors_by_k import opinion_by_k
from neighborlm.retrieval.memories.tuning import Tuning, tune
from neighborlm.retrieval.search.rescoring import exact_distances
from neighborlm.retrieval.search.retriever import counts_of, in_parts, votes_of, with_values
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.thinning import open_weights


class KNNMemory(Memory):
    """Searches a datastore with the model's keys as queries.

    Args:
        datastore: its values vote.
        retriever: finds its rows.
        k: neighbours of a token.
        temperature: divides the scores of the neighbours; None to have `tune` find it.
        key_type: type of the queries; the datastore's own by default.
        distances: `exact` computes them from the stored keys, `index` uses the retriever's.
        similarity: what `exact` computes; by default the retriever's metric.
        missing: `left_out`, or `last_row` to count the last row in place of missing neighbours, as
            the original program does.
        rescoring: datastore of the same text with keys of another type; distances are then those
            to its keys.
        cache: stores the neighbours of every token.

    Attributes:
        retrieved: what was stored in the last pass, which `tune` reads.
        tuning: what `tune` found; None before.
        by_k: speak for each number of neighbours, see `neighbors_by_k`.
        seconds: spent on `search` and `rescore`; where votes are counted during the search,
            `search` includes them.

    Raises:
        InputError: `similarity` is not the retriever's metric though distances are its own.
    """

    in_order = False

    def __init__(
        self,
        datastore: Datastore,
        retriever: Retriever,
        k: int,
        temperature: float | None = 1.0,
        *,
        key_type: str | None = None,
        distances: Literal["exact", "index"] = "exact",
        similarity: Metric | None = None,
        missing: Literal["left_out", "last_row"] = "left_out",
        rescoring: Datastore | None = None,
        cache: RetrievalCacheBuilder | None = None,
    ) -> None:
        self.datastore = datastore
        self.made_by = datastore.manifest["made_from"].get("model")
        self.retriever = retriever
        self.k = k
        self.temperature = temperature
        self.similarity: Metric = similarity or retriever.metric
        if rescoring is None:
            check_similarity(distances, self.similarity, retriever.metric)
        at_hand = retriever.exact and self.similarity == retriever.metric
        # The distance of the last row, where it stands for missing neighbours, is not at hand.
        self.rescores = distances == "exact" and not (at_hand and missing == "left_out")
        self.missing = missing
        self.weights = open_weights(datastore)
        """How many entries each stands for, where some were merged."""
        self.rescoring = rescoring
        self.cache = cache
        self.key_type = key_type or key_type_of(datastore)
        self.others = self.key_type if rescoring is None else key_type_of(rescoring)
        """Type of the queries that neighbours are rescored by."""
        self.seconds: Counter[str] = Counter()
        self.retrieved: RetrievalCache | None = None
        self.tuning: Tuning | None = None
        self.by_k = False

    @property
    def want(self) -> Want:
        """See `Memory`: the queries, and what the cache keeps of the model."""
        keys = Want(keys=tuple(dict.fromkeys((self.key_type, self.others))))
        return keys if self.cache is None else keys.and_also(self.cache.extent.want)

    @classmethod
    def of(cls, resources: Resources) -> "KNNMemory":
        """Makes the memory that the section `knn` of the settings describes."""
        return cls(**cls.arguments_of(resources))

    @classmethod
    def arguments_of(cls, resources: Resources) -> dict[str, Any]:
        """What it is made with."""
        knn = resources.settings.knn
        return {
            "datastore": resources.datastore(),
            "retriever": resources.retriever(),
            "k": knn.k,
            "temperature": None if knn.temperature == "auto" else knn.temperature,
            "key_type": knn.key_type,
            "distances": knn.distances,
            "similarity": knn.similarity,
            "missing": knn.missing,
            "rescoring": resources.rescoring_datastore(),
        }

    @property
    def needs_tuning(self) -> bool:
        """Whether the temperature is still unknown, so that it only stores what is retrieved."""
        return self.temperature is None

    def prepare(self) -> None:
        """Loads what a first search would wait for."""
        self.retriever.prepare()

    def begin_pass(self, text: np.ndarray) -> None:
        """Connects the ranks where all search together."""
        self.seconds.clear()
        self.searches = 0
        self.retriever.begin_pass()

    def end_pass(self) -> None:
        """Searches for the other ranks until none has any query left."""
        self.retriever.end_pass()
        if self.cache is not None:
            self.cache.sync()

    def say(self, asked: Scored) -> Opinion:
        """log p_kNN of the targets (eq. 2). Features are `nearest_distance` and `kth_distance`, the
        distances of the nearest and of the farthest neighbour; infinite where a token has none.

        While it needs tuning, it gives every target probability 0.

        Raises:
            InputError: it needs tuning, but nothing stores what is retrieved.
        """
        if self.temperature is None and self.cache is None:
            self._refuse_untuned()
        targets = asked.targets.numpy()
        if not self.neighbors_are_needed:
            self.searches += len(targets)
            queries = asked.keys[self.key_type].numpy()
            with self._timed("search"):
                votes = self.retriever.vote(queries, self.k, targets, self.temperature)
            return opinion_of(votes, self.similarity)
        neighbors = self.neighbors(asked)
        if self.cache is not None:
            self._write(asked, neighbors)
        if self.temperature is None:
            return Opinion(torch.full((len(targets),), -torch.inf))
        if self.by_k:
            return opinion_by_k(self._block(asked, neighbors), self.temperature, self.similarity)
        counts = counts_of(neighbors.rows, self.weights)
        votes = votes_of(neighbors, targets, self.temperature, self.similarity, counts)
        return opinion_of(votes, self.similarity)

    def opinion_on(self, cache: RetrievalCache) -> Opinion:
        """What it says of all tokens of a cache, in the order of the text."""
        return Opinion.joined([self.opinion_on_block(block) for block in cache.blocks(self.by_k)])

    def opinion_on_block(self, block: Retrieved) -> Opinion:
        """What it says of some tokens whose neighbours were found before."""
        how = (block, self.temperature, self.similarity)
        return opinion_by_k(*how) if self.by_k else opinion_from_cache(*how)

    def tune(self) -> Opinion:
        """Finds the temperature that gives what was retrieved the highest likelihood in a mixture
        with the language model by one weight; see `Memory.tune`."""
        self.tuning = tune(self.retrieved)
        self.temperature = self.tuning.temperature
        return self.opinion_on(self.retrieved)

    def state(self) -> dict[str, np.ndarray]:
        """See `Memory.state`."""
        return {"temperature": np.array(self.temperature)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See `Memory.restore`."""
        self.temperature = float(state["temperature"])

    def _refuse_untuned(self) -> None:
        raise InputError(
            "--memories knn: has no temperature yet; expected --knn.temperature given or tuned"
        )

    def _block(self, asked: Scored, neighbors: Neighbors) -> Retrieved:
        """The neighbours as a cache would give them."""
        scores = neighbor_scores(neighbors.distances, neighbors.rows, self.similarity)
        columns = [neighbors.values.astype(np.int64)]
        if self.weights is not None:
            columns.append(counts_of(neighbors.rows, self.weights).astype(np.float32))
        columns = map(torch.from_numpy, nearest_first(scores.numpy(), *columns))
        scores, values, *weights = columns
        hits = (values == asked.targets[:, None]) & ~scores.isneginf()
        return Retrieved(
            asked.positions, asked.targets, asked.log_probs, scores, hits, values, *weights
        )

    def _write(self, asked: Scored, neighbors: Neighbors) -> None:
        """Writes the neighbours, and what the model said, to the cache."""
        extent = self.cache.extent
        of_model = (asked.positions, asked.targets, asked.log_probs)
        others = {}
        if extent.top:
            others |= {name: getattr(asked, name) for name in ("entropy", "top_ids")}
            others["top_log_probs"] = asked.top_log_probs
        if extent.on_lm:
            others["alone_log_prob"] = asked.lm_log_probs
        if extent.datastore_rows:
            others["rows"] = neighbors.rows
        if extent.weighted:
            others["weights"] = counts_of(neighbors.rows, self.weights)

        def write(part: slice) -> None:
            scores = neighbor_scores(
                neighbors.distances[part], neighbors.rows[part], self.similarity
            )
            columns = (column[part] for column in of_model)
            more = {name: column[part] for name, column in others.items()}
            self.cache.write(*columns, scores, neighbors.values[part], **more)

        in_parts(write, len(neighbors.rows))

    @property
    def neighbors_are_needed(self) -> bool:
        """Whether the neighbours themselves are needed; otherwise their votes suffice."""
        changed = self.rescores or self.rescoring is not None or self.missing == "last_row"
        return changed or self.by_k or self.cache is not None

    def neighbors(self, asked: Scored) -> Neighbors:
        """The neighbours of some tokens, with their values and the distances that weigh their
        votes; in order only where there is a cache."""
        queries = asked.keys[self.key_type].numpy()
        self.searches += len(queries)
        with self._timed("search"):
            ordered = self.cache is not None
            distances, rows, values = self.retriever.search(queries, self.k, ordered)
        if self.missing == "last_row":
            rows, values = np.where(rows < 0, len(self.datastore) - 1, rows), None
        with self._timed("rescore"):
            if self.rescoring is not None:
                others = asked.keys[self.others].numpy()
                distances = exact_distances(others, rows, self.rescoring, self.similarity)
            elif self.rescores:
                distances = exact_distances(queries, rows, self.datastore, self.similarity)
        return with_values(Neighbors(distances, rows, values), self.datastore)

    def distribution(self, asked: Scored) -> Distribution:
        """See `Memory.distribution`: the neighbours' values and weights; features as in `say`.

        Raises:
            InputError: it needs tuning.
        """
        if self.temperature is None:
            self._refuse_untuned()
        found = self.neighbors(asked)
        scores = neighbor_scores(found.distances, found.rows, self.similarity)
        nearest, farthest = extremes(scores)
        sign = -1 if self.similarity == "l2" else 1
        features = {"nearest_distance": sign * nearest, "kth_distance": sign * farthest}
        weighed = scores
        if self.weights is not None:
            weights = torch.from_numpy(counts_of(found.rows, self.weights).astype(np.float32))
            weighed = weighted_scores(scores, weights, self.temperature)
        ids, rows = torch.from_numpy(found.values.astype(np.int64)), torch.from_numpy(found.rows)
        shares = knn_weights(weighed, self.temperature)
        return Distribution(ids, shares, features, rows, scores)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start


def opinion_of(votes: Votes, similarity: Metric) -> Opinion:
    """Turns votes into an opinion, see `KNNMemory.say`."""
    sign = -1 if similarity == "l2" else 1
    nearest, farthest = (torch.from_numpy(sign * x) for x in (votes.nearest, votes.farthest))
    features = {"nearest_distance": nearest, "kth_distance": farthest}
    return Opinion(torch.from_numpy(votes.log_probs), features)


def opinion_from_cache(block: Retrieved, temperature: float, similarity: Metric) -> Opinion:
    """The opinion of `KNNMemory.say` on the tokens of a cache, at any temperature."""
    votes = votes_of_scores(block.scores, block.hits, temperature)
    if block.weights is not None:
        merged = weighted_scores(block.scores, block.weights, temperature)
        votes = votes._replace(log_probs=knn_log_prob(merged, block.hits, temperature).numpy())
    return opinion_of(votes, similarity)


def key_type_of(datastore: Datastore) -> str:
    """The key type of a datastore; the papers' own where its manifest names none."""
    return datastore.manifest["made_from"].get("key_type", "last_ffn_input")
