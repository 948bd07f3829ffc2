"""Reading trained models, and telling them apart."""

import hashlib
from pathlib import Path

import torch

from neighborlm.common.errors import InputError
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.language_model import LanguageModel
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.originals.fairseq import is_fairseq_checkpoint, load_fairseq_checkpoint

COMPUTING = (
    *("heads", "pre_norm", "scale_embedding", "activation", "positions"),
    *("intra_context", "lm_ratio"),
)
"""Settings that weights of the same shapes may differ in."""


def load_model(path: Path) -> LanguageModel:
    """A model from a checkpoint of train.py or of fairseq, on the CPU, for evaluation. Nothing in
    the file is executed: it is read with `weights_only=True`.

    Raises:
        InputError: no such file, or not a checkpoint of a model of ours.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; train.py makes one (--ckpt_path names it)")
    if is_fairseq_checkpoint(path):
        return load_fairseq_checkpoint(path).eval()
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings = checkpoint["hyper_parameters"]
        if "lm" in settings:
            model = GNNLM(**{**settings, "start_from": None})
            model.lm_fingerprint = checkpoint["lm_fingerprint"]
            model.neighbors = checkpoint["neighbors"]
        else:
            model = TransformerLM(**{**settings, "compile": False})
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(f"{path}: cannot be read as a checkpoint of train.py ({reason})") from None
    model.dictionary_fingerprint = checkpoint.get("dictionary")
    model.updates = checkpoint.get("global_step", 0)
    return model.eval()


def model_fingerprint(model: LanguageModel) -> str:
    """A hash of all weights and of the settings that change what they compute, whatever file they
    came from."""
    settings = {name: model.hparams[name] for name in COMPUTING if name in model.hparams}
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
