"""Fits a model from a config: `python train.py --config configs/<corpus>/lm.yaml`.

A run that was interrupted goes on from its last checkpoint when the same command is given again.
"""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser

from neighborlm.callbacks.throughput import Throughput
from neighborlm.common.errors import InputError
from neighborlm.common.interrupts import interrupts_held
from neighborlm.datamodules.corpora import SPLITS
from neighborlm.datamodules.lm import ResumableLoader
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.programs.cli import ProgramCLI, check_row_length
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.products import NeighborProducts
from neighborlm.programs.settings import NeighborSettings

BATCHES_TO_BEGIN = 8
"""Of the validation split, by which a graph network is made to begin as the LM."""
COUNTS = ("ready", "started", "processed", "completed")
"""Of batches, as Lightning keeps them."""
FREE_TO_CHANGE = ("cache_dir", "num_workers", "compile", "activation_checkpointing", "shard")
"""Settings that a continued run may have otherwise: they change no number."""


class TrainCLI(ProgramCLI):
    """The command line of train.py."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is not a section; the model's vocabulary is the corpus's."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments(
            "data", "model.vocab_size", lambda data: data.vocab_size, apply_on="instantiate"
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="checkpoint to go on from (default: the run's own last.ckpt, if there is one)",
        )
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=500,
            help="updates after which last.ckpt is saved, as it is at the end and at an interrupt "
            "(but for fsdp)",
        )

    def instantiate_classes(self) -> None:
        """Makes the data module and a new model."""
        if self.arch == "lm":  # known before the corpus is read
            longest = self.config.model.max_target_positions
            check_row_length(self.config.data.tokens_per_sample, longest)
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule, self.model = self.config_init.data, self.config_init.model
        longest = self.model.max_target_positions
        check_row_length(self.config.data.tokens_per_sample, longest)
        self.datamodule.max_target_positions = longest


class Continuation(Callback):
    """Lets a run go on with the numbers it would have had: an interrupt waits for the end of an
    update, a validation that was not finished is made first, and ranks that would go on from
    different updates are refused.

    Args:
        ckpt_path: what this rank goes on from, if anything.
        held: the interrupts that came, as `interrupts_held` gives them.
    """

    def __init__(self, ckpt_path: str | None, held: list[int]) -> None:
        self.ckpt_path = ckpt_path
        self.held = held
        self.owes_validation = False
        self.max_steps: int | None = None  # to be set again after the validation that is owed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The ranks are joined, and nothing is loaded yet."""
        own = 0
        if self.ckpt_path is not None and trainer.world_size > 1:
            like = {"map_location": "cpu", "weights_only": True, "mmap": True}
            own = torch.load(self.ckpt_path, **like)["global_step"]
        first = trainer.strategy.broadcast(own)
        if own != first:
            raise InputError(
                f"{self.ckpt_path or trainer.default_root_dir}: rank {trainer.global_rank} would "
                f"go on from update {own}, but rank 0 from update {first}; expected the same "
                "last.ckpt in the run directories of all hosts"
            )

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Has a validation that is owed begin anew; Lightning would take it as had. The update is
        over, and of the validation's batches one has begun."""
        self.owes_validation = checkpoint["callbacks"].get(self.state_key, {}).get("owed", False)
        if not self.owes_validation:
            return
        loops, nothing = checkpoint["loops"]["fit_loop"], dict.fromkeys(COUNTS, 0)
        for counts in (loops["epoch_loop.batch_progress"][name] for name in ("total", "current")):
            counts["completed"] = counts["processed"]
        progress = loops["epoch_loop.val_loop.batch_progress"]
        progress |= {"total": {**nothing, "ready": 1, "started": 1}, "current": nothing}
        loop = trainer.fit_loop.epoch_loop
        if loop.max_steps == checkpoint["global_step"]:  # it would not even begin
            self.max_steps = loop.max_steps
            loop.max_steps += 1

    def state_dict(self) -> dict[str, bool]:
        """Whether a validation is due that is not finished."""
        return {"owed": self.owes_validation}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trains no more than was asked for, where validations have been given up since."""
        if not self._validates(trainer):
            self._restore_max_steps(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends the run if an interrupt came, all ranks at the same update: all that the last one
        brought about is over."""
        # Lightning counts one too many where it goes on after a validation.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        whole = batch_idx % trainer.accumulate_grad_batches == 0
        if whole and trainer.strategy.reduce_boolean_decision(bool(self.held), all=False):
            raise KeyboardInterrupt

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Knows of a validation that is due before a checkpoint is saved."""
        self.owes_validation = self._validates(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One that has begun anew counts its batches from nothing."""
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Ends the run if an interrupt came, unless gradients of an update would be lost."""
        if self.held and not trainer.fit_loop.epoch_loop._should_accumulate():
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Owes nothing more, before the best checkpoint is saved."""
        self.owes_validation = False
        self._restore_max_steps(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Sees to it, before the last checkpoint is saved, that a batch whose update was not made
        comes again; Lightning would count it as had, and then validate one update too early."""
        for checkpoint in trainer.checkpoint_callbacks:  # also where only a validation has ended
            checkpoint._last_global_step_saved = 0
        progress, loader = trainer.fit_loop.epoch_loop.batch_progress, trainer.train_dataloader
        if (
            isinstance(loader, ResumableLoader)
            and progress.current.ready > progress.current.processed
        ):
            made = trainer.global_step > progress.total.processed
            loader.consumed -= not made
            for counts in (progress.total, progress.current):
                counts.processed += made
                counts.ready = counts.started = counts.completed = counts.processed

    def _validates(self, trainer: Trainer) -> bool:
        """Whether a validation is due at this update."""
        loop = trainer.fit_loop
        return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)

    def _restore_max_steps(self, trainer: Trainer) -> None:
        if self.max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self.max_steps


def checkpoint_to_continue(cli: TrainCLI) -> str | None:
    """The checkpoint that this command goes on from.

    Raises:
        InputError: the run directory holds a run with another model or other data.
    """
    if cli.config.ckpt_path is not None:
        if not Path(cli.config.ckpt_path).is_file():
            raise InputError(f"--ckpt_path {cli.config.ckpt_path}: no such file")
        return cli.config.ckpt_path
    last = cli.run_dir / "checkpoints" / "last.ckpt"
    if not last.is_file():
        return None
    config = cli.run_dir / "config.yaml"
    if not config.is_file():
        raise InputError(
            f"{config}: no such file, but {last} is there; remove it, name it as --ckpt_path, or "
            "choose another --trainer.default_root_dir"
        )
    before = yaml.safe_load(config.read_text())
    now = yaml.safe_load(resolved_config(cli))
    for section in ("model", "data", "neighbors"):
        for name, value in now.get(section, {}).items():
            had = before.get(section, {}).get(name)
            same = had == value or (name == "corpus" and Path(str(had)) == Path(value))
            if name not in FREE_TO_CHANGE and not same:
                raise InputError(
                    f"{cli.run_dir}: holds a run with --{section}.{name} {had}, but this one has "
                    f"{value}; choose another --trainer.default_root_dir"
                )
    print(f"continuing from {last}")
    return str(last)


def give_neighbors(cli: TrainCLI) -> dict[str, float]:
    """Makes what a GNN-LM reads besides the text; the seconds of each stage that was missing."""
    settings = NeighborSettings(**cli.config.neighbors.as_dict())
    products = NeighborProducts(cli, cli.datamodule, cli.model, settings, "stored")
    stored = products.settings.token_features == "stored"
    if stored and cli.model.trains_features and not cli.model.hparams.lm_path_probability:
        raise InputError(
            "--neighbors.token_features is stored, so that --model.unfreeze "
            f"{cli.model.hparams.unfreeze} would train nothing; expected online"
        )
    splits = [split for split in SPLITS if cli.datamodule.has(split)]
    products.attach(*splits)
    if cli.model.hparams.start_from is None:
        loader = cli.datamodule.val_dataloader()
        loader.sampler.dealt = False  # all ranks begin alike
        cli.model.begin_as_lm(islice(loader, BATCHES_TO_BEGIN))
    return products.seconds


def resolved_config(cli: TrainCLI) -> str:
    """Every setting of this run, as YAML."""
    return cli.parser.dump(cli.config, skip_unset=False, skip_link_targets=True)


@exit_with_one_sentence
def main() -> None:
    """Trains, keeping the checkpoint with the lowest validation perplexity and the last one."""
    cli = TrainCLI()
    ckpt_path = checkpoint_to_continue(cli)
    checkpoints = cli.run_dir / "checkpoints"
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
        every_n_train_steps=cli.config.checkpoint_every,
        enable_version_counter=False,
        save_on_exception=cli.config.trainer.strategy != "fsdp",  # not by one rank alone
    )
    cli.make_trainer([], cli.run_dir / "train")  # refuses what it cannot do before any work
    seconds = give_neighbors(cli) if isinstance(cli.model, GNNLM) else {}
    throughput = Throughput()
    with interrupts_held() as held:
        trainer = cli.make_trainer(
            [Continuation(ckpt_path, held), best, last, LearningRateMonitor("step"), throughput],
            log_dir=cli.run_dir / "train",
            training=True,
        )
        if trainer.is_global_zero:
            cli.run_dir.mkdir(parents=True, exist_ok=True)
            (cli.run_dir / "config.yaml").write_text(resolved_config(cli))
            cli.datamodule.dictionary.save(cli.run_dir / "dict.txt")
        trainer.fit(cli.model, cli.datamodule, ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(checkpoints / "last.ckpt")
        if trainer.is_global_zero:
            write_summary(cli.run_dir / "training.json", trainer, best, throughput, seconds)


def write_summary(
    path: Path,
    trainer: Trainer,
    best: ModelCheckpoint,
    throughput: Throughput,
    seconds: dict[str, float],
) -> None:
    """Writes and prints what came of the run."""
    score, tokens = best.best_model_score, throughput.trained_tokens
    if tokens or not path.exists():  # not when a finished run was started again
        summary = {
            "updates": trainer.global_step,
            "tokens_per_second": tokens / throughput.trained_seconds if tokens else None,
            "best_valid_ppl": None if score is None else score.item(),
            "stage_seconds": seconds,
        }
        path.write_text(json.dumps(summary, indent=1) + "\n")
    if score is not None:
        print(f"lowest validation perplexity {score:.2f}: {best.best_model_path}")


if __name__ == "__main__":
    main()
