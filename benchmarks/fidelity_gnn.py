"""Recomputes reference outputs of the original GNN-LM, by message passing and by the fast way.

A fixture directory holds `config.json`, `world.npz` (datastore, neighbours, features), the
network's weights `hgt_state_dict.npz` with what it gave for some blocks in `hgt_block<b>.npz`, and
a decoder's weights `decoder_state_dict.npz` with `decoder_outputs.npz` and
`decoder_grads_block<b>.npz`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.graphs import (
    INTER,
    INTRA_NEIGHBOR,
    INTRA_TOKEN,
    Neighborhood,
    NeighborMemory,
    hetero_graph,
)
from models.adaptive import AdaptiveSoftmax, OutputSoftmax, PlainSoftmax
from models.features import CodeDecoder
from models.gnn_lm import mix
from models.hgt import HGT, NODE_TYPES, RELATIONS

THEIRS = {"token": "tgt", "neighbor": "ntgt"}
EDGES = {
    INTRA_TOKEN: "edge_tgt_intra_tgt",
    INTER: "edge_ntgt_inter_tgt",
    INTRA_NEIGHBOR: "edge_ntgt_intra_ntgt",
}
Arrays = Mapping[str, np.ndarray]


@dataclass
class World:
    """What all blocks of a fixture share.

    Attributes:
        config: its config.json.
        arrays: its world.npz.
        features: fp32 `[N, D]`, decoded by us from the codes.
    """

    config: dict
    arrays: Arrays
    features: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "World":
        """Opens a fixture directory."""
        config = json.loads((folder / "config.json").read_text())
        arrays = np.load(folder / "world.npz")
        names = {"centroids": "pq_centroids", "A": "pq_A", "b": "pq_b"}
        found = {ours: arrays[name] for ours, name in names.items() if name in arrays.files}
        decoder = CodeDecoder(found)
        codes = torch.from_numpy(arrays["datastore_codes"])
        return cls(config, arrays, decoder(codes).numpy())

    def neighbors(self, offsets: np.ndarray) -> np.ndarray:
        """Neighbours of tokens, int64 `[n, k]`, as the original masks them on the training
        split: each against its own token alone."""
        neighbors = self.arrays["neighbors_raw"][offsets][:, : self.config["k"]].astype(np.int64)
        window = self.config.get("invalid") or 0
        if self.config["split"] == "train" and window:
            near = np.abs(neighbors - offsets[:, None]) < window
            neighbors = np.where(near, -1, neighbors)
        return neighbors

    def memory(self, offsets: np.ndarray, layers: int) -> tuple[NeighborMemory, np.ndarray]:
        """What gives the fast computation its neighbours, and the positions to ask it for."""
        left, right = self.config["ctx"]
        memory = NeighborMemory(self.neighbors(offsets), self.features, left, right, layers)
        return memory, np.arange(len(offsets))

    def token_features(self, offsets: np.ndarray) -> Tensor:
        """fp32 `[n, D]`."""
        return torch.from_numpy(self.arrays["split_feats_fp16"][offsets].astype(np.float32))


def our_network(theirs: Arrays, prefix: str, heads: int) -> HGT:
    """An `HGT` with the original's weights."""
    theirs = {
        name[len(prefix) :]: torch.from_numpy(theirs[name])
        for name in theirs
        if name.startswith(prefix)
    }
    layers = 1 + max(int(found[1]) for name in theirs if (found := re.match(r"gcs\.(\d+)", name)))
    width = len(theirs["gcs.0.norms.0.weight"])
    input_width = theirs.get("adapt_ws.0.weight", torch.empty(width, width)).shape[1]
    network = HGT(input_width, width, layers, heads).eval()
    state = {}
    for i in range(layers):
        for t, node_type in enumerate(NODE_TYPES):
            for one, ours in (("k", "key"), ("q", "query"), ("v", "value"), ("a", "output")):
                for part in ("weight", "bias"):
                    name = f"gcs.{i}.{one}_linears.{t}.{part}"
                    state[f"layers.{i}.{ours}.{node_type}.{part}"] = theirs[name]
            del state[f"layers.{i}.key.{node_type}.bias"]  # the same for all scores of a softmax
            for part in ("weight", "bias"):
                state[f"layers.{i}.norm.{node_type}.{part}"] = theirs[f"gcs.{i}.norms.{t}.{part}"]
        for e, relation in enumerate(RELATIONS):
            for one, ours in (("pri", "prior"), ("att", "attention"), ("msg", "message")):
                state[f"layers.{i}.{ours}.{relation}"] = theirs[f"gcs.{i}.relation_{one}"][e]
    for t, node_type in enumerate(NODE_TYPES):
        for part in ("weight", "bias"):
            if f"adapt_ws.{t}.{part}" in theirs:
                state[f"adapt.{node_type}.{part}"] = theirs[f"adapt_ws.{t}.{part}"]
                state[f"out.{part}"] = theirs[f"out.{part}"]
    network.load_state_dict(state)
    return network


