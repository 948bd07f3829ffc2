"""Whether a model, a corpus and a run belong together: the dictionary, the text, the length of rows
and, of a run that goes on, what it was begun with.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Timer

from neighborlm.common.contracts import LanguageModel
from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.trainable_lm import TrainableLM
from neighborlm.programs.run import Run, run_of


def join(model: LanguageModel, data: LMDataModule, name: Path | str | None = None) -> None:
    """Has the corpus cut its rows for a model.

    Args:
        name: of the model in messages; by default its checkpoint.

    Raises:
        InputError: the model has another dictionary, or cannot read rows that long.
    """
    data.read_by(model.max_target_positions)
    check_dictionary(model, data, name)


def check_dictionary(
    model: LanguageModel, data: LMDataModule, name: Path | str | None = None
) -> None:
    """Refuses a model that was trained with another dictionary than the corpus has.

    Args:
        name: of the model in messages; by default its checkpoint.
    """
    expected, size = getattr(model, "dictionary_fingerprint", None), model.vocab_size
    if getattr(model, "reads_subwords", False):
        if data.settings.tokenizer is None or data.vocab_size > size:
            raise InputError(
                f"--data.tokenizer {data.settings.tokenizer}: gives ids up to "
                f"{data.vocab_size - 1}, but the model has a vocabulary of {size}; expected the "
                "model's own tokenizer"
            )
        size = data.vocab_size  # there are often more word vectors than tokens
    name = name or getattr(model, "checkpoint", None) or "the model"
    _compare_dictionaries(name, (size, expected), data)


def _compare_dictionaries(
    name: Path | str, expected: tuple[int, str | None], data: LMDataModule
) -> None:
    """Compares size and fingerprint; a fingerprint of None is unknown."""
    size, fingerprint = expected
    found = data.dictionary.fingerprint
    if size == data.vocab_size and fingerprint in (None, found):
        return
    given = data.settings.dictionary
    of_corpus = f"--data.dictionary {given}" if given else f"--data.corpus {data.settings.corpus}"
    run = run_of(name)
    own = f"{run}/dict.txt" if run and (run / "dict.txt").is_file() else "its run's dict.txt"
    raise InputError(
        f"{name}: was trained with a dictionary of {size:,} symbols ({fingerprint or 'unknown'}), "
        f"but {of_corpus} gives one of {data.vocab_size} ({found}); expected {own} as "
        "--data.dictionary, or the text that it was trained on"
    )


# -- runs that go on -----------------------------------------------------------------------------


def check_continuation(
    checkpoint: Mapping[str, Any], path: Path, model: TrainableLM, data: LMDataModule, run: Run
) -> None:
    """Refuses a checkpoint from which this training cannot go on.

    Args:
        checkpoint: the content of `path`.

    Raises:
        InputError: it is of another kind of model, another dictionary or other sizes or, where it
            is the run's own, of another text.
    """
    name = f"--ckpt_path {path}"
    settings = checkpoint["hyper_parameters"]
    is_gnn = "lm" in settings
    if isinstance(model, GNNLM) != is_gnn:
        raise InputError(
            f"{name}: holds {'a GNN-LM' if is_gnn else 'an LM'}, but this command trains a "
            f"{type(model).__name__}; expected another --arch or checkpoint"
        )
    subwords = getattr(model, "reads_subwords", False)
    size = data.vocab_size if subwords else settings.get("vocab_size", data.vocab_size)
    _compare_dictionaries(path, (size, checkpoint.get("dictionary")), data)
    if _same_place(run_of(path), run.directory) and is_same_text(checkpoint, data) is False:
        raise InputError(
            f"{path}: was trained on another text than {data.settings.corpus} holds now; expected "
            "the text of then, or another --trainer.default_root_dir to begin anew"
        )
    own = model.state_dict()
    for tensor_name, tensor in checkpoint["state_dict"].items():
        if tensor_name in own and own[tensor_name].shape != tensor.shape:
            raise InputError(
                f"{name}: its {tensor_name} has the shape {tuple(tensor.shape)}, but that of this "
                f"command's model is {tuple(own[tensor_name].shape)}; expected the settings that "
                "it was trained with"
            )


def is_same_text(checkpoint: Mapping[str, Any], data: LMDataModule) -> bool | None:
    """Whether the corpus holds what a checkpoint was trained and validated on, wherever it lies;
    None where the checkpoint does not say."""
    trained_on = checkpoint.get("corpus")
    if trained_on is None:
        return None
    same = all(data.has(split) and data.fingerprint(split) == f for split, f in trained_on.items())
    return same and checkpoint.get("dictionary") == data.dictionary.fingerprint


def remark_on_end(checkpoint: Mapping[str, Any], trainer: Trainer, run: Run) -> None:
    """Says where nothing is left to train."""
    updates = checkpoint["global_step"]
    flag = None
    if 0 <= trainer.max_steps <= updates:
        flag = f"--trainer.max_steps {trainer.max_steps}"
    for timer in (c for c in trainer.callbacks if isinstance(c, Timer)):
        timer.load_state_dict(checkpoint.get("callbacks", {}).get(timer.state_key, {}))
        remaining = timer.time_remaining()
        if remaining is not None and remaining <= 0:
            flag = f"--trainer.max_time {run.settings['max_time']}"
    if flag is not None:
        run.remark(
            f"{run.directory}: has been trained as long as {flag} allows, by {updates:,} updates; "
            "more of it trains further, another --trainer.default_root_dir begins anew"
        )


def _same_place(place: Path | None, other: Path) -> bool:
    return place is not None and place.resolve() == other.resolve()
