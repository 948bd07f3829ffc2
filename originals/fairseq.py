"""Converts what checkpoints of fairseq's `transformer_lm` hold to a `TransformerLM`, and back to
what those of fairseq 0.9 hold.

`pieces` pairs fairseq's tensors with ours; reading, checking and writing all follow it.
`fairseq_files` reads the files, `fairseq_gnn` builds on this for checkpoints of the original
GNN-LM, and `conversion` tells the two kinds apart.
"""

import ast
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neighborlm.common.errors import InputError
from neighborlm.models.adaptive import band_edges
from neighborlm.models.decoder import POSITION_OFFSET
from neighborlm.models.trainable_lm import TrainableLM
from neighborlm.models.transformer_lm import TransformerLM

BIAS = "decoder.xl_bias"  # on the logits of a plain softmax, in the original GNN-LM's fairseq
IGNORED = re.compile(r"(.*\.)?(_float_tensor|version)|decoder\.embed_positions\.weights")

# fairseq's values of arguments that a checkpoint does not store (base_lm_architecture).
DEFAULTS = {
    "activation_dropout": 0.0,
    "activation_fn": "relu",
    "adaptive_input": False,
    "adaptive_input_cutoff": None,
    "adaptive_input_factor": 4,
    "adaptive_softmax_cutoff": None,
    "adaptive_softmax_dropout": 0.0,
    "adaptive_softmax_factor": 4,
    "add_bos_token": False,
    "attention_dropout": 0.0,
    "character_embeddings": False,
    "decoder_attention_heads": 8,
    "decoder_embed_dim": 512,
    "decoder_ffn_embed_dim": 2048,
    "decoder_layers": 6,
    "decoder_layers_to_keep": None,
    "decoder_learned_pos": False,
    "decoder_normalize_before": True,
    "dropout": 0.1,
    "layernorm_embedding": False,
    "max_target_positions": None,
    "no_decoder_final_norm": False,
    "no_scale_embedding": False,
    "no_token_positional_embeddings": False,
    "share_decoder_input_output_embed": False,
    "tie_adaptive_proj": False,
    "tie_adaptive_weights": False,
    "tokens_per_sample": 1024,
}
SAME = {  # ours: fairseq's
    "width": "decoder_embed_dim",
    "ffn_width": "decoder_ffn_embed_dim",
    "layers": "decoder_layers",
    "heads": "decoder_attention_heads",
    "adaptive_input_factor": "adaptive_input_factor",
    "adaptive_softmax_factor": "adaptive_softmax_factor",
    "activation": "activation_fn",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "softmax_dropout": "adaptive_softmax_dropout",
}
UNSUPPORTED = {
    "add_bos_token": "rows that begin with <s>",
    "character_embeddings": "word vectors made of characters",
    "decoder_layers_to_keep": "a selection of the stored layers",
    "layernorm_embedding": "a layer norm on the embedding",
    "no_token_positional_embeddings": "a model without position embeddings",
}


# -- hyper-parameters ----------------------------------------------------------------------------


