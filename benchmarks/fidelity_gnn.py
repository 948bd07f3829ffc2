"""Recomputes reference outputs of the original GNN-LM, by message passing and by the fast way.

A fixture directory holds `config.json`, `world.npz` (datastore, neighbours, features), the
network's weights `hgt_state_dict.npz` with what it gave for some blocks in `hgt_block<b>.npz`, and
a decoder's weights `decoder_state_dict.npz` with `decoder_outputs.npz` and
`decoder_grads_block<b>.npz`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from neighborlm.datamodules.dictionary import EOS
from neighborlm.datamodules.graphs import (
    INTER,
    INTRA_NEIGHBOR,
    INTRA_TOKEN,
    Neighborhood,
    NeighborMemory,
    hetero_graph,
)
from neighborlm.models.adaptive import AdaptiveSoftmax, OutputSoftmax, PlainSoftmax
from neighborlm.models.features import CodeDecoder
from neighborlm.models.gnn_lm import mix
from neighborlm.models.hgt import HGT
from neighborlm.originals.fairseq import BIAS, Piece, our_state, softmax_pieces
from neighborlm.originals.fairseq_gnn import NETWORK, UNUSED, network_pieces, used

TOLERANCE, ROUNDING = 1e-4, 1e-6
"""Of any number that is no integer, and for large sums a share of the largest in its array."""
TOLERANCES = (
    f"tolerance: {TOLERANCE:.0e} and {ROUNDING:.0e} of the largest number in its array for each "
    "number, none for integers"
)
THEIRS = {"token": "tgt", "neighbor": "ntgt"}
EDGES = {
    INTRA_TOKEN: "edge_tgt_intra_tgt",
    INTER: "edge_ntgt_inter_tgt",
    INTRA_NEIGHBOR: "edge_ntgt_intra_ntgt",
}
Arrays = Mapping[str, np.ndarray]


class Difference(float):
    """The largest absolute difference of two arrays.

    Attributes:
        too_large: whether it is above the tolerance.
    """

    too_large = False


class Stored(Mapping):
    """The arrays of a fixture file, which remembers those that something was compared with."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.arrays = dict(np.load(path))
        self.compared: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def difference(self, name: str, ours: Tensor | np.ndarray) -> Difference:
        """See `difference`."""
        self.compared.add(name)
        return difference(ours, self[name])

    @property
    def not_compared(self) -> list[str]:
        """Names of the other arrays, behind that of the file."""
        return [f"{self.name}: {name}" for name in self if name not in self.compared]


@dataclass
class World:
    """What all blocks of a fixture share.

    Attributes:
        config: its config.json.
        files: its .npz files by stem, but for the weights.
        arrays: its world.npz.
        features: fp32 `[N, D]`, decoded by us from the codes.
    """

    config: dict
    files: dict[str, Stored]
    arrays: Stored
    features: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "World":
        """Opens a fixture directory."""
        config = json.loads((folder / "config.json").read_text())
        paths = sorted(set(folder.glob("*.npz")) - set(folder.glob("*_state_dict.npz")))
        files = {path.stem: Stored(path) for path in paths}
        arrays = files["world"]
        names = {"centroids": "pq_centroids", "A": "pq_A", "b": "pq_b"}
        found = {ours: arrays[name] for ours, name in names.items() if name in arrays}
        decoder = CodeDecoder(found)
        codes = torch.from_numpy(arrays["datastore_codes"])
        return cls(config, files, arrays, decoder(codes).numpy())

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

    def tokens(self, offsets: np.ndarray) -> np.ndarray:
        """Of the split, int64 `[n]`; before the first comes the end of a line."""
        tokens = self.arrays["split_tokens"][offsets].astype(np.int64)
        return np.where(offsets < 0, EOS, tokens)


def read_weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The arrays of a fixture file, under the names of a checkpoint's tensors with `prefix`."""
    return {f"{prefix}{name}": torch.from_numpy(array) for name, array in np.load(path).items()}


def our_network(stored: Mapping[str, Tensor], heads: int) -> HGT:
    """An `HGT` with the original's weights, whose shapes tell its sizes."""
    stored = used(stored)
    layers = 1 + max(map(int, re.findall(r"\.gcs\.(\d+)\.", " ".join(stored))))
    width = len(stored[f"{NETWORK}.gcs.0.norms.0.weight"])
    adapt = f"{NETWORK}.adapt_ws.0.weight"
    input_width = stored[adapt].shape[1] if adapt in stored else width
    network = HGT(input_width, width, layers, heads).eval()
    network.load_state_dict(our_state(pieces_of(network), network.state_dict(), stored))
    return network


def pieces_of(network: HGT) -> list[Piece]:
    """How the original's tensors make those of a network."""
    return network_pieces(len(network.layers), adapts=network.adapt is not None)


