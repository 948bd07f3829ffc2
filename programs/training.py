"""Fits a model: `train` takes a model, a corpus and a run, and leaves its best and last checkpoints
in the run's directory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import Timeout
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint

from neighborlm.callbacks.lightning_internals import Continuation
from neighborlm.callbacks.random_numbers import RandomNumbers
from neighborlm.callbacks.throughput import Throughput
from neighborlm.common.errors import InputError
from neighborlm.common.files import Lock, write_whole
from neighborlm.common.interrupts import interrupts_held
from neighborlm.datamodules.corpora import SPLITS
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.trainable_lm import TrainableLM
from neighborlm.programs.belonging import (
    check_continuation,
    check_dictionary,
    join,
    remark_on_end,
)
from neighborlm.programs.board import log_training
from neighborlm.programs.checkpoints import refuse_damaged, why_unreadable
from neighborlm.programs.neighbor_products import NeighborProducts
from neighborlm.programs.places import as_json
from neighborlm.programs.plausibility import check_ids
from neighborlm.programs.run import Run
from neighborlm.programs.settings import NeighborSettings

BATCHES_TO_BEGIN = 8
"""Of the validation split, by which a graph network is made to begin as the LM."""

LOCK_PATIENCE = 10
"""Seconds until another training in the same directory is believed: workers of one that was killed
hold its lock for a few more."""


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Attributes:
        checkpoint: the model with the lowest validation perplexity, in the run's directory; None
            where there was no validation.
        updates: of the optimiser.
        best_valid_ppl: validation perplexity of that model.
        tokens_per_second: of this process's training, validation left out; None where nothing was
            left to train.
        stage_seconds: of the stages that made what was missing.
    """

    checkpoint: Path | None
    updates: int
    best_valid_ppl: float | None
    tokens_per_second: float | None
    stage_seconds: dict[str, float]


def train(
    model: TrainableLM,
    data: LMDataModule,
    run: Run,
    *,
    ckpt_path: Path | str | None = None,
    checkpoint_every: int = 500,
    neighbors: NeighborSettings | None = None,
    config: str | None = None,
) -> Trained:
    """Trains a model; keeps the checkpoint with the lowest validation perplexity and the last one.

    Interrupts wait for the end of an update; a run that goes on from `last.ckpt` has the numbers of
    one that was never interrupted.

    Args:
        model: to train.
        data: the corpus.
        run: where checkpoints and figures go, and how Lightning trains.
        ckpt_path: checkpoint to go on from.
        checkpoint_every: updates after which last.ckpt is saved.
        neighbors: what a GNN-LM sees of its neighbours; what is missing of them is made first.
        config: YAML that describes the run, kept beside the checkpoints; by default what the
            command line would write.

    Raises:
        InputError: the directory holds another run, another training goes on in it, the checkpoint
            is of another model or not whole, or a setting leaves nothing to train.
        Diverged: loss, gradient or weights are not finite; the checkpoints of before stay.
    """
    check_settings(run.settings, checkpoint_every)
    if isinstance(model, GNNLM):
        check_dictionary(model.lm, data)
        check_ids(model, data, run)
    join(model, data)
    checkpoint = None if ckpt_path is None else read_checkpoint(Path(ckpt_path))
    if checkpoint is not None:
        check_continuation(checkpoint, Path(ckpt_path), model, data, run)
    trainer = run.trainer(stage="train")  # refuses what it cannot do before any work
    if checkpoint is not None:
        remark_on_end(checkpoint, trainer, run)
    check_validation_interval(trainer, data)
    model.checkpoint = None  # which its weights will not be those of
    model.dictionary_fingerprint = data.dictionary.fingerprint
    with only_training_in(run.directory, trainer):
        return _train(model, data, run, ckpt_path, checkpoint_every, neighbors, config)


def _train(
    model: TrainableLM,
    data: LMDataModule,
    run: Run,
    ckpt_path: Path | str | None,
    checkpoint_every: int,
    neighbors: NeighborSettings | None,
    config: str | None,
) -> Trained:
    """What `train` does where nobody else trains in the run's directory."""
    checkpoints = run.directory / "checkpoints"
    here = ckpt_path is not None and Path(ckpt_path).parent.resolve() == checkpoints.resolve()
    if not here and (checkpoints / "last.ckpt").is_file():
        raise InputError(
            f"{checkpoints / 'last.ckpt'}: there is a run already; expected it as the checkpoint "
            f"to go on from{'' if ckpt_path is None else f', not {ckpt_path}'}, or another "
            "directory (--trainer.default_root_dir)"
        )
    best = ModelCheckpoint(
        checkpoints,
        filename="best",
        monitor="val/ppl",
        save_last=False,
        enable_version_counter=False,
    )
    last = ModelCheckpoint(
        checkpoints,
        filename="last",
        every_n_train_steps=checkpoint_every,
        enable_version_counter=False,
        save_on_exception=run.settings.get("strategy") != "fsdp",  # not by one rank alone
    )
    seconds = {}
    if isinstance(model, GNNLM):
        seconds = give_neighbors(model, data, run, neighbors or NeighborSettings())
    throughput = Throughput()
    with interrupts_held() as held:
        continuation = Continuation(ckpt_path, held)
        logs = run.settings.get("logger") is not False
        watching = [LearningRateMonitor("step")] if logs else []
        callbacks = [continuation, RandomNumbers(run.seed), best, last, *watching, throughput]
        trainer = run.trainer(callbacks, stage="train", trained=model)
        if trainer.is_global_zero:
            run.directory.mkdir(parents=True, exist_ok=True)
            described = config or described_run(model, data, run, checkpoint_every, neighbors)
            write_whole(run.directory / "config.yaml", described)
            data.dictionary.save(run.directory / "dict.txt")
        trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(checkpoints / "last.ckpt")
        score, tokens = best.best_model_score, throughput.trained_tokens
        trained = Trained(
            checkpoint=Path(best.best_model_path) if best.best_model_path else None,
            updates=trainer.global_step,
            best_valid_ppl=None if score is None else score.item(),
            tokens_per_second=tokens / throughput.trained_seconds if tokens else None,
            stage_seconds=seconds,
        )
        summary = run.directory / "training.json"
        # Not when a finished run was started again.
        if trainer.is_global_zero and (tokens or not summary.exists()):
            figures = asdict(trained) | {"checkpoint": str(trained.checkpoint)}
            figures["seconds"] = throughput.trained_seconds
            figures["time"] = datetime.now().astimezone().isoformat(timespec="seconds")
            write_whole(summary, as_json(figures))
            if score is not None:
                best_ppl = {"val/best_ppl": score.item()}
                settings = yaml.safe_load(described)
                log_training(settings, best_ppl, run, trainer.global_step, trainer.loggers)
    return trained


