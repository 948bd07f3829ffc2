"""Checkpoints of the original GNN-LM, small enough for tests: what its program stores of a model."""

from argparse import Namespace
from pathlib import Path

import torch

WIDTH, FFN, HEADS, LAYERS, VOCAB = 32, 24, 4, 2, 200
NETWORK, QUANTIZER = "decoder.hgt_decoder", "decoder.tgt_quantizer"


def arguments(**changes) -> Namespace:
    """What the original stores for the model of the fixture."""
    found = {
        "decoder_embed_dim": WIDTH,
        "decoder_input_dim": WIDTH,
        "decoder_output_dim": WIDTH,
        "decoder_ffn_embed_dim": FFN,
        "decoder_layers": LAYERS,
        "decoder_attention_heads": HEADS,
        "adaptive_input": True,
        "adaptive_input_cutoff": "60,120",
        "adaptive_input_factor": 4,
        "adaptive_softmax_cutoff": "60,120",
        "adaptive_softmax_factor": 4,
        "tie_adaptive_weights": True,
        "tie_adaptive_proj": True,
        "no_decoder_final_norm": True,
        "dropout": 0.2,
        "attention_dropout": 0.1,
        "tokens_per_sample": 24,
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
    return Namespace(**(found | changes))


PLAIN = {
    "adaptive_input": False,
    "adaptive_softmax_cutoff": None,
    "tie_adaptive_weights": False,
    "tie_adaptive_proj": False,
}


def random_like(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def transformer_layers() -> dict[str, torch.Tensor]:
    shapes = {}
    for layer in (f"decoder.layers.{i}" for i in range(LAYERS)):
        for projection in ("q", "k", "v", "out"):
            shapes[f"{layer}.self_attn.{projection}_proj.weight"] = (WIDTH, WIDTH)
            shapes[f"{layer}.self_attn.{projection}_proj.bias"] = (WIDTH,)
        shapes |= {f"{layer}.fc1.weight": (FFN, WIDTH), f"{layer}.fc1.bias": (FFN,)}
        shapes |= {f"{layer}.fc2.weight": (WIDTH, FFN), f"{layer}.fc2.bias": (WIDTH,)}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{norm}.{part}": (WIDTH,) for part in ("weight", "bias")}
    return random_like(shapes)


def network(width: int = WIDTH, layers: int = 3) -> dict[str, torch.Tensor]:
    part = width // HEADS
    shapes = {}
    for layer in (f"{NETWORK}.gcs.{i}" for i in range(layers)):
        shapes |= {f"{layer}.relation_pri": (2, HEADS), f"{layer}.skip": (2,)}
        shapes |= {f"{layer}.relation_{m}": (2, HEADS, part, part) for m in ("att", "msg")}
        for t in range(2):
            for letter in "kqva":
                shapes[f"{layer}.{letter}_linears.{t}.weight"] = (width, width)
                shapes[f"{layer}.{letter}_linears.{t}.bias"] = (width,)
            shapes |= {f"{layer}.norms.{t}.{p}": (width,) for p in ("weight", "bias")}
    if width != WIDTH:
        for t in range(2):
            shapes |= {f"{NETWORK}.adapt_ws.{t}.weight": (width, WIDTH)}
            shapes |= {f"{NETWORK}.adapt_ws.{t}.bias": (width,)}
        shapes |= {f"{NETWORK}.out.weight": (WIDTH, width), f"{NETWORK}.out.bias": (WIDTH,)}
    return random_like(shapes)


def quantizer(bytes_a_row: int = 8) -> dict[str, torch.Tensor]:
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


def plain_words() -> dict[str, torch.Tensor]:
    shapes = {"decoder.embed_tokens.weight": (VOCAB, WIDTH), "decoder.embed_out": (VOCAB, WIDTH)}
    return {"decoder.version": torch.tensor([3.0]), **random_like(shapes)}


def save(path: Path, args: Namespace, *parts: dict[str, torch.Tensor]) -> Path:
    model = {name: tensor for part in parts for name, tensor in part.items()}
    torch.save({"args": args, "model": model}, path)
    return path
