"""Pointers into a datastore, of many walks at a time (RetoMaton; Alon et al., ICML 2022): which
entries go on after a token, and which other entries belong to the same states.

W walks have a table `[W, m]` of rows of the datastore, -1 where there is none. No table is larger
than its longest walk needs.
"""

from typing import NamedTuple

import numpy as np

from neighborlm.retrieval.search.clusters import Clusters


class Stretches(NamedTuple):
    """Tokens that follow one another in the text, by stretches, the longest stretch first.

    Attributes:
        order: int64 `[n]`, numbers of the tokens, stretch by stretch.
        starts: int64 `[S]`, where each stretch begins in it.
        lengths: int64 `[S]`.
    """

    order: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, positions: np.ndarray, walk_length: int) -> "Stretches":
        """Of tokens at positions int64 `[n]` in any order: a stretch ends before a gap and at every
        multiple of `walk_length`.

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
        """How many there are; they are the first ones."""
        return int(np.searchsorted(-self.lengths, -length))


def table_of(walks: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Rows by walks, -1 after the last of each.

    Args:
        walks: int64 `[n]`, ascending.
        rows: int64 `[n]`.
        count: of the walks.

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
        goes_on: bool `[W, n]`, where there is an entry and its value is the token.
        ends: int64, ascending rows that nothing goes on from; at least one.

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
    """Whether each row is one of some, of which there is at least one."""
    places = np.searchsorted(ascending, rows)
    return ascending[np.minimum(places, len(ascending) - 1)] == rows


def without_doubles(pointers: np.ndarray, neighbors: np.ndarray, rows: int) -> np.ndarray:
    """Pointers int64 `[W, m]`, -1 in place of those that are among the neighbours int64 `[W, k]` of
    the same walk.

    Args:
        rows: of the datastore.
    """
    walks, columns = np.nonzero(pointers >= 0)
    if len(walks) == 0:
        return pointers
    ours = pointers[walks, columns] + walks * rows
    of_walks = np.arange(len(pointers))[:, None] * rows
    theirs = np.where(neighbors < 0, -1, neighbors + of_walks).ravel()
    doubles = np.sort(theirs[are_among(theirs, np.sort(ours))])  # few, and sorted sooner than all
    left = pointers.copy()
    if len(doubles):
        double = are_among(ours, doubles)
        left[walks[double], columns[double]] = -1
    return left


def count_states(pointers: np.ndarray, clusters: Clusters) -> np.ndarray:
    """How many clusters are pointed to, int64 `[W]`."""
    walks, columns = np.nonzero(pointers >= 0)
    states = walks * clusters.count + clusters.labels[pointers[walks, columns]]
    return np.bincount(np.unique(states) // clusters.count, minlength=len(pointers))


def with_members(
    pointers: np.ndarray, clusters: Clusters, most: int, doubles: bool = False
) -> np.ndarray:
    """Pointers, and after them the members of their clusters, those of the clusters that most of
    them point to first.

    Args:
        pointers: int64 `[W, m]`.
        most: rows that a walk may have.
        doubles: whether a pointer stands among the members too.

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
    # Of no walk are more gathered than it may have.
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
