"""The fast computation of the graph network equals message passing over the explicit graph, which
equals the formulas, evaluated node by node."""

import copy
import math

import numpy as np
import pytest
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch.nn import functional as F

from neighborlm.datamodules.graphs import (
    INTER,
    INTRA_NEIGHBOR,
    INTRA_TOKEN,
    NeighborMemory,
    hetero_graph,
)
from neighborlm.models import hgt
from neighborlm.models.hgt import HGT, HGTLayer
from neighborlm.models.neighbor_states import NeighborStates

ROWS, WIDTH = 60, 8


def random_neighbors(tokens: int, k: int, seed: int) -> np.ndarray:
    """Rows with duplicates, both ends of the datastore, missing ones and a token without any."""
    rng = np.random.default_rng(seed)
    neighbors = rng.integers(0, ROWS, (tokens, k))
    neighbors[0, :3] = 0, 1, ROWS - 1
    neighbors[1, 1] = neighbors[1, 0]
    neighbors[2:, 1:][rng.random((tokens - 2, k - 1)) < 0.3] = -1
    neighbors[3] = -1
    return neighbors


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize(("left", "right"), [(2, 2), (1, 1), (0, 2), (3, 1), (0, 0)])
def test_fast_equals_message_passing(layers, left, right):
    check_equal(layers, left, right, intra_context=None, width=WIDTH)


@pytest.mark.parametrize("intra_context", [0, 1, 3])
@pytest.mark.parametrize("width", [WIDTH, 12])
def test_fast_equals_message_passing_for_every_option(intra_context, width, device):
    check_equal(3, 2, 2, intra_context, width, device)


def test_gathering_in_parts_changes_nothing(monkeypatch):
    monkeypatch.setattr(hgt, "GATHERED_AT_ONCE", 3 * 5 * WIDTH)
    monkeypatch.setattr(hgt, "QUERIES_AT_ONCE", 3 * WIDTH)
    check_equal(3, 2, 2, None, WIDTH)


