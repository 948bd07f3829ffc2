"""Counts the votes of neighbours for targets (Khandelwal et al., ICLR 2020, eq. 2), in compiled
loops; `memories.knn` does the same in torch.

A neighbour's score is minus its distance, or its similarity. Of neighbours with scores s_j and
values v_j, and a temperature T:

    p_kNN(w) = sum over j with v_j = w of exp(s_j / T)  /  sum over all j of exp(s_j / T)

A neighbour that stands for n_j entries, which were merged into it, adds n_j exp(s_j / T) to either
sum (He et al., EMNLP 2021).
"""

from typing import Any

import numpy as np

from neighborlm.common.contracts import Neighbors, Votes
from neighborlm.retrieval.engine.loops import votes_of_neighbors
from neighborlm.retrieval.engine.parallel import in_parallel

GROUP = 128
"""Queries whose neighbours are weighed at a time, so that they stay in the cache."""


class Ballot:
    """Votes for the targets of queries, counted for some queries at a time, by several threads.

    Args:
        values: unsigned `[N]` or like it, indexed by arrays of ids.
        targets: int64 `[Q]`.
        temperature: divides the scores.
        similar: whether a large distance is near, as with inner products.
        counts: numbers `[N]` or like it, as `values`: for how many entries each stands; None where
            each stands for itself.

    Attributes:
        votes: the votes counted so far.
    """

    def __init__(
        self,
        values: Any,
        targets: np.ndarray,
        temperature: float,
        similar: bool,
        counts: Any = None,
    ) -> None:
        self.values = values
        self.counts = counts
        self.targets = np.asarray(targets).astype(np.int32)
        self.temperature = np.float32(temperature)
        self.similar = similar
        self.votes = no_votes(len(self.targets))

    def count(self, which: np.ndarray, distances: np.ndarray, ids: np.ndarray) -> None:
        """Counts the votes of gathered neighbours.

        Args:
            which: int64 `[n]`, numbers of the queries.
            distances, ids: fp32 and int64 `[n, k]`, none missing.
        """
        values = np.asarray(self.values[ids]).astype(np.int32, copy=False)
        counts = as_counts(ids[:, :0] if self.counts is None else self.counts[ids])
        votes = no_votes(len(ids))
        asked = (self.targets[which], self.temperature)
        votes_of_neighbors(distances, ids, values, counts, self.similar, *asked, *votes)
        self.write(which, votes)

    def write(self, which: np.ndarray, votes: Votes) -> None:
        """Writes the votes for some targets."""
        for column, part in zip(self.votes, votes, strict=True):
            column[which] = part


def count_votes(
    neighbors: Neighbors,
    targets: np.ndarray,
    temperature: float,
    similar: bool,
    threads: int = 1,
    counts: np.ndarray | None = None,
) -> Votes:
    """Counts the votes of neighbours with values.

    Args:
        neighbors: in any order.
        targets: int64 `[Q]`.
        temperature: divides the scores.
        similar: whether large is near.
        threads: how many may work at a time.
        counts: `[Q, k]`, for how many entries each neighbour stands; any where it is missing.

    Raises:
        ValueError: the shapes differ.
    """
    distances, rows, values = neighbors
    shapes = [array.shape for array in (distances, rows, values)]
    if shapes != [(len(targets), rows.shape[-1])] * 3:
        raise ValueError(f"{len(targets)} targets, and distances, rows, values of shapes {shapes}")
    counts = rows[:, :0] if counts is None else counts
    if counts.shape not in (rows.shape, (len(rows), 0)):
        raise ValueError(f"neighbours of shape {rows.shape}, and counts of {counts.shape}")
    distances, rows = np.ascontiguousarray(distances, np.float32), np.ascontiguousarray(rows)
    targets = targets.astype(np.int32)
    votes = no_votes(len(targets))

    def count(first: int) -> None:
        part = slice(first, first + GROUP)
        of_part = np.ascontiguousarray(values[part], np.int32)
        written = (column[part] for column in votes)
        found = (distances[part], rows[part], of_part, as_counts(counts[part]))
        votes_of_neighbors(*found, similar, targets[part], np.float32(temperature), *written)

    in_parallel(count, range(0, len(targets), GROUP), threads)
    return votes


def as_counts(counts: np.ndarray) -> np.ndarray:
    """Counts as the loops take them."""
    return np.ascontiguousarray(counts, np.float32)


def no_votes(n: int) -> Votes:
    """Empty arrays for the votes for n targets."""
    return Votes(*(np.empty(n, dtype=np.float32) for _ in Votes._fields))