def their_gradients(network: HGT) -> dict[str, Tensor]:
    """The network's gradients under the original's names, without those of the keys' biases."""
    found: dict[str, Tensor] = {}
    gradients = {
        name: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in network.named_parameters()
    }
    for name, gradient in gradients.items():
        match name.split("."):
            case ["layers", i, ("key" | "query" | "value" | "output") as kind, node_type, part]:
                letter = {"key": "k", "query": "q", "value": "v", "output": "a"}[kind]
                found[f"gcs.{i}.{letter}_linears.{NODE_TYPES.index(node_type)}.{part}"] = gradient
            case ["layers", i, "norm", node_type, part]:
                found[f"gcs.{i}.norms.{NODE_TYPES.index(node_type)}.{part}"] = gradient
            case ["adapt", node_type, part]:
                found[f"adapt_ws.{NODE_TYPES.index(node_type)}.{part}"] = gradient
            case ["out", part]:
                found[f"out.{part}"] = gradient
    for i in range(len(network.layers)):
        for one, ours in (("pri", "prior"), ("att", "attention"), ("msg", "message")):
            both = [gradients[f"layers.{i}.{ours}.{relation}"] for relation in RELATIONS]
            found[f"gcs.{i}.relation_{one}"] = torch.stack(both)
    return found


def our_softmax(theirs: Arrays, config: dict) -> OutputSoftmax:
    """The output softmax of a decoder's state dict."""
    theirs = {name: torch.from_numpy(theirs[name]) for name in theirs}
    name = "decoder.adaptive_softmax"
    if not any(key.startswith(name) for key in theirs):
        own = "decoder.embed_out" in theirs
        weight = theirs["decoder.embed_out" if own else "decoder.embed_tokens.weight"]
        softmax = PlainSoftmax(*weight.shape, tied=torch.nn.Parameter(weight))
        if "decoder.xl_bias" in theirs:
            softmax.add_bias()
            softmax.bias.data.copy_(theirs["decoder.xl_bias"])
        return softmax.eval()
    cutoffs = [int(cutoff) for cutoff in config["cut"].split(",")]
    tied = f"{name}.head.word_proj.weight" in theirs
    head = theirs[f"{name}.head.word_proj.weight" if tied else f"{name}.head.weight"]
    width, vocab_size = head.shape[1], config["V"]
    tails = [theirs[f"{name}.tail.{i}.2.weight"] for i in range(len(cutoffs))]
    factor = width / tails[0].shape[1] if tails else 1.0
    softmax = AdaptiveSoftmax(vocab_size, width, cutoffs, factor).eval()
    words = softmax.edges[1]
    softmax.words[0].data.copy_(head[:words])
    classes = theirs[f"{name}.head.class_proj.weight"] if tied else head[words:]
    softmax.classes.data.copy_(classes)
    for i, tail in enumerate(tails):
        softmax.words[i + 1].data.copy_(tail)
        down = theirs[f"{name}.tail.{i}.0.weight"]
        # A tied projection is that of the input, [width, narrow] already.
        softmax.down[i].data.copy_(down if tuple(down.shape) == (width, tail.shape[1]) else down.T)
    return softmax


