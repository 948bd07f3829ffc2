"""Graphs of tokens, their retrieved neighbours and the context of these (Meng et al., ICLR 2022,
section 2.2).

Two forms of the same graph: `hetero_graph` gives it node by node as torch-geometric's `HeteroData`,
to inspect or change it; `Neighborhood` holds what the network's fast computation needs, each
distinct neighbour once and nothing that cannot reach a token.
"""

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch_geometric.data import HeteroData

INTRA_TOKEN = ("token", "intra", "token")
INTER = ("neighbor", "inter", "token")
INTRA_NEIGHBOR = ("neighbor", "intra", "neighbor")

STORE_NUMBERS = itertools.count()
"""Numbers feature stores in the order in which they are made."""


def hetero_graph(
    neighbors: np.ndarray,
    n_rows: int,
    left_context: int,
    right_context: int,
    intra_context: int | None = None,
) -> "HeteroData":
    """The graph of one block as the paper draws it, in which duplicates are nodes of their own.

    Nodes `token`: one per token, in order. Nodes `neighbor`: for each neighbour of each token the
    neighbour itself, its left context and its right context, both ascending and cut at the ends of
    the datastore; `row` is the datastore row, `offset` its offset from the neighbour. Edges: from a
    token to itself and later ones; from a neighbour, but not from its context, to its token; along
    each chain in both directions, and from each of its nodes to itself.

    Args:
        neighbors: int64 `[T, k]`, datastore rows, -1 where missing.
        n_rows: number of rows of the datastore.
        left_context: tokens before each neighbour.
        right_context: tokens after each neighbour.
        intra_context: how many tokens a token attends to, itself included; None for itself and all
            before it, 0 for none.
    """
    from torch_geometric.data import HeteroData  # takes seconds to load; no program asks for it

    tokens, ranks = np.nonzero(neighbors >= 0)
    centres = neighbors[tokens, ranks]
    offsets = np.array([0, *range(-left_context, 0), *range(1, right_context + 1)])
    rows = centres[:, None] + offsets
    inside = (rows >= 0) & (rows < n_rows)
    node = np.cumsum(inside).reshape(inside.shape) - 1  # number of the node, where there is one

    in_order = np.argsort(offsets)
    chain, exists = node[:, in_order], inside[:, in_order]
    both = exists[:, :-1] & exists[:, 1:]
    forward = np.stack([chain[:, :-1][both], chain[:, 1:][both]])
    self_loops = np.repeat(node[inside][None], 2, axis=0)

    n_tokens = len(neighbors)
    later, earlier = np.tril_indices(n_tokens)
    if intra_context is not None:
        near = later - earlier < intra_context
        later, earlier = later[near], earlier[near]

    graph = HeteroData()
    graph["token"].num_nodes = n_tokens
    graph["neighbor"].num_nodes = int(inside.sum())
    graph["neighbor"].row = torch.from_numpy(rows[inside])
    graph["neighbor"].offset = torch.from_numpy(np.broadcast_to(offsets, rows.shape)[inside])
    if len(later):
        graph[INTRA_TOKEN].edge_index = torch.from_numpy(np.stack([earlier, later]))
    graph[INTER].edge_index = torch.from_numpy(np.stack([node[:, 0], tokens]))
    edges = np.concatenate([self_loops, forward, forward[::-1]], axis=1)
    graph[INTRA_NEIGHBOR].edge_index = torch.from_numpy(edges)
    return graph


class Neighborhood(NamedTuple):
    """The neighbours of a batch, with each distinct state of a neighbour once.

    No edge leads from a token to a neighbour, so a neighbour's states depend on the datastore
    alone; and the state that reaches a token has been updated at most `layers - 1` times, so that
    nothing farther along the chain matters. State s of a row is its state after s updates; `C` is
    the number of distinct neighbours, `n_s` the number of distinct states s.

    Attributes:
        neighbors: int64 `[B, T, k]`, numbers of distinct neighbours, -1 where missing.
        rows: int64 `[n_0]`, datastore rows of states 0, ascending.
        features: `[n_0, …]`, their rows of the feature store.
        values: int64 `[n_0]`, their tokens, for a network that reads these too.
        chains: for s = 1 .. layers - 1 int64 `[n_s, 3]`: the states s - 1 of the row to the left,
            of the row itself and of the row to the right, -1 at the ends of the chain.
        centres: for s = 0 .. layers - 1 int64 `[C]`, the state s of each distinct neighbour.
        identities: for s = 1 .. layers - 1 int64 `[n_s]`, numbers that identify a state s of this
            feature store across batches.
        store: number that identifies the feature store within this process.
    """

    neighbors: Tensor
    rows: Tensor
    features: Tensor
    chains: list[Tensor]
    centres: list[Tensor]
    identities: list[Tensor]
    store: int
    values: Tensor | None = None


