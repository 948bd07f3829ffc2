"""Pointers into a datastore, for many walks at a time (RetoMaton; Alon et al., ICML 2022): how they
move on after a token, and which entries share their clusters.

The pointers of W walks are a table `[W, m]` of rows of the datastore, -1 where there is none. It is
as wide as the walk with the most pointers needs.
"""

from typing import NamedTuple

import numpy as np

from neighborlm.retrieval.search.clusters import Clusters


class Stretches(NamedTuple):
    """Stretches of tokens that follow one another in the text, the longest stretch first.

    Attributes:
        order: int64 `[n]`, numbers of the tokens in the order of the text.
        starts: int64 `[S]`, where each stretch begins in `order`.
        lengths: int64 `[S]`.
    """

    order: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, positions: np.ndarray, walk_length: int) -> "Stretches":
        """The stretches of tokens at positions int64 `[n]` in any order. A stretch ends before a
        gap and before every multiple of `walk_length`.

        >>> Stretches.of(np.array([9, 3, 4, 5, 6]), 5)
        Stretches(order=array([1, 2, 3, 4, 0]), starts=array([0, 2, 4]), lengths=array([2, 2, 1]))
        """
        order = np.argsort(positions, kind="stable")
        ascending = positions[order]
        begins = np.ones(len(positions), dtype=bool)
        begins[1:] = (np.diff(ascending) != 1) | (ascending[1:] % walk_length == 0)
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=len(positions))
        longest_first = np.argsort(-lengths, kind="stable")
        return cls(order, starts[longest_first], lengths[longest_first])

    def longer_than(self, length: int) -> int:
        """How many stretches are longer; they are the first ones."""
        return int(np.searchsorted(-self.lengths, -length))


def table_of(walks: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Writes the rows of each walk into a row of a table, followed by -1.

    Args:
        walks: int64 `[n]`, ascending, the walk of each row.
        rows: int64 `[n]`.
        count: number of walks.

    Returns:
        int64 `[count, m]`.

    >>> table_of(np.array([0, 2, 2]), np.array([7, 8, 9]), 3).tolist()
    [[7, -1], [-1, -1], [8, 9]]
    """
    sizes = np.bincount(walks, minlength=count)
    table = np.full((count, sizes.max(initial=0)), -1, dtype=np.int64)
    table[walks, np.arange(len(rows)) - (np.cumsum(sizes) - sizes)[walks]] = rows
    return table


def moved_on(
    rows: np.ndarray, scores: np.ndarray, goes_on: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """The pointers after a token.

    Args:
        rows: int64 `[W, n]`, entries that voted.
        scores: fp32 `[W, n]`, larger is nearer.
        goes_on: bool `[W, n]`, which entries carry the token as value.
        ends: int64, ascending rows that no row follows; at least one.

    Returns:
        int64 `[W, m]`, the nearest first.
    """
    walks, columns = np.nonzero(goes_on)
    found = rows[walks, columns]
    lasting = ~are_among(found, ends)
    walks, columns, found = walks[lasting], columns[lasting], found[lasting]
    nearest_first = np.lexsort((-scores[walks, columns], walks))
    return table_of(walks, found[nearest_first] + 1, len(rows))


def are_among(rows: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which rows are among some ascending ones, of which there is at least one; bool."""
    places = np.searchsorted(ascending, rows)
    return ascending[np.minimum(places, len(ascending) - 1)] == rows


def without_doubles(pointers: np.ndarray, neighbors: np.ndarray, rows: int) -> np.ndarray:
    """Pointers int64 `[W, m]`, with -1 for those that are among the neighbours int64 `[W, k]` of
    the same walk.

    Args:
        rows: number of rows of the datastore.
    """
    walks, columns = np.nonzero(pointers >= 0)
    if len(walks) == 0:
        return pointers
    ours = pointers[walks, columns] + walks * rows
    of_walks = np.arange(len(pointers))[:, None] * rows
    theirs = np.where(neighbors < 0, -1, neighbors + of_walks).ravel()
    doubles = np.sort(theirs[are_among(theirs, np.sort(ours))])  # few: fast to sort
    left = pointers.copy()
    if len(doubles):
        double = are_among(ours, doubles)
        left[walks[double], columns[double]] = -1
    return left


def count_states(pointers: np.ndarray, clusters: Clusters) -> np.ndarray:
    """How many clusters each walk points to, int64 `[W]`."""
    walks, columns = np.nonzero(pointers >= 0)
    states = walks * clusters.count + clusters.labels[pointers[walks, columns]]
    return np.bincount(np.unique(states) // clusters.count, minlength=len(pointers))


def with_members(
    pointers: np.ndarray, clusters: Clusters, most: int, doubles: bool = False
) -> np.ndarray:
    """Pointers, followed by the members of their clusters, the clusters with the most pointers
    first.

    Args:
        pointers: int64 `[W, m]`.
        most: largest number of rows of a walk.
        doubles: whether a pointer is repeated among the members.

    Returns:
        int64 `[W, n]`, n at most `most`.
    """
    count = len(pointers)
    walks, columns = np.nonzero(pointers >= 0)
    if len(walks) == 0:
        return pointers[:, :0]
    rows = pointers[walks, columns]
    states, votes = np.unique(walks * clusters.count + clusters.labels[rows], return_counts=True)
    order = np.lexsort((states, -votes, states // clusters.count))
    of_walk, cluster = np.divmod(states[order], clusters.count)
    sizes = np.diff(clusters.bounds)[cluster]
    # Gathers no more members for a walk than it may have.
    before = np.cumsum(sizes) - sizes
    first = np.searchsorted(of_walk, np.arange(count))
    within = before - before[np.minimum(first, len(before) - 1)][of_walk]
    sizes = np.clip(most - within, 0, sizes)
    places = np.arange(sizes.sum()) + np.repeat(
        clusters.bounds[cluster] - (np.cumsum(sizes) - sizes), sizes
    )
    members, of_members = clusters.members[places], np.repeat(of_walk, sizes)
    if not doubles:
        n = len(clusters.labels)
        new = ~are_among(of_members * n + members, np.sort(walks * n + rows))
        members, of_members = members[new], of_members[new]
    all_walks = np.concatenate([walks, of_members])
    order = np.argsort(all_walks, kind="stable")
    return table_of(all_walks[order], np.concatenate([rows, members])[order], count)[:, :most]
