"""The graphs of tokens and neighbours, against loops over every token and neighbour."""

import numpy as np
import pytest
import torch

from neighborlm.datamodules.graphs import (
    INTER,
    INTRA_NEIGHBOR,
    INTRA_TOKEN,
    NeighborMemory,
    hetero_graph,
    leaking,
    plan_chains,
)


def edges(graph, kind) -> set[tuple[int, int]]:
    return set(map(tuple, graph[kind].edge_index.T.tolist()))


@pytest.mark.parametrize(("left", "right"), [(2, 2), (0, 1), (3, 0)])
@pytest.mark.parametrize("intra_context", [None, 2, 0])
def test_graph_as_drawn(left, right, intra_context):
    n_rows = 9
    neighbors = np.array([[0, 8, 8], [-1, 4, 1], [-1, -1, -1], [2, 3, 2]])
    graph = hetero_graph(neighbors, n_rows, left, right, intra_context)
    rows, inter, chains = [], set(), set()
    for token, row_of in enumerate(neighbors):
        for centre in row_of[row_of >= 0]:
            order = [centre, *range(centre - left, centre), *range(centre + 1, centre + right + 1)]
            chain = [row for row in order if 0 <= row < n_rows]
            number = {row: len(rows) + i for i, row in enumerate(chain)}
            inter.add((number[centre], token))
            for row, node in number.items():
                chains.add((node, node))
                if row + 1 in number:
                    chains |= {(node, number[row + 1]), (number[row + 1], node)}
            rows += chain
    assert graph["neighbor"].row.tolist() == rows
    assert edges(graph, INTER) == inter
    assert edges(graph, INTRA_NEIGHBOR) == chains
    if intra_context == 0:
        assert INTRA_TOKEN not in graph.edge_types
    else:
        near = intra_context or 99
        assert edges(graph, INTRA_TOKEN) == {
            (j, i) for i in range(4) for j in range(i + 1) if i - j < near
        }
    graph.validate()


def test_states_are_shared_where_chains_go_on_long_enough():
    centres = np.array([10, 11, 12, 30])
    rows, chains, own, _ = plan_chains(centres, 100, 2, 2, updates=2)
    assert rows.tolist() == [*range(8, 15), *range(28, 33)]
    assert [len(chain) for chain in chains] == [8, 4]  # rows 9 to 13 and 29 to 31; the centres
    assert own[2].tolist() == [0, 1, 2, 3]
    # Cut after one token on either side, rows 11 and 12 end some chains and are inside others.
    assert [len(chain) for chain in plan_chains(centres, 100, 1, 1, updates=2)[1]] == [12, 4]


def test_nothing_to_plan_without_neighbors():
    memory = NeighborMemory(np.full((4, 3), -1, np.int16), np.ones((9, 2), np.float16), 1, 1, 3)
    hood = memory.neighborhood(np.arange(4)[None])
    assert (hood.neighbors == -1).all()
    assert hood.features.shape == (0, 2)
    assert [len(chain) for chain in hood.chains] == [0, 0]


def test_neighborhood_points_at_the_rows_of_the_table():
    rng = np.random.default_rng(0)
    table = rng.integers(-1, 40, (20, 6)).astype(np.int16)
    values = np.arange(40, dtype=np.uint8)
    memory = NeighborMemory(table, values, 2, 2, 3)
    positions = np.array([[3, 4, 5, 6], [17, 18, -1, -1]])
    hood = memory.neighborhood(positions)
    centres = hood.rows[hood.centres[0]]
    found = torch.where(hood.neighbors < 0, -1, centres[hood.neighbors.clamp(min=0)]).numpy()
    assert (found == np.where(positions[..., None] < 0, -1, table[positions])).all()
    assert hood.features.dtype == torch.int64
    assert torch.equal(hood.features, hood.rows)
    for s in (1, 2):  # a centre's state s is made from its state s - 1
        assert torch.equal(hood.chains[s - 1][hood.centres[s], 1], hood.centres[s - 1])


def test_leaking_neighbors_are_those_near_the_token_or_a_later_one():
    positions = np.array([[10, 11, 12, 13], [50, 51, -1, -1]])
    rows = np.arange(60)
    neighbors = np.broadcast_to(rows, (2, 4, 60))
    found = leaking(neighbors, positions, 4)
    for block, last in ((0, 13), (1, 51)):
        for place in range(4):
            token = positions[block, place]
            if token < 0:
                continue
            near = [any(abs(r - j) < 4 for j in range(token, last + 1)) for r in rows]
            assert found[block, place].tolist() == near


def test_stored_features_of_tokens():
    features = np.arange(12, dtype=np.float16).reshape(6, 2)
    memory = NeighborMemory(np.zeros((6, 1), np.int8), features, 0, 0, 1, None, features)
    found = memory.features_of(np.array([[4, -1]]))
    assert found.tolist() == [[[8, 9], [0, 0]]]
    assert found.dtype == torch.float32