def our_softmax(stored: Mapping[str, Tensor], config: dict) -> OutputSoftmax:
    """The output softmax of a decoder."""
    settings = softmax_settings(stored, config)
    cutoffs, tail = settings["adaptive_softmax_cutoffs"], "decoder.adaptive_softmax.tail.0.2.weight"
    if cutoffs:
        factor = config["D"] / stored[tail].shape[1] if tail in stored else 1.0
        softmax = AdaptiveSoftmax(config["V"], config["D"], cutoffs, factor)
    else:
        softmax = PlainSoftmax(config["V"], config["D"], tied=None)
    if settings["output_bias"]:
        softmax.add_bias()
    holder = nn.ModuleDict({"softmax": softmax}).eval()
    holder.load_state_dict(our_state([*softmax_pieces(settings)], holder.state_dict(), stored))
    return softmax


def softmax_settings(stored: Mapping[str, Tensor], config: dict) -> dict:
    """The settings that tell which tensors of a decoder make its softmax. What it shares with the
    input shows in the tensors."""
    name = "decoder.adaptive_softmax"
    adaptive = any(key.startswith(name) for key in stored)
    tied = (f"{name}.head.weight" if adaptive else "decoder.embed_out") not in stored
    down, projection = f"{name}.tail.0.0.weight", "decoder.embed_tokens.embeddings.1.1.weight"
    return {
        "vocab_size": config["V"],
        "adaptive_softmax_cutoffs": list(map(int, config["cut"].split(","))) if adaptive else [],
        "output_bias": BIAS in stored and not adaptive,
        "tie_weights": tied,
        "tie_projections": tied
        and down in stored
        and torch.equal(stored[down], stored[projection]),
    }


def difference(ours: Tensor | np.ndarray, theirs: np.ndarray) -> Difference:
    """The largest absolute difference; infinite for other shapes."""
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else ours
    gap = np.inf if ours.shape != theirs.shape else 0.0
    if ours.shape == theirs.shape and theirs.size:
        gap = np.abs(ours.astype(np.float64) - theirs).max()
    allowed = 0.0
    if theirs.dtype.kind == "f":
        allowed = TOLERANCE + ROUNDING * float(np.abs(theirs).max(initial=0.0))
    found = Difference(gap)
    found.too_large = not gap <= allowed  # nor is nan within it
    return found


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


def compare_block(network: HGT, world: World, block: Stored) -> dict[str, Difference]:
    """Largest differences of the graph and of every array of one `hgt_block<b>.npz`."""
    offsets, intra = block["tgt_offsets"], intra_context(block)
    neighbors = world.neighbors(offsets)
    graph = hetero_graph(neighbors, len(world.features), *world.config["ctx"], intra_context=intra)
    rows = graph["neighbor"].row.numpy()
    x = world.token_features(offsets)
    found = {
        name: block.difference(theirs, ours)
        for name, theirs, ours in (
            ("neighbors", "neighbors_masked", neighbors),
            ("tokens before", "source", world.tokens(offsets - 1)),
            ("tokens", "target", world.tokens(offsets)),
            ("graph: nodes", "ntgt_offset", rows),
            ("tokens of neighbours", "ntgt_label", world.arrays["datastore_vals"][rows].ravel()),
            ("codes of neighbours", "ntgt_code", world.arrays["datastore_codes"][rows]),
            ("features of tokens", "feat_tgt", x),
            ("features of neighbours", "feat_ntgt", world.features[rows]),
        )
    }
    for kind, name in EDGES.items():
        ours = graph[kind].edge_index.numpy() if kind in graph.edge_types else np.empty((2, 0))
        ours, theirs = (np.unique(edges, axis=1) for edges in (ours, block[name]))
        found[f"graph: {' '.join(kind)}"] = difference(ours, theirs)
        block.compared.add(name)
    states = by_messages(network, world, offsets, x, intra)
    names = ["adapt", *(f"layer{i}" for i in range(len(network.layers))), "out"]
    for name, state in zip(names, states, strict=True):
        for node_type, theirs in THEIRS.items():
            if f"{name}_{theirs}" in block:
                found[f"messages: {name} {node_type}"] = block.difference(
                    f"{name}_{theirs}", state[node_type]
                )
    fast = by_fast(network, world, offsets, x, intra)
    found["fast: out token"] = block.difference("out_tgt", fast)
    return found


def compare_decoder(folder: Path, world: World) -> dict[str, dict[str, Difference]]:
    """Largest differences of log-probabilities and gradients, by block and computation."""
    stored = read_weights(folder / "decoder_state_dict.npz")
    network = our_network(stored, world.config.get("heads_dec", world.config["heads"]))
    softmax = our_softmax(stored, world.config)
    rows: dict[str, dict[str, Difference]] = {}
    for b in world.config["blocks"]:
        block = world.files[f"hgt_block{b}"]
        offsets, intra = block["tgt_offsets"], intra_context(block)
        x = world.token_features(offsets)
        gradients = world.files.get(f"decoder_grads_block{b}")
        for path in ("messages", "fast"):
            network.zero_grad()
            if path == "fast":
                out = by_fast(network, world, offsets, x, intra)
            else:
                out = by_messages(network, world, offsets, x, intra)[-1]["token"]
            found, target = compare_outputs(softmax, world, b, x, out)
            if gradients is not None:
                loss = -target["gnn"].sum()
                loss.backward()
                found |= compare_gradients(network, loss, gradients)
            rows[f"decoder block {b}, {path}"] = found
    return rows


