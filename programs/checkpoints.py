"""Reading trained models: checkpoints of train.py and of fairseq."""

import re
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import torch

from neighborlm.common.contracts import Backbone
from neighborlm.common.digests import compare_once
from neighborlm.common.errors import InputError, raise_no_memory
from neighborlm.common.extras import module_of_extra
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.trainable_lm import TrainableLM
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.models.weights import not_finite
from neighborlm.originals.conversion import load_fairseq_checkpoint
from neighborlm.originals.fairseq_files import is_fairseq_checkpoint
from neighborlm.programs.settings import PretrainedSettings

Model = TypeVar("Model", bound=TrainableLM)


def load_model(path: Path | str) -> TransformerLM | GNNLM:
    """A model from a checkpoint of train.py or of fairseq, on the CPU, for evaluation. Nothing in
    the file is executed: it is read with `weights_only=True`.

    Raises:
        InputError: no such file, not a checkpoint of a model of ours, or one of a training that has
            diverged.
    """
    model = _read(Path(path))
    model.checkpoint = str(path)
    damaged = not_finite(model.state_dict())
    if damaged is not None:
        raise InputError(
            f"{path}: the weights of {damaged} are not finite, as after a training that has "
            "diverged; expected another checkpoint, or a training with a lower --model.lr"
        )
    return model.eval()


def _read(path: Path) -> TransformerLM | GNNLM:
    """What `load_model` gives, whatever its weights are."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such checkpoint"
        raise InputError(f"{path}: {found}; expected a file that train.py or fairseq has written")
    refuse_damaged(path)
    if is_fairseq_checkpoint(path):
        return load_fairseq_checkpoint(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = _described(checkpoint["hyper_parameters"])
        if isinstance(model, GNNLM):
            model.on_load_checkpoint(checkpoint)
            model.lm_fingerprint = checkpoint["lm_fingerprint"]
            model.neighbors = checkpoint["neighbors"]
        model.load_state_dict(checkpoint["state_dict"])
    except InputError:
        raise
    except Exception as error:
        reason = why_unreadable(path, error)
        raise InputError(f"{path}: cannot be read as a checkpoint of train.py: {reason}") from None
    model.dictionary_fingerprint = checkpoint.get("dictionary")
    if isinstance(model, GNNLM):
        model.lm.dictionary_fingerprint = model.dictionary_fingerprint
        given = checkpoint["hyper_parameters"].get("lm_checkpoint")
        model.lm.checkpoint = checkpoint.get("lm_checkpoint", given)
    model.updates = checkpoint.get("global_step", 0)
    return model


def why_unreadable(path: Path, error: Exception) -> str:
    """In a few words, why a file is no checkpoint that can be read; not for want of memory."""
    raise_no_memory(error)
    if not path.is_file() or path.stat().st_size == 0:
        return "it is empty" if path.is_file() else "there is no such file"
    forbidden = re.search(r"GLOBAL (\S+)", str(error))
    if forbidden is not None:
        return f"it holds a {forbidden[1]}, which is no part of one and was not run"
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            cut = file.read(4) == b"PK\x03\x04"
        return "it is cut short" if cut else "torch has not written it"
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    return " ".join(str(error).split())[:120] or type(error).__name__


def refuse_damaged(path: Path) -> None:
    """Compares a checkpoint with the checksums in it, a CRC-32 of every tensor; those in the format
    that torch wrote before 1.6 have none.

    Raises:
        InputError: it is not what was written.
    """
    if zipfile.is_zipfile(path):
        stamps = path.with_name(f".{path.name}.stamps")
        compare_once(stamps, {path: ""}, lambda _: verify_checkpoint(path))


def verify_checkpoint(path: Path) -> None:
    """See `refuse_damaged`; reads all of it.

    Raises:
        InputError: it is not what was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise_no_memory(error)
        damaged = f"{type(error).__name__}: {error}"
    if damaged is not None:
        raise InputError(
            f"{path}: is damaged, it is not what was written ({damaged}); expected a whole copy, "
            "or another checkpoint"
        )


def load_model_of(kind: type[Model], path: Path | str, flag: str) -> Model:
    """`load_model`, of a checkpoint that must hold a model of this kind.

    Args:
        flag: that names the checkpoint.
    """
    model = load_model(path)
    if not isinstance(model, kind):
        raise InputError(
            f"{flag} {path}: holds a {type(model).__name__}; expected a {kind.__name__}"
        )
    return model


def _described(settings: dict[str, Any]) -> TransformerLM | GNNLM:
    """The model that hyper-parameters describe, with random weights."""
    if "lm" not in settings:
        return TransformerLM(**{**settings, "compile": False})
    # A GNN-LM's say besides what its LM is, and which files it came from.
    besides = ("lm", "vocab_size", "lm_checkpoint", "start_from", "pretrained", "revision")
    own = {name: value for name, value in settings.items() if name not in besides}
    if settings.get("pretrained") is not None:
        chosen = PretrainedSettings(settings["pretrained"], settings.get("revision"))
        return GNNLM(load_pretrained(chosen, "a GNN-LM on a model of transformers"), **own)
    return GNNLM(TransformerLM(**settings["lm"]), **own)


def load_pretrained(
    settings: PretrainedSettings, flag: str, tokenizer: str | None = None
) -> Backbone:
    """A causal language model of transformers.

    Args:
        flag: what asks for it, for messages.
        tokenizer: `--data.tokenizer`, to be compared with the model's own.

    Raises:
        InputError: the extra hf is not installed, or there is no such model, or it has another
            tokenizer.
    """
    reading = module_of_extra("neighborlm.programs.pretrained", "hf", flag)
    if tokenizer not in (None, settings.pretrained):
        reading.check_tokenizer(settings, tokenizer)
    return reading.load_pretrained(settings)