def hyper_parameters(
    args: Namespace, stored: Mapping[str, Tensor], path: Path | str
) -> dict[str, Any]:
    """The arguments of `TransformerLM` for a checkpoint.

    fairseq 0.9 always builds pre-norm layers; a stored `decoder_normalize_before` of False is
    followed all the same, as it comes from a variant of fairseq that allows post-norm.

    Args:
        args: the arguments in the checkpoint, of fairseq 0.9 or older.
        stored: its tensors, under the names of 0.9.
        path: for messages.

    Raises:
        InputError: the checkpoint is of a kind of model that `TransformerLM` does not support.
    """
    args = _upgrade_args(args)
    _refuse_unsupported(args, path)
    input_bands = _cutoffs(args, "adaptive_input_cutoff", path) if args.adaptive_input else []
    softmax_bands = _cutoffs(args, "adaptive_softmax_cutoff", path)
    vocab_size = _vocab_size(stored, input_bands, path)
    _check_bands(input_bands, softmax_bands, vocab_size, stored, path)
    version = float(stored["decoder.version"][0]) if "decoder.version" in stored else 1.0
    pre_norm = bool(args.decoder_normalize_before)
    return {
        **{ours: getattr(args, theirs) for ours, theirs in SAME.items()},
        "vocab_size": vocab_size,
        "adaptive_input_cutoffs": input_bands,
        "adaptive_softmax_cutoffs": softmax_bands,
        "tie_weights": bool(
            args.tie_adaptive_weights if softmax_bands else args.share_decoder_input_output_embed
        ),
        "tie_projections": bool(args.tie_adaptive_proj),
        "output_bias": bool(getattr(args, "add_bias", False)) and not softmax_bands,
        "max_target_positions": args.max_target_positions or args.tokens_per_sample,
        "positions": "learned" if args.decoder_learned_pos else "sinusoidal",
        "pre_norm": pre_norm,
        "final_norm": pre_norm and not args.no_decoder_final_norm and version > 2,
        "scale_embedding": not args.no_scale_embedding,
        **optimisation(args),
    }


def _upgrade_args(args: Namespace) -> Namespace:
    """Adds defaults and translates arguments of older versions to those of 0.9, as fairseq does."""
    new = Namespace(**(DEFAULTS | vars(args)))
    if hasattr(args, "no_tie_adaptive_proj"):
        new.no_decoder_final_norm = True
        new.tie_adaptive_proj = new.tie_adaptive_proj or not args.no_tie_adaptive_proj
    if hasattr(args, "decoder_final_norm"):
        new.no_decoder_final_norm = not args.decoder_final_norm
    if not new.activation_dropout:
        new.activation_dropout = getattr(args, "relu_dropout", 0.0)
    return new


def _refuse_unsupported(args: Namespace, path: Path | str) -> None:
    for name, what in UNSUPPORTED.items():
        value = getattr(args, name)
        if value:
            raise InputError(
                f"{path}: {_flag(name)} is {value}, {what}; expected a model without it"
            )
    for name in ("decoder_input_dim", "decoder_output_dim"):
        width = getattr(args, name, args.decoder_embed_dim)
        if width != args.decoder_embed_dim:
            raise InputError(
                f"{path}: {_flag(name)} is {width}; expected --decoder-embed-dim, which is "
                f"{args.decoder_embed_dim}"
            )
    if args.activation_fn not in ("relu", "gelu"):
        raise InputError(f"{path}: --activation-fn is {args.activation_fn}; expected relu or gelu")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _cutoffs(args: Namespace, name: str, path: Path | str) -> list[int]:
    """Parses cutoffs, which fairseq stores as text such as "20000,60000"."""
    value = getattr(args, name)
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
        found = () if found is None else found
        return [int(c) for c in (found if isinstance(found, list | tuple) else [found])]
    except (ValueError, SyntaxError, TypeError):
        raise InputError(
            f"{path}: {_flag(name)} is {value!r}; expected integers between commas"
        ) from None


def _check_bands(
    input_bands: list[int],
    softmax_bands: list[int],
    vocab_size: int,
    stored: Mapping[str, Tensor],
    path: Path | str,
) -> None:
    for side, bands in (("input", input_bands), ("softmax", softmax_bands)):
        if bands and min(bands) >= vocab_size:
            raise InputError(
                f"{path}: --adaptive-{side}-cutoff is {bands} for {vocab_size:,} words; expected "
                "a cutoff below that"
            )
    if softmax_bands and "decoder.adaptive_softmax.version" not in stored:
        raise InputError(
            f"{path}: has no decoder.adaptive_softmax.version; expected one, as without it the "
            "adaptive softmax has a form that fairseq itself no longer reads"
        )


def _vocab_size(stored: Mapping[str, Tensor], bands: list[int], path: Path | str) -> int:
    """Rows of the embedding; of an adaptive one, the last cutoff plus the rows of the last band."""
    name = f"decoder.embed_tokens.embeddings.{len(bands)}.0.weight"
    if bands and name not in stored:
        return bands[-1]  # the last cutoff may be the size of the vocabulary
    name = name if bands else "decoder.embed_tokens.weight"
    if name not in stored:
        raise InputError(f"{path}: has no {name}; expected the embedding of a transformer_lm")
    return (bands[-1] if bands else 0) + stored[name].shape[0]


