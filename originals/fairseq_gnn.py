"""Converts checkpoints of the original GNN-LM (Meng et al., ICLR 2022), a fork of fairseq 0.9, to a
`GNNLM`.

They are checkpoints of a `transformer_lm` with a graph network beside the decoder and, where
neighbours come as codes, a quantiser. `originals.fairseq` reads the files and the LM in them.
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neighborlm.common.errors import InputError
from neighborlm.models.features import CodeDecoder
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.hgt import NODE_TYPES, RELATIONS
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.originals.fairseq import (
    Piece,
    optimisation,
    pair,
    pieces,
    softmax_pieces,
    take_tensors,
)

NETWORK = "decoder.hgt_decoder"
QUANTIZER = "decoder.tgt_quantizer"
PROJECTIONS = {"key": "k", "query": "q", "value": "v", "output": "a"}  # ours: theirs
RELATION_PARAMETERS = {"prior": "pri", "attention": "att", "message": "msg"}  # ours: theirs
CODEC_ARRAYS = {"centroids": "centroids_torch", "A": "A", "b": "b"}

# The fork's values of arguments that a checkpoint does not store.
DEFAULTS = {
    "decoder_gcn_dim": 1024,
    "intra_context": 0,
    "orig_prob_ratio": 0.0,
    "quantizer_path": "",
    "short_cut": False,
}
# Gates without effect, biases that add the same to all scores of a softmax, and tables for the
# comparison of codes.
UNUSED = re.compile(
    r"decoder\.hgt_decoder\.gcs\.\d+\.(skip|k_linears\.[01]\.bias)"
    r"|decoder\.tgt_quantizer\.(norm2_centroids_torch|sdc_table_torch)"
)


def gnn_lm(
    args: Namespace, stored: Mapping[str, Tensor], lm: Mapping[str, Any], path: Path | str
) -> GNNLM:
    """The model that a checkpoint with a graph network describes, with its weights in fp32 and the
    decoder of its neighbours' codes. The file does not say which features these had in training.

    Args:
        args: the arguments in the checkpoint.
        stored: its tensors, under the names of fairseq 0.9.
        lm: settings of its LM.
        path: for messages.

    Raises:
        InputError: `GNNLM` does not support the model, or its tensors do not fit its arguments.
    """
    args = Namespace(**(DEFAULTS | vars(args)))
    try:
        model = GNNLM(TransformerLM(**lm), **_settings(args, lm))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    stored = used(stored)
    codec = _codec_shapes(args, stored, lm["width"])
    take_tensors(model, gnn_pieces(model.hparams), stored, path, besides=codec)
    if codec:
        names = {ours: f"{QUANTIZER}.{theirs}" for ours, theirs in CODEC_ARRAYS.items()}
        model.code_decoder = CodeDecoder(
            {ours: stored[name].float().numpy() for ours, name in names.items() if name in codec}
        )
    return model


def _settings(args: Namespace, lm: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `GNNLM`. Nothing is unfrozen: a further training chooses the parts that it
    trains."""
    if args.short_cut:
        raise InputError(
            "--short-cut is True, which bypasses the graph network; expected a model without it"
        )
    return {
        "layers": args.graph_layer,
        "width": args.decoder_gcn_dim,
        "heads": lm["heads"],
        "dropout": lm["dropout"],
        "attention_dropout": lm["attention_dropout"],
        "intra_context": args.intra_context or None,  # 0 means all tokens before it there
        "lm_ratio": args.orig_prob_ratio,
        **optimisation(args),
    }


def used(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint that have an effect. Those with a slice for each relation are
    split into `NAME[0]` and `NAME[1]`, as `network_pieces` names them."""
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        empty = name.startswith(f"{QUANTIZER}.") and tensor.numel() == 0
        if UNUSED.fullmatch(name) or empty:
            continue
        if re.fullmatch(r".*\.relation_(pri|att|msg)", name) and tensor.ndim:
            found |= {f"{name}[{e}]": part for e, part in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def gnn_pieces(hparams: Mapping[str, Any]) -> list[Piece]:
    """Pairs the tensors of a checkpoint with those of a `GNNLM`; see `originals.fairseq.pieces`.

    Args:
        hparams: hyper-parameters of the model.
    """
    lm, width = hparams["lm"], hparams["width"]
    found = pieces(lm, "lm.")
    found += softmax_pieces(lm)  # our state dict has the softmax twice
    return found + network_pieces(hparams["layers"], width != lm["width"], "network.")


def network_pieces(layers: int, adapts: bool, prefix: str = "") -> list[Piece]:
    """Pairs the tensors of the graph network with those of an `HGT`.

    Args:
        layers: number of layers of the network.
        adapts: whether its states have another width than the features.
        prefix: of the names in our state dict, for a model that contains an `HGT`.
    """
    found: list[Piece] = []
    for layer in range(layers):
        found += _layer_pieces(f"{NETWORK}.gcs.{layer}", f"{prefix}layers.{layer}")
    if adapts:
        for t, node_type in enumerate(NODE_TYPES):
            found += pair(f"{NETWORK}.adapt_ws.{t}", f"{prefix}adapt.{node_type}")
        found += pair(f"{NETWORK}.out", f"{prefix}out")
    return found


def _layer_pieces(theirs: str, ours: str) -> list[Piece]:
    found: list[Piece] = []
    for t, node_type in enumerate(NODE_TYPES):
        for name, letter in PROJECTIONS.items():
            both = pair(f"{theirs}.{letter}_linears.{t}", f"{ours}.{name}.{node_type}")
            found += both[:1] if name == "key" else both
        found += pair(f"{theirs}.norms.{t}", f"{ours}.norm.{node_type}")
    for e, relation in enumerate(RELATIONS):
        for name, short in RELATION_PARAMETERS.items():
            found.append(Piece(f"{theirs}.relation_{short}[{e}]", f"{ours}.{name}.{relation}"))
    return found


def _codec_shapes(
    args: Namespace, stored: Mapping[str, Tensor], width: int
) -> dict[str, tuple[int, ...]]:
    """Shapes that the tensors of the quantiser should have; none without a quantiser. Its number of
    bytes and, after a transform, its width are taken from the tensors themselves."""
    centroids, matrix, bias = (f"{QUANTIZER}.{theirs}" for theirs in CODEC_ARRAYS.values())
    if not args.quantizer_path and not any(name in stored for name in (centroids, matrix, bias)):
        return {}
    found = stored.get(centroids, torch.empty(0))
    parts, _, part_width = found.shape if found.ndim == 3 else (1, 256, width)
    if matrix not in stored and bias not in stored:
        return {centroids: (parts, 256, width // parts)}
    shapes = {centroids: (parts, 256, part_width), matrix: (parts * part_width, width)}
    return shapes | ({bias: (parts * part_width,)} if bias in stored else {})