def plan_chains(
    centres: np.ndarray, n_rows: int, left_context: int, right_context: int, updates: int
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Plans which states to compute so that every centre is updated `updates` times.

    A state after s updates depends on its row and on how far its chain extends to either side, up
    to s steps; so chains share the states of rows that are far enough from their ends.

    Args:
        centres: int64 `[C]`, distinct ascending datastore rows.
        n_rows: number of rows of the datastore.
        left_context: tokens before each centre.
        right_context: tokens after each centre.
        updates: how often each centre is updated: one less than the layers of the network.

    Returns:
        `rows`, `chains`, `centres` and `identities` of a `Neighborhood`.
    """
    base = updates + 1

    def code(row: np.ndarray, left: np.ndarray, right: np.ndarray, s: int) -> np.ndarray:
        return (row * base + np.minimum(left, s)) * base + np.minimum(right, s)

    states = code(
        centres,
        np.minimum(left_context, centres),
        np.minimum(right_context, n_rows - 1 - centres),
        updates,
    )
    chains: list[np.ndarray] = []
    own = [np.arange(len(centres))]
    identities: list[np.ndarray] = []
    for s in range(updates, 0, -1):
        rest, right = np.divmod(states, base)
        row, left = np.divmod(rest, base)
        wanted = np.stack(
            [
                np.where(left > 0, code(row - 1, left - 1, right + 1, s - 1), -1),
                code(row, left, right, s - 1),
                np.where(right > 0, code(row + 1, left + 1, right - 1, s - 1), -1),
            ],
            axis=1,
        )
        found, index = np.unique(wanted, return_inverse=True)
        index = index.reshape(wanted.shape)
        if len(found) and found[0] < 0:
            found, index = found[1:], index - 1
        chains.insert(0, index)
        identities.insert(0, states)
        own.insert(0, index[own[0], 1])
        states = found
    return states // (base * base), chains, own, identities


def leaking(neighbors: np.ndarray, positions: np.ndarray, window: int) -> np.ndarray:
    """Which neighbours could reveal to a token of the block what it must predict.

    For blocks of the split that the datastore holds. A neighbour of token i reaches i and all later
    tokens of the block, so that it must keep its distance from all of them, not from i alone.

    Args:
        neighbors: int64 `[B, T, k]`, datastore rows.
        positions: int64 `[B, T]`, rows of the tokens themselves, -1 where padded.
        window: a neighbour leaks if it is nearer than this many rows to any token from i on.

    Returns:
        bool `[B, T, k]`.
    """
    first = positions[:, :, None] - window
    last = positions.max(axis=1)[:, None, None] + window
    return (neighbors > first) & (neighbors < last)


class NeighborMemory:
    """Gives batches their neighbours, from the neighbour table of a split and the features of the
    datastore that it points into. All arrays may be memory-mapped.

    Args:
        table: integers `[N, k]`, datastore rows for each token of the split, -1 where missing.
        features: `[rows, …]` of the datastore: codes uint8, keys, or values.
        left_context: tokens before each neighbour.
        right_context: tokens after each neighbour.
        layers: number of layers of the graph network.
        leak_window: see `leaking`; None where the datastore holds another split.
        token_features: `[N, d]`, features of the split's own tokens; None where the model
            computes them.
        values: `[rows]`, tokens of the datastore, for a network that reads these too.
    """

    def __init__(
        self,
        table: np.ndarray,
        features: np.ndarray,
        left_context: int,
        right_context: int,
        layers: int,
        leak_window: int | None = None,
        token_features: np.ndarray | None = None,
        values: np.ndarray | None = None,
    ) -> None:
        self.table = table
        self.features = features
        self.left_context = left_context
        self.right_context = right_context
        self.layers = layers
        self.leak_window = leak_window
        self.token_features = token_features
        self.values = values
        self.number = next(STORE_NUMBERS)

    def neighborhood(self, positions: np.ndarray) -> Neighborhood:
        """The neighbours of tokens int64 `[B, T]`, -1 where padded."""
        neighbors = self.table[positions].astype(np.int64)
        neighbors[positions < 0] = -1
        if self.leak_window is not None:
            neighbors[leaking(neighbors, positions, self.leak_window)] = -1
        centres, numbers = np.unique(neighbors, return_inverse=True)
        numbers = numbers.reshape(neighbors.shape)
        if len(centres) and centres[0] < 0:
            centres, numbers = centres[1:], numbers - 1
        rows, chains, own, identities = plan_chains(
            centres, len(self.features), self.left_context, self.right_context, self.layers - 1
        )
        features = self.features[rows]
        if features.dtype.kind in "ui" and features.ndim == 1:
            features = features.astype(np.int64)  # values: torch indexes with nothing smaller
        return Neighborhood(
            torch.from_numpy(numbers),
            torch.from_numpy(rows),
            torch.from_numpy(features),
            [torch.from_numpy(chain) for chain in chains],
            [torch.from_numpy(index) for index in own],
            [torch.from_numpy(states) for states in identities],
            self.number,
            None if self.values is None else torch.from_numpy(self.values[rows].astype(np.int64)),
        )

    def features_of(self, positions: np.ndarray) -> Tensor | None:
        """Stored features fp32 `[B, T, d]` of tokens int64 `[B, T]`, zero where padded; None if
        none are stored."""
        if self.token_features is None:
            return None
        features = self.token_features[positions].astype(np.float32)
        features[positions < 0] = 0
        return torch.from_numpy(features)