def optimisation(args: Namespace) -> dict[str, Any]:
    """The settings of fairseq's optimiser and schedule that `Optimization` has as well."""
    found: dict[str, Any] = {}
    optimizer = getattr(args, "optimizer", None)
    if optimizer in ("nag", "adam"):
        found |= {"optimizer": optimizer, "weight_decay": getattr(args, "weight_decay", 0.0)}
    if optimizer == "nag":
        found["momentum"] = getattr(args, "momentum", 0.99)
    if optimizer == "adam":
        betas = getattr(args, "adam_betas", "(0.9, 0.999)")
        found["adam_betas"] = tuple(ast.literal_eval(betas) if isinstance(betas, str) else betas)
    lr = getattr(args, "lr", None)
    lr = lr[0] if isinstance(lr, list | tuple) and lr else lr
    if isinstance(lr, float | int):
        found |= _schedule(args, float(lr))
    return found


def _schedule(args: Namespace, lr: float) -> dict[str, Any]:
    warmup = getattr(args, "warmup_updates", None) or 0
    start = getattr(args, "warmup_init_lr", None)
    start_given = start is not None and start >= 0
    match getattr(args, "lr_scheduler", None):
        case "cosine":
            period = getattr(args, "lr_period_updates", -1)
            if period <= 0:
                period = max((getattr(args, "max_update", None) or 0) - warmup, 1)
            return {
                "schedule": "cosine",
                "lr": getattr(args, "max_lr", None) or lr,
                "min_lr": lr,
                "warmup_updates": warmup,
                "warmup_init_lr": start if start_given else lr,
                "lr_period_updates": round(period),
                "t_mult": getattr(args, "t_mult", 1.0),
                "lr_shrink": getattr(args, "lr_shrink", 0.1),
            }
        case "inverse_sqrt" | "fixed" as kind:
            return {
                "schedule": "constant" if kind == "fixed" else kind,
                "lr": lr,
                "warmup_updates": warmup,
                "warmup_init_lr": start if start_given else 0.0,
            }
    return {}


