"""All that depends on how Lightning works inside: its private names, the layout of its checkpoints
and the signals it takes. A new release of Lightning is checked against this file.
"""

import signal
import threading
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from pytorch_lightning.trainer.connectors.checkpoint_connector import _CheckpointConnector
from pytorch_lightning.utilities import rank_zero_only

from neighborlm.common.errors import Diverged, InputError
from neighborlm.datamodules.lm import ResumableLoader
from neighborlm.retrieval.cluster.ending import ENDING
from neighborlm.retrieval.cluster.rank_watch import watch_from_the_start

COUNTS = ("ready", "started", "processed", "completed")
"""Of batches, as Lightning keeps them."""


class _OwnCheckpoints(_CheckpointConnector):
    """Lightning's, but that it takes no checkpoint that nobody has named."""

    _hpc_resume_path = None


def take_named_checkpoints_only(trainer: Trainer) -> None:
    """In a job of Slurm, Lightning would save `hpc_ckpt_N.ckpt` in the run's directory and queue
    the job again; from then on it would load that file, in all stages, in the place of the model
    that it is given."""
    trainer._checkpoint_connector = _OwnCheckpoints(trainer)
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False


class Continuation(Callback):
    """Lets a run go on with the numbers it would have had: an interrupt waits for the end of an
    update, a validation that was not finished is made first, and ranks that would go on from
    different updates are refused. A training that ends before any validation has one at its end.

    Args:
        ckpt_path: what this rank goes on from, if anything.
        held: the interrupts that came, as `interrupts_held` gives them.
    """

    def __init__(self, ckpt_path: str | None, held: list[int]) -> None:
        self.ckpt_path = ckpt_path
        self.held = held
        self.owes_validation = False
        self.max_steps: int | None = None  # to be set again after the validation that is owed
        self.updates_before = 0  # the batch that has begun last

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
        over, and of the validation's batches one has begun. The best model is that of the run,
        wherever it was moved."""
        for saving in trainer.checkpoint_callbacks:
            if saving.state_key in checkpoint["callbacks"]:
                self._find_best(checkpoint["callbacks"][saving.state_key], Path(saving.dirpath))
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
        """Trains no more than was asked for, where validations have been given up since, and saves
        nothing between the batches of an update because one was saved just before them."""
        if self.owes_validation:
            self._validate_at_the_end(trainer)
        if not self._validates(trainer):
            self._restore_max_steps(trainer)
        for checkpoint in trainer.checkpoint_callbacks:
            if checkpoint._every_n_train_steps:
                checkpoint._last_global_step_saved = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends the run if an interrupt came, all ranks at the same update: all that the last one
        brought about is over."""
        self.updates_before = trainer.global_step
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
        self._validate_at_the_end(trainer)
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
        """Sees to it, before the last checkpoint is saved, that the batches of an update that was
        not made come again; Lightning would count them as had, and then validate too early. A
        training that has diverged saves nothing more."""
        for checkpoint in trainer.checkpoint_callbacks:  # also where only a validation has ended
            diverged = isinstance(exception, Diverged)
            checkpoint._last_global_step_saved = trainer.global_step if diverged else 0
        progress, loader = trainer.fit_loop.epoch_loop.batch_progress, trainer.train_dataloader
        if not isinstance(loader, ResumableLoader):
            return
        had, begun = progress.current.processed, progress.current.ready
        if begun > had and trainer.global_step > self.updates_before:  # made, but not counted yet
            again, counted = 0, 1
        elif begun > had or trainer.fit_loop.epoch_loop._should_accumulate():
            before = had % trainer.accumulate_grad_batches  # in the same update
            again, counted = before + begun - had, -before
        else:
            return
        loader.consumed -= again
        for counts in (progress.total, progress.current):
            counts.processed += counted
            counts.ready = counts.started = counts.completed = counts.processed

    def _find_best(self, state: dict[str, Any], folder: Path) -> None:
        """Has the state of a `ModelCheckpoint` name the best model by where it lies now. Lightning
        would forget the score where a run was moved, and the next model, however bad, would take
        the best one's place; of a model that is gone, or another run's, it would keep what the run
        must not count on.

        Args:
            folder: of the run's checkpoints.
        """
        best, score = folder / Path(state["best_model_path"]).name, None
        places = Path(self.ckpt_path).parent.resolve(), Path(state["dirpath"])
        if state["best_model_path"] and folder.resolve() in places:
            if best.is_file():
                score = state["best_model_score"]
            elif rank_zero_only.rank == 0:
                print(f"{best}: is missing; the next model that is validated takes its place")
        there = {} if score is None else {str(best): score}
        state |= {"dirpath": str(folder), "best_model_score": score, "best_k_models": there}
        state |= {"kth_value": torch.as_tensor(inf if score is None else score)}
        state |= dict.fromkeys(("best_model_path", "kth_best_model_path"), "".join(there))

    def _validates(self, trainer: Trainer) -> bool:
        """Whether a validation is due at this update."""
        loop = trainer.fit_loop
        return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)

    def _validate_at_the_end(self, trainer: Trainer) -> None:
        """Has a validation due where the training ends and there was none, and so no best model."""
        loop = trainer.fit_loop
        max_steps = loop.max_steps if self.max_steps is None else self.max_steps
        last_epoch = 0 <= loop.max_epochs <= loop.epoch_progress.current.processed + 1
        ends = 0 <= max_steps <= trainer.global_step or (
            last_epoch and loop.epoch_loop._num_ready_batches_reached()
        )
        best = (c.best_model_path for c in trainer.checkpoint_callbacks if c.monitor)
        if ends and not any(best):
            trainer.check_val_every_n_epoch, trainer.val_check_batch = None, 1

    def _restore_max_steps(self, trainer: Trainer) -> None:
        if self.max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self.max_steps