def compare_outputs(
    softmax: OutputSoftmax, world: World, b: int, x: Tensor, out: Tensor
) -> tuple[dict[str, Difference], dict[str, Tensor]]:
    """Largest differences of the arrays of block b in `decoder_outputs.npz`.

    Args:
        softmax: the decoder's.
        world: with the arrays of all blocks.
        b: number of the block.
        x: features of its tokens `[n, D]`.
        out: what the graph network makes of them `[n, D]`.

    Returns:
        Them by name, and log-probabilities of the scored targets by the LM and by the network.
    """
    block, outputs = world.files[f"hgt_block{b}"], world.files["decoder_outputs"]
    start = int(np.ravel(block["loss_start"])[0])
    targets = torch.from_numpy(world.tokens(block["tgt_offsets"][start:]))
    features = {"lm": x, "gnn": out}
    # Of targets the scored ones, of distributions all places of the block, its context included.
    whole = {name: softmax.log_prob(feature) for name, feature in features.items()}
    target = {name: softmax.target_log_prob(f[start:], targets) for name, f in features.items()}
    found = {}
    for name, theirs in outputs.items():
        ours = our_output(name, b, targets, out, whole, target)
        if ours is not None:
            if name.endswith("gcn_feat") and len(theirs) != len(ours):
                ours = ours[start:]
            if "first4" in name:
                ours = ours[: len(theirs)]
            found[name] = outputs.difference(name, ours)
    return found, target


def compare_gradients(network: HGT, loss: Tensor, arrays: Stored) -> dict[str, Difference]:
    """Largest differences of the network's gradients and of the loss that they are of from those of
    a `decoder_grads_block<b>.npz`, which leaves out what has no effect."""
    stored = {name: torch.from_numpy(array) for name, array in arrays.items()}
    parameters, theirs = dict(network.named_parameters()), used(stored)
    gaps: list[tuple[str, Difference]] = []
    for piece in pieces_of(network):
        if piece.theirs in theirs:
            parameter = parameters[piece.ours]
            ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gaps.append((piece.theirs, difference(ours, theirs[piece.theirs].numpy())))
    for name, gradient in stored.items():
        if UNUSED.fullmatch(name):  # has no effect, nor a place here
            gaps.append((name, difference(torch.zeros_like(gradient), gradient.numpy())))
    found: dict[str, Difference] = {}
    if "loss_sum" in arrays:
        found["loss_sum"] = arrays.difference("loss_sum", loss)
    for name, gap in gaps:
        whole = name.partition("[")[0]
        arrays.compared.add(whole)
        name = f"gradient {whole.removeprefix(f'{NETWORK}.')}"
        found[name] = max(gap, found.get(name, gap), key=lambda g: (g.too_large, g))
    return found


def our_output(
    name: str,
    b: int,
    targets: Tensor,
    out: Tensor,
    whole: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
) -> Tensor | None:
    """What an array of `decoder_outputs.npz` should hold; None if it is of another block."""
    found = re.fullmatch(rf"(?:batched_)?block{b}_(.+)", name)
    if found is None:
        return None
    if found[1] == "gcn_feat":
        return out
    if found[1] == "scored_tokens":
        return targets
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


def compare(folder: Path) -> dict[str, list]:
    """Every output array of a fixture directory.

    Returns:
        `cases`, with the largest difference of each array and the names of those above the
        tolerance, and `not_compared`, the names of those that nothing was compared with, the
        weights left out.
    """
    world = World.read(folder)
    decoded = world.arrays.difference("datastore_decoded", world.features)
    found_by_case = {"decoded codes": {"decoded": decoded}}
    stored = read_weights(folder / "hgt_state_dict.npz", f"{NETWORK}.")
    network = our_network(stored, world.config["heads"])
    with torch.inference_mode():
        for name, block in world.files.items():
            if name.startswith("hgt_block"):
                found_by_case[name] = compare_block(network, world, block)
    if "decoder_outputs" in world.files:
        found_by_case |= compare_decoder(folder, world)
    rows = [
        {
            "case": case,
            "largest_difference": found,
            "above_tolerance": [name for name, gap in found.items() if gap.too_large],
        }
        for case, found in found_by_case.items()
    ]
    left = [name for file in world.files.values() for name in file.not_compared]
    return {"cases": rows, "not_compared": left}


def as_markdown(compared: dict[str, list]) -> str:
    """A line a case, its worst array; and what was not compared."""
    lines = ["| case | arrays | largest difference | of |", "| --- | --- | --- | --- |"]
    for row in compared["cases"]:
        gaps = row["largest_difference"]
        worst = max(gaps, key=gaps.get)
        lines.append(f"| {row['case']} | {len(gaps)} | {gaps[worst]:.1e} | {worst} |")
    lines += ["", f"Not compared: {', '.join(compared['not_compared']) or 'nothing'}."]
    return "\n".join(lines)