# -- tensors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Rows that a tensor of fairseq and one of ours have in common.

    Attributes:
        theirs: name in fairseq's state dict.
        ours: name in our state dict.
        their_start: first of the rows in fairseq's tensor.
        our_start: first of the rows in our tensor.
        rows: number of rows; None for all of ours.
        transposed: whether fairseq's tensor is `[columns, rows]`.
    """

    theirs: str
    ours: str
    their_start: int = 0
    our_start: int = 0
    rows: int | None = None
    transposed: bool = False


def pieces(hparams: Mapping[str, Any], prefix: str = "") -> list[Piece]:
    """Pairs the tensors of a checkpoint with those of a `TransformerLM`, in fairseq's order.

    Args:
        hparams: hyper-parameters of the model.
        prefix: of the names in our state dict, for a model that contains a `TransformerLM`.
    """
    found = [*_embedding_pieces(hparams)]
    for layer in range(hparams["layers"]):
        found += _layer_pieces(layer, hparams["width"])
    if hparams["final_norm"]:
        found += pair("decoder.layer_norm", "decoder.final_norm")
    found += softmax_pieces(hparams)
    return [replace(piece, ours=prefix + piece.ours) for piece in found]


def pair(theirs: str, ours: str) -> list[Piece]:
    """Pairs the whole weight and the whole bias of a module."""
    return [Piece(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias")]


def _embedding_pieces(hparams: Mapping[str, Any]) -> Iterator[Piece]:
    theirs, ours = "decoder.embed_tokens", "decoder.embedding"
    if not hparams["adaptive_input_cutoffs"]:
        yield Piece(f"{theirs}.weight", f"{ours}.weight")
    else:
        for i in range(_bands(hparams, "input")):
            yield Piece(f"{theirs}.embeddings.{i}.0.weight", f"{ours}.embeddings.{i}.weight")
            yield Piece(f"{theirs}.embeddings.{i}.1.weight", f"{ours}.projections.{i}.weight")
    if hparams["positions"] == "learned":
        yield Piece(
            "decoder.embed_positions.weight",
            "decoder.positions.weight",
            their_start=POSITION_OFFSET,
        )


def _layer_pieces(layer: int, width: int) -> Iterator[Piece]:
    name = f"decoder.layers.{layer}"
    for order, projection in ((1, "k"), (2, "v"), (0, "q")):
        for part in ("weight", "bias"):
            yield Piece(
                f"{name}.self_attn.{projection}_proj.{part}",
                f"{name}.qkv.{part}",
                our_start=order * width,
                rows=width,
            )
    yield from pair(f"{name}.self_attn.out_proj", f"{name}.attention_out")
    yield from pair(f"{name}.self_attn_layer_norm", f"{name}.attention_norm")
    yield from pair(f"{name}.fc1", f"{name}.fc1")
    yield from pair(f"{name}.fc2", f"{name}.fc2")
    yield from pair(f"{name}.final_layer_norm", f"{name}.ffn_norm")


def softmax_pieces(hparams: Mapping[str, Any]) -> Iterator[Piece]:
    """Pairs the tensors of the output softmax with those of `softmax`.

    Args:
        hparams: of the model: vocab_size, adaptive_softmax_cutoffs, tie_weights, tie_projections
            and output_bias.
    """
    tied = hparams["tie_weights"]
    if not hparams["adaptive_softmax_cutoffs"]:
        yield Piece(
            "decoder.embed_tokens.weight" if tied else "decoder.embed_out", "softmax.weight"
        )
        if hparams["output_bias"]:
            yield Piece(BIAS, "softmax.bias")
        return
    name = "decoder.adaptive_softmax"
    if tied:
        yield Piece(f"{name}.head.word_proj.weight", "softmax.words.0")
        yield Piece(f"{name}.head.class_proj.weight", "softmax.classes")
    else:
        first = min(hparams["adaptive_softmax_cutoffs"])
        yield Piece(f"{name}.head.weight", "softmax.words.0")
        yield Piece(f"{name}.head.weight", "softmax.classes", their_start=first)
    for i in range(_bands(hparams, "softmax") - 1):
        yield Piece(
            f"{name}.tail.{i}.0.weight",
            f"softmax.down.{i}",
            transposed=not (tied and hparams["tie_projections"]),
        )
        yield Piece(f"{name}.tail.{i}.2.weight", f"softmax.words.{i + 1}")


def _bands(hparams: Mapping[str, Any], side: str) -> int:
    return len(band_edges(hparams[f"adaptive_{side}_cutoffs"], hparams["vocab_size"])) - 1


def modern_names(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names in fairseq 0.9. Those of older versions are renamed, and their
    fused projections split; the output projection of later versions is renamed, or left out where
    it equals the embedding."""
    found: dict[str, Tensor] = {}
    norms = {"0": "self_attn_layer_norm", "2": "final_layer_norm"}
    for name, tensor in model.items():
        if fused := re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", name):
            for projection, part in zip("qkv", tensor.chunk(3), strict=False):
                found[f"{fused[1]}.{projection}_proj.{fused[2]}"] = part
        elif norm := re.fullmatch(r"(.*)\.layer_norms\.([02])\.(weight|bias)", name):
            found[f"{norm[1]}.{norms[norm[2]]}.{norm[3]}"] = tensor
        elif name == "decoder.output_projection.weight":
            embedding = model.get("decoder.embed_tokens.weight")
            if embedding is None or not torch.equal(tensor, embedding):
                found["decoder.embed_out"] = tensor
        else:
            found[name] = tensor
    return found


