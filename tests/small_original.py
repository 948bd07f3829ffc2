"""Checkpoints of the original GNN-LM, small enough for tests: what its program stores of a model,
which is fairseq's with a graph network beside it."""

from argparse import Namespace
from pathlib import Path

import small_fairseq
import torch
from small_fairseq import (
    HEADS,
    PLAIN,
    WIDTH,
    Shapes,
    embedding_shapes,
    layer_shapes,
    pair,
    random_like,
    save,
    softmax_shapes,
)
from torch import Tensor

NETWORK, QUANTIZER = "decoder.hgt_decoder", "decoder.tgt_quantizer"


def arguments(**changes) -> Namespace:
    """What the original stores of how a model was made, that of its outputs beside the checkout."""
    found = {
        "optimizer": "adam",
        "lr": [0.0005],
        "lr_scheduler": "fixed",
        "graph_layer": 3,
        "decoder_gcn_dim": WIDTH,
        "orig_prob_ratio": 0.3,
        "add_bias": False,
        "freeze": True,
        "short_cut": False,
        "quantizer_path": "quantizer.faiss",
    }
    return small_fairseq.arguments(**(found | changes))


def transformer_layers() -> dict[str, Tensor]:
    """The LM's layers."""
    return random_like(layer_shapes())


def plain_words() -> dict[str, Tensor]:
    """The LM's plain embedding and softmax."""
    args = arguments(**PLAIN)
    words = random_like(embedding_shapes(args) | softmax_shapes(args))
    return {"decoder.version": torch.tensor([3.0]), **words}


def network(width: int = WIDTH, layers: int = 3) -> dict[str, Tensor]:
    """The graph network."""
    part = width // HEADS
    shapes: Shapes = {}
    for layer in (f"{NETWORK}.gcs.{i}" for i in range(layers)):
        shapes |= {f"{layer}.relation_pri": (2, HEADS), f"{layer}.skip": (2,)}
        shapes |= {f"{layer}.relation_{m}": (2, HEADS, part, part) for m in ("att", "msg")}
        for t in range(2):
            for letter in "kqva":
                shapes |= pair(f"{layer}.{letter}_linears.{t}", width, width)
            shapes |= pair(f"{layer}.norms.{t}", width)
    if width != WIDTH:
        for t in range(2):
            shapes |= pair(f"{NETWORK}.adapt_ws.{t}", width, WIDTH)
        shapes |= pair(f"{NETWORK}.out", WIDTH, width)
    return random_like(shapes)


def quantizer(bytes_a_row: int = 8) -> dict[str, Tensor]:
    """With a rotation and, as after one, no bias."""
    found = random_like(
        {
            f"{QUANTIZER}.centroids_torch": (bytes_a_row, 256, WIDTH // bytes_a_row),
            f"{QUANTIZER}.norm2_centroids_torch": (bytes_a_row, 256),
            f"{QUANTIZER}.sdc_table_torch": (bytes_a_row, 256, 256),
        }
    )
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    return found | {f"{QUANTIZER}.A": rotation, f"{QUANTIZER}.b": torch.empty(0)}


def save_plain(path: Path, *parts: dict[str, Tensor], **changes) -> Path:
    """A checkpoint of a model with a plain softmax: of its LM, and of all parts."""
    args = arguments(**(PLAIN | changes))
    return save(path, args, plain_words(), transformer_layers(), *parts)