def check_equal(layers, left, right, intra_context, width, device="cpu"):
    """Messages are passed on the CPU, what is fast is computed on a device."""
    torch.manual_seed(layers)
    network = HGT(WIDTH, width, layers, heads=2).double()
    for parameter in network.parameters():  # priors other than one, norms other than the identity
        torch.nn.init.normal_(parameter, std=0.5)
    features = np.random.default_rng(0).standard_normal((ROWS, WIDTH))
    tokens = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    blocks = np.stack([random_neighbors(7, 5, seed) for seed in (0, 1)])
    blocks[1, 5:] = -1  # a shorter row, padded
    memory = NeighborMemory(blocks.reshape(14, 5), features, left, right, layers)
    hood = memory.neighborhood(np.arange(14).reshape(2, 7))

    by_messages = []
    for x, neighbors in zip(tokens, blocks, strict=True):
        graph = hetero_graph(neighbors, ROWS, left, right, intra_context)
        nodes = {"token": x, "neighbor": torch.from_numpy(features)[graph["neighbor"].row]}
        by_messages.append(network(nodes, graph.edge_index_dict)[-1]["token"])
    expected = torch.stack(by_messages)
    weights = torch.randn_like(expected)
    parameters = [p for p in network.parameters() if p.requires_grad]
    wanted = torch.autograd.grad((weights * expected).sum(), parameters, allow_unused=True)

    there = copy.deepcopy(network).to(device)
    tokens, hood, weights = move_data_to_device((tokens, hood, weights), device)
    found = there.fast(tokens, hood.features, hood, intra_context)
    torch.testing.assert_close(found.cpu(), expected)
    if device == "standin":  # autograd has threads for the devices of before its first use alone
        return
    parameters = [p for p in there.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((weights * found).sum(), parameters, allow_unused=True)
    for one, other in zip(gradients, wanted, strict=True):
        zero = torch.zeros(())
        one, other = (zero if g is None else g.cpu() for g in (one, other))
        torch.testing.assert_close(one, other.expand_as(one) if other.ndim == 0 else other)


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("slots", [2, 1 << 20])
def test_states_of_earlier_batches_serve_later_ones(monkeypatch, layers, slots):
    torch.manual_seed(0)
    network = HGT(WIDTH, 2 * WIDTH, layers, heads=2).double().eval()
    features = np.random.default_rng(0).standard_normal((ROWS, WIDTH))
    table = random_neighbors(60, 4, 3)
    memory = NeighborMemory(table, features, 2, 1, layers)
    computed = NeighborStates(
        max(layers - 1, 1), max_bytes=slots * 8 * 2 * WIDTH * max(layers - 1, 1)
    )
    read = []

    def rows_of(numbers):
        read.append(len(hood.features[numbers]))
        return hood.features[numbers]

    with torch.no_grad():
        for first in range(0, 60, 12):
            hood = memory.neighborhood(np.arange(first, first + 12).reshape(2, 6))
            x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
            found = network.fast(x, rows_of, hood, computed=computed)
            torch.testing.assert_close(found, network.fast(x, hood.features, hood))
    if layers > 1 and slots > 2:
        assert read[-1] < len(hood.features)  # not all were needed again
        centres = hood.identities[-1][hood.centres[-1]]
        assert computed.find(layers - 1, centres)[0].all()


def test_layer_is_the_formula():
    """One token and one neighbour, node by node and head by head."""
    torch.manual_seed(0)
    layer = HGTLayer(WIDTH, 2, 0.0, 0.0).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    neighbors = np.array([[4, 7], [-1, 9]])
    graph = hetero_graph(neighbors, 10, 1, 1)
    x = {"token": torch.randn(2, WIDTH), "neighbor": torch.randn(len(graph["neighbor"].row), WIDTH)}
    found = layer(x, graph.edge_index_dict)
    edges = {
        "token": [(INTRA_TOKEN, "token", "intra"), (INTER, "neighbor", "inter")],
        "neighbor": [(INTRA_NEIGHBOR, "neighbor", "intra")],
    }
    for node_type, kinds in edges.items():
        for node, h in enumerate(x[node_type]):
            means = []
            for edge_type, source_type, relation in kinds:
                pairs = graph[edge_type].edge_index.T.tolist()
                sources = [source for source, target in pairs if target == node]
                means.append(one_message(layer, h, node_type, x[source_type][sources], relation))
            message = layer.output[node_type](torch.stack(means).mean(0))
            expected = layer.norm[node_type](h + message)
            torch.testing.assert_close(found[node_type][node], expected)


def one_message(layer, h, node_type, sources, relation):
    source_type = "token" if relation == "intra" and node_type == "token" else "neighbor"
    part = WIDTH // layer.heads
    heads = []
    for head in range(layer.heads):
        at = slice(head * part, (head + 1) * part)
        q = layer.query[node_type](h)[at]
        k = layer.key[source_type](sources)[:, at] @ layer.attention[relation][head]
        v = layer.value[source_type](sources)[:, at] @ layer.message[relation][head]
        scores = k @ q * layer.prior[relation][head] / math.sqrt(part)
        heads.append(scores.softmax(0) @ v)
    return torch.cat(heads)


def test_chain_attention_has_the_gradient_of_its_formula():
    torch.manual_seed(0)
    q = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    both = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    chain = torch.tensor([[-1, 0, 1], [0, 1, 2], [1, 2, -1], [-1, 5, -1], [5, 6, 0]])
    kept = F.dropout(torch.ones(5, 3, 2, dtype=torch.float64), 0.3)
    assert torch.autograd.gradcheck(
        lambda q, both: hgt.ChainAttention.apply(q, both, chain, kept), (q, both)
    )


def test_dropout_only_in_training():
    torch.manual_seed(0)
    network = HGT(WIDTH, WIDTH, 2, heads=2, dropout=0.5, attention_dropout=0.5)
    memory = NeighborMemory(random_neighbors(6, 4, 0), np.ones((ROWS, WIDTH), np.float32), 1, 1, 2)
    hood = memory.neighborhood(np.arange(6)[None])
    x = torch.randn(1, 6, WIDTH)
    assert not torch.equal(*(network.fast(x, hood.features, hood) for _ in range(2)))
    network.eval()
    assert torch.equal(*(network.fast(x, hood.features, hood) for _ in range(2)))


def test_no_neighbors_at_all():
    network = HGT(WIDTH, WIDTH, 3, heads=2)
    memory = NeighborMemory(np.full((4, 3), -1), np.ones((9, WIDTH), np.float32), 1, 1, 3)
    hood = memory.neighborhood(np.arange(4)[None])
    x = torch.randn(1, 4, WIDTH)
    graph = hetero_graph(np.full((4, 3), -1), 9, 1, 1)
    nodes = {"token": x[0], "neighbor": torch.empty(0, WIDTH)}
    expected = network(nodes, graph.edge_index_dict)[-1]["token"]
    torch.testing.assert_close(network.fast(x, hood.features, hood)[0], expected)