def difference(ours: Tensor | np.ndarray, theirs: np.ndarray) -> float:
    """The largest absolute difference; infinite for other shapes."""
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else ours
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - theirs).max()) if theirs.size else 0.0


def by_messages(
    network: HGT, world: World, offsets: np.ndarray, x: Tensor, intra: int | None
) -> list[dict[str, Tensor]]:
    """States of both node types after each layer, for one block."""
    graph = hetero_graph(
        world.neighbors(offsets), len(world.features), *world.config["ctx"], intra_context=intra
    )
    neighbors = torch.from_numpy(world.features)[graph["neighbor"].row]
    return network({"token": x, "neighbor": neighbors}, graph.edge_index_dict)


def by_fast(
    network: HGT, world: World, offsets: np.ndarray, x: Tensor, intra: int | None
) -> Tensor:
    """Outputs of the tokens of one block `[n, D]`."""
    memory, positions = world.memory(offsets, len(network.layers))
    hood: Neighborhood = memory.neighborhood(positions[None])
    return network.fast(x[None], hood.features, hood, intra)[0]


def intra_context(block: Arrays) -> int | None:
    """How far back tokens of a block attend, read off its edges; None for all before them."""
    sources, targets = block["edge_tgt_intra_tgt"].astype(np.int64)
    reach = int((targets - sources).max(initial=-1)) + 1
    return None if reach == len(block["tgt_offsets"]) else reach


def compare_block(network: HGT, world: World, block: Arrays) -> dict[str, float]:
    """Largest differences of the graph and of every array of one `hgt_block<b>.npz`."""
    offsets, intra = block["tgt_offsets"], intra_context(block)
    neighbors = world.neighbors(offsets)
    graph = hetero_graph(neighbors, len(world.features), *world.config["ctx"], intra_context=intra)
    found = {"neighbors": difference(neighbors, block["neighbors_masked"])}
    found["graph: nodes"] = difference(graph["neighbor"].row.numpy(), block["ntgt_offset"])
    for kind, name in EDGES.items():
        ours = graph[kind].edge_index.numpy() if kind in graph.edge_types else np.empty((2, 0))
        ours, theirs = (np.unique(edges, axis=1) for edges in (ours, block[name]))
        found[f"graph: {' '.join(kind)}"] = difference(ours, theirs)
    x = world.token_features(offsets)
    found["features of tokens"] = difference(x, block["feat_tgt"])
    rows = graph["neighbor"].row.numpy()
    found["features of neighbours"] = difference(world.features[rows], block["feat_ntgt"])
    states = by_messages(network, world, offsets, x, intra)
    names = ["adapt", *(f"layer{i}" for i in range(len(network.layers))), "out"]
    for name, state in zip(names, states, strict=True):
        for node_type, theirs in THEIRS.items():
            if f"{name}_{theirs}" in block:
                found[f"messages: {name} {node_type}"] = difference(
                    state[node_type], block[f"{name}_{theirs}"]
                )
    fast = by_fast(network, world, offsets, x, intra)
    found["fast: out token"] = difference(fast, block["out_tgt"])
    return found


