"""The architectures of language models that the programs know by name (`--arch`): how a model of
each is made for a training, and how it comes to an evaluation.

A model of another kind is a class with the methods of `common.contracts.LanguageModel` and one line
here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from neighborlm.common.contracts import LanguageModel
from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.gnn_lm import GNNLM, OF_NETWORK
from neighborlm.models.trainable_lm import TrainableLM
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs.checkpoints import load_model, load_model_of, load_pretrained
from neighborlm.programs.settings import PretrainedSettings


class Source(NamedTuple):
    """What a model that is to be evaluated can be made from.

    Attributes:
        data: the corpus.
        checkpoint: `--ckpt_path`, by default checkpoints/best.ckpt of the run directory; need not
            be there.
        settings: what the command line and the config files say under `model`.
    """

    data: LMDataModule
    checkpoint: Path
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How models of one kind are made.

    Attributes:
        load: gives a model to evaluate.
        make: gives a new one to train; its parameters are the flags `--model.*`, and their help is
            in its docstring, but for `vocab_size`, which is the corpus's. None where models of
            this kind are not trained here.
        has_neighbors: whether batches must have what a GNN-LM reads (`--neighbors.*`).
        settings: a dataclass that the flags `--model.*` of an evaluation fill; None where a
            checkpoint has all that they could say.
    """

    load: Callable[[Source], LanguageModel]
    make: Callable[..., TrainableLM] | None = None
    has_neighbors: bool = False
    settings: type | None = None


def load_transformer_lm(source: Source) -> TransformerLM:
    """The `TransformerLM` of a checkpoint."""
    return _load(TransformerLM, source, "lm")


def load_gnn_lm(source: Source) -> GNNLM:
    """The `GNNLM` of a checkpoint."""
    return _load(GNNLM, source, "gnn_lm")


def load_huggingface(source: Source) -> LanguageModel:
    """The model of transformers that the settings name."""
    settings = PretrainedSettings(**source.settings)
    return load_pretrained(settings, "--arch huggingface", source.data.settings.tokenizer)


def _load(kind: type[TrainableLM], source: Source, arch: str) -> TrainableLM:
    model = load_model(source.checkpoint)
    if not isinstance(model, kind):
        raise InputError(
            f"{source.checkpoint}: holds a {type(model).__name__}, but --arch is {arch} "
            "(the first line of a gnn_lm.yaml); expected the config that it was trained with"
        )
    return model


def make_gnn_lm(
    vocab_size: int,
    lm_checkpoint: str | None = None,
    pretrained: str | None = None,
    revision: str | None = None,
    start_from: str | None = None,
    lm: Literal[None] = None,
    **settings,
) -> GNNLM:
    """A graph network to train, on top of a trained LM or as an earlier training left it.

    Args:
        vocab_size: number of ids; the program takes it from the corpus.
        lm_checkpoint: checkpoint of the trained LM, from train.py or from fairseq.
        pretrained: a causal language model of transformers in place of lm_checkpoint, a directory
            or a name on the Hugging Face hub; its tokenizer reads the text.
        revision: branch, tag or commit of a name on the hub.
        start_from: checkpoint of a GNN-LM to continue from in a second stage of training, in place
            of lm_checkpoint. It gives all weights, the LM's included, and the settings from layers
            to output_bias, which need not be repeated.
        lm: null in config files of earlier versions; leave it out.

    Raises:
        InputError: a checkpoint cannot be read, or does not fit the settings or the corpus.
    """
    start = None
    if start_from is not None:
        start = load_model_of(GNNLM, Path(start_from), "--model.start_from")
        settings.update(_settings_of_start(start, start_from, settings))
        lm = start.lm
    elif lm_checkpoint is not None:
        lm = load_model_of(TransformerLM, Path(lm_checkpoint), "--model.lm_checkpoint")
    elif pretrained is not None:
        lm = load_pretrained(PretrainedSettings(pretrained, revision), "--model.pretrained")
    else:
        raise InputError(
            "--model.lm_checkpoint is missing; expected the checkpoint of a trained LM, or a model "
            "of transformers as --model.pretrained"
        )
    subwords = getattr(lm, "reads_subwords", False)  # there may be fewer than word vectors
    if lm.vocab_size != vocab_size and not (subwords and vocab_size < lm.vocab_size):
        flags = {"start_from": start_from, "lm_checkpoint": lm_checkpoint, "pretrained": pretrained}
        flag = next(f"{name} {given}" for name, given in flags.items() if given is not None)
        raise InputError(
            f"--model.{flag}: has a vocabulary of {lm.vocab_size}, but the corpus one of "
            f"{vocab_size}; pass the LM's dict.txt as --data.dictionary"
        )
    model = GNNLM(lm, **settings)
    if start is not None:
        pretrained, revision = (start.hparams.get(name) for name in ("pretrained", "revision"))
    came_from = {"lm_checkpoint": lm_checkpoint, "start_from": start_from}
    model.save_hyperparameters(came_from | {"pretrained": pretrained, "revision": revision})
    if start is not None:
        model.load_state_dict(start.state_dict())
        model.lm_fingerprint, model.neighbors = start.lm_fingerprint, start.neighbors
    return model


def _settings_of_start(start: GNNLM, path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `OF_NETWORK` of a GNN-LM to start from.

    Raises:
        InputError: others are given, or its weights would not have a place.
    """
    for name in OF_NETWORK:
        value = given.get(name)
        if value is not None and value != start.hparams[name]:
            raise InputError(
                f"--model.{name} is {value}, but --model.start_from {path} has "
                f"{start.hparams[name]}; expected the same, or no such flag"
            )
    own_softmax = start.softmax not in (None, start.lm.softmax) and not start.hparams.output_bias
    if own_softmax and "adaptive_softmax" not in given.get("unfreeze", ()):
        raise InputError(
            f"--model.start_from {path}: has trained a softmax of its own; expected "
            "--model.unfreeze to name adaptive_softmax"
        )
    return {name: start.hparams[name] for name in OF_NETWORK}


ARCHITECTURES: dict[str, Architecture] = {
    "lm": Architecture(load_transformer_lm, TransformerLM),
    "gnn_lm": Architecture(load_gnn_lm, make_gnn_lm, has_neighbors=True),
    "huggingface": Architecture(load_huggingface, settings=PretrainedSettings),
}
