"""Reading trained models, and telling them apart."""

import hashlib
from pathlib import Path

import torch

from errors import InputError
from models.fairseq import is_fairseq_checkpoint, load_fairseq_checkpoint
from models.transformer_lm import TransformerLM

COMPUTING = ("heads", "pre_norm", "scale_embedding", "activation", "positions")
"""Settings that weights of the same shapes may differ in."""


def load_model(path: Path) -> TransformerLM:
    """A `TransformerLM` from a checkpoint of train.py or of fairseq, on the CPU, for evaluation.
    Nothing in the file is executed: it is read with `weights_only=True`.

    Raises:
        InputError: no such file, or not a checkpoint of this model.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; train.py makes one (--ckpt_path names it)")
    if is_fairseq_checkpoint(path):
        return load_fairseq_checkpoint(path).eval()
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = TransformerLM(**{**checkpoint["hyper_parameters"], "compile": False})
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(f"{path}: cannot be read as a checkpoint of train.py ({reason})") from None
    model.dictionary_fingerprint = checkpoint.get("dictionary")
    model.updates = checkpoint.get("global_step", 0)
    return model.eval()


def model_fingerprint(model: TransformerLM) -> str:
    """A hash of all weights and of the settings that change what they compute, whatever file they
    came from."""
    settings = {name: model.hparams[name] for name in COMPUTING}
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