def compare_decoder(folder: Path, world: World) -> dict[str, dict[str, float]]:
    """Largest differences of log-probabilities and gradients, by block and computation."""
    weights, outputs = (
        np.load(folder / name) for name in ("decoder_state_dict.npz", "decoder_outputs.npz")
    )
    heads = world.config.get("heads_dec", world.config["heads"])
    network = our_network(weights, "decoder.hgt_decoder.", heads)
    softmax = our_softmax(weights, world.config)
    rows: dict[str, dict[str, float]] = {}
    for b in world.config["blocks"]:
        block = np.load(folder / f"hgt_block{b}.npz")
        offsets, intra = block["tgt_offsets"], intra_context(block)
        start = int(np.ravel(block["loss_start"])[0])
        targets = torch.from_numpy(block["target"][start:].astype(np.int64))
        x = world.token_features(offsets)
        gradients_file = folder / f"decoder_grads_block{b}.npz"
        for path in ("messages", "fast"):
            network.zero_grad()
            if path == "fast":
                out = by_fast(network, world, offsets, x, intra)
            else:
                out = by_messages(network, world, offsets, x, intra)[-1]["token"]
            whole = {"lm": softmax.log_prob(x[start:]), "gnn": softmax.log_prob(out[start:])}
            target = {
                "lm": softmax.target_log_prob(x[start:], targets),
                "gnn": softmax.target_log_prob(out[start:], targets),
            }
            found = {}
            for name in outputs.files:
                ours = our_output(name, b, out, whole, target)
                if ours is not None:
                    theirs = outputs[name]
                    if name.endswith("gcn_feat") and len(theirs) != len(ours):
                        ours = ours[start:]
                    if "first4" in name:
                        ours = ours[: len(theirs)]
                    found[name] = difference(ours, theirs)
            if gradients_file.is_file():
                (-target["gnn"].sum()).backward()
                theirs = np.load(gradients_file)
                ours = their_gradients(network)
                for name in theirs.files:
                    short = name.removeprefix("decoder.hgt_decoder.")
                    if short in ours:
                        found[f"gradient {short}"] = difference(ours[short], theirs[name])
                    elif re.search(r"k_linears\.\d\.bias", short):  # has no effect, nor place here
                        found[f"gradient {short}"] = difference(
                            np.zeros_like(theirs[name]), theirs[name]
                        )
            rows[f"decoder block {b}, {path}"] = found
    return rows


def our_output(
    name: str, b: int, out: Tensor, whole: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> Tensor | None:
    """What an array of `decoder_outputs.npz` should hold; None if it is of another block."""
    found = re.fullmatch(rf"(?:batched_)?block{b}_(.+)", name)
    if found is None:
        return None
    if found[1] == "gcn_feat":
        return out
    if found[1] == "base_shortcut_logprob":
        return target["lm"]
    ratio = re.fullmatch(r"ratio([\d.]+)_(full_logprob_first\d+|logprob)", found[1])
    if ratio is None:
        return None
    scores = target if ratio[2] == "logprob" else whole
    r = float(ratio[1])
    if r == 0:
        return scores["gnn"]
    return scores["lm"] if r == 1 else mix(scores["lm"], scores["gnn"], r)


def compare(folder: Path) -> list[dict]:
    """Every output array of a fixture directory: the largest difference of each."""
    world = World.read(folder)
    rows = [
        {
            "case": "decoded codes",
            "largest_difference": {
                "decoded": difference(world.features, world.arrays["datastore_decoded"])
            },
        }
    ]
    network = our_network(np.load(folder / "hgt_state_dict.npz"), "", world.config["heads"])
    with torch.inference_mode():
        for path in sorted(folder.glob("hgt_block*.npz")):
            found = compare_block(network, world, np.load(path))
            rows.append({"case": path.stem, "largest_difference": found})
    if (folder / "decoder_outputs.npz").is_file():
        for case, found in compare_decoder(folder, world).items():
            rows.append({"case": case, "largest_difference": found})
    return rows


def as_markdown(rows: list[dict]) -> str:
    """A line a case: its worst array."""
    lines = ["| case | arrays | largest difference | of |", "| --- | --- | --- | --- |"]
    for row in rows:
        gaps = row["largest_difference"]
        worst = max(gaps, key=gaps.get)
        lines.append(f"| {row['case']} | {len(gaps)} | {gaps[worst]:.1e} | {worst} |")
    return "\n".join(lines)
