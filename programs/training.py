"""Fits a model: `train` takes a model, a corpus and a run, and leaves its best and last checkpoints
in the run's directory."""

import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import yaml
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint

from neighborlm.callbacks.lightning_internals import Continuation
from neighborlm.callbacks.random_numbers import RandomNumbers
from neighborlm.callbacks.throughput import Throughput
from neighborlm.common.errors import InputError
from neighborlm.common.interrupts import interrupts_held
from neighborlm.datamodules.corpora import SPLITS
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.trainable_lm import TrainableLM
from neighborlm.programs.products import NeighborProducts
from neighborlm.programs.run import Run
from neighborlm.programs.settings import NeighborSettings

BATCHES_TO_BEGIN = 8
"""Of the validation split, by which a graph network is made to begin as the LM."""


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
        config: YAML that describes the run, kept beside the checkpoints; by default the model's
            settings.

    Raises:
        InputError: the directory holds another run.
    """
    checkpoints = run.directory / "checkpoints"
    if ckpt_path is None and (checkpoints / "last.ckpt").is_file():
        raise InputError(
            f"{checkpoints / 'last.ckpt'}: there is a run already; expected it as the checkpoint "
            "to go on from, or another directory"
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
    run.trainer(stage="train")  # refuses what it cannot do before any work
    seconds = {}
    if isinstance(model, GNNLM):
        seconds = give_neighbors(model, data, run, neighbors or NeighborSettings())
    throughput = Throughput()
    with interrupts_held() as held:
        continuation = Continuation(ckpt_path, held)
        watching = [LearningRateMonitor("step"), throughput]
        callbacks = [continuation, RandomNumbers(run.seed), best, last, *watching]
        trainer = run.trainer(callbacks, stage="train", trained=model)
        if trainer.is_global_zero:
            run.directory.mkdir(parents=True, exist_ok=True)
            described = config or yaml.safe_dump({"model": dict(model.hparams)})
            (run.directory / "config.yaml").write_text(described)
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
            summary.write_text(json.dumps(figures, indent=1) + "\n")
    return trained


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