class _Launcher(_SubprocessScriptLauncher):
    """Lightning's, but that this process says why it ends when one that it has started does:
    Lightning's own kills all of them, this one too, some seconds later."""

    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Starts the other ranks of this host, and then calls the function."""
        self.cluster_environment.validate_settings(self.num_processes, self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            ENDING.follow_started(self.procs)
        _set_num_threads_if_needed(self.num_processes)
        return function(*args, **kwargs)


def watch_ranks(trainer: Trainer, lost_after: int) -> None:
    """Has every rank stop when another is lost, from the moment on that it is started.

    Args:
        lost_after: seconds without an answer from a host.
    """
    strategy = trainer.strategy
    if trainer.world_size == 1:
        return
    if isinstance(strategy.launcher, _SubprocessScriptLauncher):
        strategy.launcher.__class__ = _Launcher
    make_group = strategy.setup_environment
    strategy.setup_environment = partial(_watch_and_make_group, trainer, lost_after, make_group)


def _watch_and_make_group(trainer: Trainer, lost_after: int, make_group: Callable) -> None:
    strategy = trainer.strategy
    strategy.set_world_ranks()
    environment = strategy.cluster_environment
    main = environment.main_address, environment.main_port
    several_hosts = trainer.num_nodes > 1
    watch_from_the_start(trainer.global_rank, trainer.world_size, main, several_hosts, lost_after)
    make_group()


class LeaveRanks(Callback):
    """Lets the other ranks go when this one meets an exception."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The others need not have met an exception: what is saved because of it is saved without
        waiting for them. And Lightning ends its processes after an interrupt, which is no loss."""
        trainer.strategy.barrier = lambda name=None: None
        if isinstance(exception, KeyboardInterrupt):
            ENDING.leave("stop")


class KeepSigterm(Callback):
    """Leaves SIGTERM what it was: Lightning would exchange messages with other ranks in the middle
    of whatever it interrupts, and go on with an evaluation."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning has not taken it yet."""
        self.handler = signal.getsignal(signal.SIGTERM)

    def _keep(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handler)

    on_sanity_check_start = on_train_start = on_test_start = on_predict_start = _keep
