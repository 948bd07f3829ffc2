"""Checkpoints of fairseq 0.9's `transformer_lm`, small enough for tests: what it stores of a model,
with random weights."""

import collections
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

WIDTH, FFN, HEADS, LAYERS, VOCAB, LONGEST = 32, 24, 4, 2, 200, 24
PLAIN = {
    "adaptive_input": False,
    "adaptive_input_cutoff": None,
    "adaptive_softmax_cutoff": None,
    "tie_adaptive_weights": False,
    "tie_adaptive_proj": False,
}
Shapes = dict[str, tuple[int, ...]]


def arguments(**changes) -> Namespace:
    """What fairseq stores of how a model was made."""
    found = {
        "task": "language_modeling",
        "arch": "transformer_lm",
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
        "adaptive_softmax_dropout": 0.2,
        "tie_adaptive_weights": True,
        "tie_adaptive_proj": True,
        "share_decoder_input_output_embed": False,
        "decoder_normalize_before": True,
        "no_decoder_final_norm": True,
        "decoder_learned_pos": False,
        "no_token_positional_embeddings": False,
        "no_scale_embedding": False,
        "character_embeddings": False,
        "activation_fn": "relu",
        "dropout": 0.3,
        "attention_dropout": 0.1,
        "activation_dropout": 0.05,
        "tokens_per_sample": LONGEST,
        "max_target_positions": None,
    }
    return Namespace(**(found | changes))


def shapes(args: Namespace) -> Shapes:
    """Every parameter that the arguments ask for, tied ones left out."""
    found = embedding_shapes(args) | layer_shapes() | softmax_shapes(args)
    if not args.no_decoder_final_norm:
        found |= pair("decoder.layer_norm", WIDTH)
    return found


def pair(name: str, *weight: int) -> Shapes:
    """A module's weight, and its bias."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def embedding_shapes(args: Namespace) -> Shapes:
    """Of the words and of learned positions."""
    found, name = {}, "decoder.embed_tokens"
    if args.adaptive_input:
        edges = [0, *map(int, args.adaptive_input_cutoff.split(",")), VOCAB]
        for i in range(len(edges) - 1):
            narrow = int(WIDTH // args.adaptive_input_factor**i)
            found[f"{name}.embeddings.{i}.0.weight"] = (edges[i + 1] - edges[i], narrow)
            found[f"{name}.embeddings.{i}.1.weight"] = (WIDTH, narrow)
    else:
        found[f"{name}.weight"] = (VOCAB, WIDTH)
    if args.decoder_learned_pos:
        rows = (args.max_target_positions or args.tokens_per_sample) + 2
        found["decoder.embed_positions.weight"] = (rows, WIDTH)
    return found


def layer_shapes() -> Shapes:
    """Of the transformer's layers."""
    found: Shapes = {}
    for layer in (f"decoder.layers.{i}" for i in range(LAYERS)):
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= pair(f"{layer}.self_attn.{projection}", WIDTH, WIDTH)
        found |= pair(f"{layer}.fc1", FFN, WIDTH) | pair(f"{layer}.fc2", WIDTH, FFN)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            found |= pair(f"{layer}.{norm}", WIDTH)
    return found


def softmax_shapes(args: Namespace) -> Shapes:
    """Of the output softmax."""
    if args.adaptive_softmax_cutoff is None:
        shared = args.share_decoder_input_output_embed
        return {} if shared else {"decoder.embed_out": (VOCAB, WIDTH)}
    name = "decoder.adaptive_softmax"
    edges = [*map(int, args.adaptive_softmax_cutoff.split(",")), VOCAB]
    tails = len(edges) - 1
    tied = args.tie_adaptive_weights
    found = {f"{name}.head.class_proj.weight": (tails, WIDTH)}
    found = found if tied else {f"{name}.head.weight": (edges[0] + tails, WIDTH)}
    for i in range(tails):
        narrow = int(WIDTH // args.adaptive_softmax_factor ** (i + 1))
        if not (tied and args.tie_adaptive_proj):
            found[f"{name}.tail.{i}.0.weight"] = (narrow, WIDTH)
        if not tied:
            found[f"{name}.tail.{i}.2.weight"] = (edges[i + 1] - edges[i], narrow)
    return found


def random_like(shapes: Shapes) -> dict[str, Tensor]:
    """The same numbers at every call."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def tensors(args: Namespace) -> dict[str, Tensor]:
    """A random state dict of fairseq's, junk and all."""
    state = random_like(shapes(args))
    name = "decoder.adaptive_softmax"
    if args.adaptive_softmax_cutoff is not None and args.tie_adaptive_weights:
        words = "decoder.embed_tokens.embeddings"
        state[f"{name}.head.word_proj.weight"] = state[f"{words}.0.0.weight"]
        state[f"{name}.head._float_tensor"] = torch.tensor([torch.nan])
        for i in range(len(args.adaptive_softmax_cutoff.split(","))):
            state[f"{name}.tail.{i}.2.weight"] = state[f"{words}.{i + 1}.0.weight"]
            if args.tie_adaptive_proj:
                state[f"{name}.tail.{i}.0.weight"] = state[f"{words}.{i + 1}.1.weight"]
    if args.adaptive_softmax_cutoff is not None:
        state[f"{name}.version"] = torch.tensor([1])
    if args.adaptive_input:
        state["decoder.embed_tokens._float_tensor"] = torch.tensor([torch.nan])
    if not args.decoder_learned_pos:
        state["decoder.embed_positions._float_tensor"] = torch.tensor([torch.nan])
    return {"decoder.version": torch.tensor([3.0]), **state}


def save(path: Path, args: Namespace, *parts: dict[str, Tensor], **extra) -> Path:
    """A checkpoint with the tensors of all parts, and what else one may hold."""
    model = collections.OrderedDict(item for part in parts for item in part.items())
    torch.save({"args": args, "model": model, **extra}, path)
    return path