def described_run(
    model: TrainableLM,
    data: LMDataModule,
    run: Run,
    checkpoint_every: int,
    neighbors: NeighborSettings | None,
) -> str:
    """The YAML by which an evaluation takes over what was trained on."""
    rows = ("break_mode", "tokens_per_sample", "context_window", "max_tokens", "drop_long_lines")
    loading = ("num_workers", "seed")
    text = {**asdict(data.settings), "cache_dir": str(data.settings.cache_dir)}
    settings: dict[str, Any] = {
        "arch": "gnn_lm" if isinstance(model, GNNLM) else "lm",
        "seed_everything": run.seed,
        "trainer": {"precision": run.settings.get("precision")},
        "model": dict(model.hparams),
        "data": text | {name: getattr(data, name) for name in (*rows, *loading)},
        "checkpoint_every": checkpoint_every,
    }
    if neighbors is not None:
        settings["neighbors"] = asdict(neighbors)
    return yaml.safe_dump(settings)


def check_settings(settings: Mapping[str, Any], checkpoint_every: int) -> None:
    """Raises InputError where a setting of the trainer leaves nothing to do, or divides by zero."""
    if checkpoint_every < 1:
        raise InputError(f"--checkpoint_every is {checkpoint_every}; expected at least 1 update")
    for name in ("log_every_n_steps", "accumulate_grad_batches"):
        value = settings.get(name)
        if value is not None and value < 1:
            raise InputError(f"--trainer.{name} is {value}; expected at least 1")
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if settings.get(name) == 0:
            raise InputError(f"--trainer.{name} is 0, which trains nothing; expected more")


def check_validation_interval(trainer: Trainer, data: LMDataModule) -> None:
    """Raises InputError where there is no text for validations, or an epoch ends before the first
    of them."""
    if trainer.limit_val_batches:
        data.stream("valid")
    interval = trainer.val_check_interval
    if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None:
        return
    batches = -(-len(data.train_dataloader().sampler.batches) // trainer.world_size)
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if interval > batches and trainer.limit_val_batches:
        raise InputError(
            f"--trainer.val_check_interval is {interval}, but an epoch has {batches} batches; "
            "expected at most that, or --trainer.check_val_every_n_epoch null, which counts the "
            "batches of all epochs"
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint from which a training goes on, its tensors mapped into memory. Nothing in it is
    executed.

    Raises:
        InputError: it is not one, or not whole.
    """
    refuse_damaged(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for part in ("state_dict", "hyper_parameters", "optimizer_states", "loops"):
            checkpoint[part]
    except Exception as error:
        reason = why_unreadable(path, error)
        raise InputError(
            f"{path}: cannot be read as a checkpoint of train.py: {reason}; expected a whole one "
            "to go on from"
        ) from None
    return checkpoint


@contextmanager
def only_training_in(directory: Path, trainer: Trainer) -> Iterator[None]:
    """Holds a lock on a run's directory, for all ranks by the first of them.

    Raises:
        InputError: another training goes on there.
    """
    if not trainer.is_global_zero:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    lock = Lock(directory / ".training.lock")
    try:
        lock.acquire(timeout=LOCK_PATIENCE)
    except Timeout:
        raise InputError(
            f"{directory}: another training goes on in this directory; expected its end, or "
            "another --trainer.default_root_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def give_neighbors(
    model: GNNLM, data: LMDataModule, run: Run, settings: NeighborSettings
) -> dict[str, float]:
    """Makes what a GNN-LM reads besides the text; the seconds of each stage that was missing."""
    start = model.hparams.get("start_from")
    products = NeighborProducts(run, data, model, settings, "stored", start)
    stored = products.settings.token_features == "stored"
    if stored and model.trains_features and not model.hparams.lm_path_probability:
        raise InputError(
            "--neighbors.token_features is stored, so that --model.unfreeze "
            f"{model.hparams.unfreeze} would train nothing; expected online"
        )
    products.attach(*(split for split in SPLITS if data.has(split)))
    if start is None:
        loader = data.val_dataloader()
        loader.sampler.dealt = False  # all ranks begin alike
        model.begin_as_lm(islice(loader, BATCHES_TO_BEGIN))
    return products.seconds
