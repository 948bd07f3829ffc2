"""Converts checkpoints of fairseq and of the original GNN-LM, a fork of it, to models of this
project, and language models back to fairseq.

    neighborlm convert from_fairseq checkpoint_best.pt lm.ckpt
    neighborlm convert to_fairseq lm.ckpt checkpoint_best.pt
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from neighborlm.common.errors import InputError
from neighborlm.common.files import publishing
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.originals.fairseq import (
    BIAS,
    export_args,
    export_state_dict,
    hyper_parameters,
    modern_names,
    transformer_lm,
)
from neighborlm.originals.fairseq_files import LIGHTNING_KEY, READ_ERRORS, read_checkpoint
from neighborlm.originals.fairseq_gnn import gnn_lm


def load_fairseq_checkpoint(path: Path | str) -> TransformerLM | GNNLM:
    """Builds the model that a fairseq checkpoint describes, with its weights in fp32: a
    `TransformerLM`, or a `GNNLM` from a checkpoint of the original GNN-LM.

    Raises:
        InputError: the file cannot be read, holds objects that are not allowed, is of an
            unsupported kind of model, or its tensors do not fit its arguments.
    """
    args, stored = read_checkpoint(Path(path))
    stored = modern_names(stored)
    settings = hyper_parameters(args, stored, path)
    if settings["adaptive_softmax_cutoffs"]:
        stored.pop(BIAS, None)  # stored, but not added to an adaptive softmax
    if getattr(args, "graph_layer", 0):
        return gnn_lm(args, stored, settings, path)
    return transformer_lm(settings, stored, path)


def convert(checkpoint: Path, output: Path) -> None:
    """Makes a Lightning checkpoint from a fairseq checkpoint.

    Args:
        checkpoint: a checkpoint of fairseq, up to 0.12, or of the original GNN-LM, such as
            checkpoint_best.pt.
        output: the Lightning checkpoint to write.
    """
    model = load_fairseq_checkpoint(checkpoint)
    contents = {
        "epoch": 0,
        "global_step": 0,
        LIGHTNING_KEY: pl.__version__,
        "state_dict": model.state_dict(),
        model.CHECKPOINT_HYPER_PARAMS_NAME: "kwargs",
        model.CHECKPOINT_HYPER_PARAMS_KEY: dict(model.hparams),
    }
    if isinstance(model, GNNLM):
        # The file says neither which datastores the LM made nor what features neighbours had.
        contents |= {"lm_fingerprint": None, "neighbors": None}
        if model.code_decoder is not None:
            print(
                f"{output}: does not hold the quantiser of {checkpoint}, as a codec is stored with "
                "the codes that it makes and not in a model"
            )
    _publish(contents, output)


def export(checkpoint: Path, output: Path) -> None:
    """Makes a fairseq checkpoint, without the state of the optimiser, from a Lightning checkpoint.

    Args:
        checkpoint: a checkpoint of a TransformerLM.
        output: the fairseq checkpoint to write.
    """
    model = _load_lightning_checkpoint(checkpoint)
    args = export_args(model)
    history = {
        "criterion_name": {"adaptive_loss": "AdaptiveLoss"}.get(
            args.criterion, "CrossEntropyCriterion"
        ),
        "optimizer_name": {"nag": "FairseqNAG", "adam": "FairseqAdam"}[args.optimizer],
        "lr_scheduler_state": {"best": None},
        "num_updates": 0,
    }
    iterator = {"epoch": 1, "iterations_in_epoch": 0, "shuffle": True}
    contents = {
        "args": args,
        "model": OrderedDict(export_state_dict(model)),
        "optimizer_history": [history],
        "extra_state": {"train_iterator": iterator, "val_loss": None},
        "last_optimizer_state": None,
    }
    _publish(contents, output)


def _load_lightning_checkpoint(path: Path) -> TransformerLM:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a checkpoint of a TransformerLM")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "lm" not in checkpoint["hyper_parameters"]:
            model = TransformerLM(**checkpoint["hyper_parameters"])
            model.load_state_dict(checkpoint["state_dict"])
            return model
    except READ_ERRORS:
        raise InputError(f"{path}: expected a Lightning checkpoint of a TransformerLM") from None
    raise InputError(
        f"{path}: holds a GNNLM; expected a TransformerLM, as fairseq itself has no GNN-LM"
    )


def _publish(contents: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with publishing(path) as making:
        torch.save(contents, making)