def _their_shapes(found: list[Piece], ours: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of fairseq's tensors, derived from ours."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in found:
        rows, *columns = ours[piece.ours].shape
        end = piece.their_start + (piece.rows or rows)
        if piece.transposed:
            shapes[piece.theirs] = (*columns, end)
        else:
            shapes[piece.theirs] = (max(end, shapes.get(piece.theirs, (0,))[0]), *columns)
    return shapes


def check_tensors(
    found: list[Piece],
    ours: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    path: Path | str,
    besides: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Checks that a checkpoint has all expected tensors, in their shapes, and no others.

    Args:
        found: pairs its tensors with ours.
        ours: state dict of our model.
        stored: its tensors.
        path: for messages.
        besides: shapes of further tensors that it should have.

    Raises:
        InputError: lists all tensors that are missing, unexpected or misshapen.
    """
    shapes = _their_shapes(found, ours) | dict(besides or {})
    known = {name for name in stored if not IGNORED.fullmatch(name)}
    problems = [
        *(f"{name} is missing" for name in shapes if name not in known),
        *(f"{name} is unexpected" for name in stored if name in known - shapes.keys()),
        *(
            f"{name} is {list(stored[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in known and tuple(stored[name].shape) != shape
        ),
    ]
    if problems:
        raise InputError(
            f"{path}: expected the tensors that its arguments describe; found that "
            + ", ".join(problems)
        )


def our_state(
    found: list[Piece], ours: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our state dict, in fp32, from the tensors of a checkpoint."""
    state = {p.ours: torch.empty(ours[p.ours].shape, dtype=torch.float32) for p in found}
    for piece in found:
        source = stored[piece.theirs]
        target = state[piece.ours]
        rows = piece.rows or target.shape[0]
        source = source.t() if piece.transposed else source
        source = source[piece.their_start : piece.their_start + rows]
        target[piece.our_start : piece.our_start + rows] = source
    return state


def _check_ties(model: TrainableLM, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Checks that tensors of a file are equal where they become one parameter of the model."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if not torch.equal(state[name], state[other]):
            raise InputError(
                f"{path}: its arguments tie input and output, but the tensors of {other} and "
                f"{name} differ; expected the same values"
            )


def take_tensors(
    model: TrainableLM,
    found: list[Piece],
    stored: Mapping[str, Tensor],
    path: Path | str,
    besides: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Loads the weights of a checkpoint into a model.

    Args:
        found: pairs the tensors of the checkpoint with those of the model.
        stored: tensors of the checkpoint.
        path: for messages.
        besides: shapes of tensors in the checkpoint that are no weights of the model.

    Raises:
        InputError: lists all tensors that do not fit, or names two that should be equal and differ.
    """
    ours = model.state_dict()
    check_tensors(found, ours, stored, path, besides)
    state = our_state(found, ours, stored)
    _check_ties(model, state, path)
    model.load_state_dict(state)


def transformer_lm(
    settings: Mapping[str, Any], stored: Mapping[str, Tensor], path: Path | str
) -> TransformerLM:
    """The model that a checkpoint describes, with its weights in fp32.

    Args:
        settings: see `hyper_parameters`.
        stored: tensors of the checkpoint, under the names of fairseq 0.9.
        path: for messages.

    Raises:
        InputError: its tensors do not fit its arguments.
    """
    model = TransformerLM(**settings)
    take_tensors(model, pieces(model.hparams), stored, path)
    return model


# -- export --------------------------------------------------------------------------------------


def export_state_dict(model: TransformerLM) -> dict[str, Tensor]:
    """The tensors of a model under fairseq's names and in its layout; tied ones share storage."""
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    found = pieces(model.hparams)
    theirs: dict[str, Tensor] = {"decoder.version": torch.tensor([3.0])}
    for name, shape in _their_shapes(found, ours).items():
        parts = [p for p in found if p.theirs == name]
        tensor = ours[parts[0].ours]
        if tensor.shape != shape or parts[0].transposed:
            tensor = tensor.new_zeros(shape)
            for part in parts:
                _copy_out(part, ours[part.ours], tensor)
        theirs[name] = tensor
    h = model.hparams
    if h.adaptive_input_cutoffs:
        theirs["decoder.embed_tokens._float_tensor"] = torch.zeros(1)
    if h.positions == "sinusoidal":
        theirs["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    if h.adaptive_softmax_cutoffs:
        theirs["decoder.adaptive_softmax.version"] = torch.tensor([1])
        if h.tie_weights:
            theirs["decoder.adaptive_softmax.head._float_tensor"] = torch.zeros(1)
    return theirs


def _copy_out(piece: Piece, ours: Tensor, theirs: Tensor) -> None:
    rows = piece.rows or ours.shape[0]
    part = ours[piece.our_start : piece.our_start + rows]
    target = theirs.t() if piece.transposed else theirs
    target[piece.their_start : piece.their_start + rows] = part


def export_args(model: TransformerLM) -> Namespace:
    """The arguments that fairseq needs to build, train and evaluate the model.

    `tokens_per_sample`, which a `TransformerLM` does not store, is set to its longest row.

    Raises:
        InputError: the model is post-norm or has a bias on its logits, which fairseq's
            transformer_lm does not support.
    """
    h = model.hparams
    if not h.pre_norm:
        raise InputError(
            "--model.pre_norm is false; expected true, as fairseq's transformer_lm builds "
            "pre-norm layers whatever its arguments say"
        )
    if h.output_bias:
        raise InputError(
            "--model.output_bias is true; expected false, as fairseq's transformer_lm adds no bias "
            "to its logits"
        )
    adaptive = bool(h.adaptive_softmax_cutoffs)
    new = DEFAULTS | {theirs: h[ours] for ours, theirs in SAME.items()}
    new |= {
        "adaptive_input": bool(h.adaptive_input_cutoffs),
        "adaptive_input_cutoff": _as_text(h.adaptive_input_cutoffs),
        "adaptive_softmax_cutoff": _as_text(h.adaptive_softmax_cutoffs),
        "arch": "transformer_lm",
        "criterion": "adaptive_loss" if adaptive else "cross_entropy",
        "data": "data-bin",
        "decoder_input_dim": h.width,
        "decoder_layerdrop": 0,
        "decoder_learned_pos": h.positions == "learned",
        "decoder_output_dim": h.width,
        "future_target": False,
        "knn_keytype": None,
        "max_target_positions": h.max_target_positions,
        "no_decoder_final_norm": not h.final_norm,
        "no_scale_embedding": not h.scale_embedding,
        "output_dictionary_size": -1,
        "past_target": False,
        "sample_break_mode": "none",
        "self_target": False,
        "share_decoder_input_output_embed": h.tie_weights and not adaptive,
        "task": "language_modeling",
        "tie_adaptive_proj": h.tie_weights and h.tie_projections and adaptive,
        "tie_adaptive_weights": h.tie_weights and adaptive,
        "tokens_per_sample": h.max_target_positions,
        "truncate_sequence": False,
    }
    return Namespace(**new, **_exported_optimisation(h))


def _as_text(cutoffs: list[int]) -> str | None:
    return ",".join(map(str, cutoffs)) or None


def _exported_optimisation(h: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        "nag": {"momentum": h["momentum"]},
        "adam": {"adam_betas": str(tuple(h["adam_betas"])), "adam_eps": 1e-8},
    }
    schedules = {
        "cosine": {
            "lr": [h["min_lr"]],
            "max_lr": h["lr"],
            "lr_period_updates": float(h["lr_period_updates"]),
            "t_mult": h["t_mult"],
            "lr_shrink": h["lr_shrink"],
        },
        "inverse_sqrt": {"lr": [h["lr"]]},
        "constant": {"lr": [h["lr"]]},
    }
    return {
        "optimizer": h["optimizer"],
        "weight_decay": h["weight_decay"],
        "lr_scheduler": "fixed" if h["schedule"] == "constant" else h["schedule"],
        "warmup_updates": h["warmup_updates"],
        "warmup_init_lr": h["warmup_init_lr"],
        **own[h["optimizer"]],
        **schedules[h["schedule"]],
    }
