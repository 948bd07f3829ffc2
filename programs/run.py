"""A run: the directory of its files, and how Lightning is told to work for each of its stages.

Programs make one from their command line; from Python `Run("runs/mine", {"max_steps": 200})` does.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from neighborlm.callbacks.lightning_files import Events, WholeCheckpoints
from neighborlm.callbacks.lightning_internals import (
    KeepSigterm,
    LeaveRanks,
    take_named_checkpoints_only,
    watch_ranks,
)
from neighborlm.callbacks.stage_progress import StageProgress
from neighborlm.common.aborts import explain_aborts
from neighborlm.common.contracts import LanguageModel, Want
from neighborlm.common.errors import InputError
from neighborlm.common.log import keep_log
from neighborlm.models.scorer import Scorer
from neighborlm.models.trainable_lm import TrainableLM
from neighborlm.retrieval.cluster.distributed import TIMEOUT
from neighborlm.retrieval.cluster.ranks import Ranks

TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # batches are dealt by the data module
    "enable_model_summary": False,  # `StageProgress` says how many parameters there are
    "accelerator": "auto" if torch.cuda.is_available() else "cpu",
}
"""Settings of every stage's trainer unless the user gives others."""


def run_of(checkpoint: Path | str | None) -> Path | None:
    """The directory of the run that a checkpoint of a training lies in; None where in none.

    >>> run_of("runs/mine/checkpoints/best.ckpt")
    PosixPath('runs/mine')
    """
    path = Path(checkpoint or "")
    in_a_run = path.suffix == ".ckpt" and path.parent.name == "checkpoints"
    return path.parent.parent if in_a_run else None


class Run:
    """Makes the trainers of a run's stages.

    Args:
        directory: of the run's files.
        trainer: settings of `pytorch_lightning.Trainer`, besides or in place of `TRAINER_DEFAULTS`.
        seed: of what a training draws at random, and of the samples that products are made by.
        lost_after: seconds without an answer from another host until the run stops.

    Attributes:
        device: this process's, once there has been a trainer.
        ranks: all processes, once `join_ranks` has been called.
        evaluation: name under which an evaluation logs, beside others of the run.
    """

    def __init__(
        self,
        directory: Path | str,
        trainer: Mapping[str, Any] | None = None,
        seed: int = 1,
        lost_after: int = 30,
    ) -> None:
        self.directory = Path(directory)
        self.settings = {**TRAINER_DEFAULTS, **(trainer or {})}
        self.seed = seed
        self.lost_after = lost_after
        self.device = torch.device("cpu")
        self.ranks: Ranks | None = None
        self.evaluation = ""
        self._done: set[tuple[Any, ...]] = set()

    @property
    def precision(self) -> str:
        """Lightning's precision."""
        return str(self.settings.get("precision") or "32-true")

    @property
    def evaluates_part(self) -> bool:
        """Whether Lightning is told to leave out batches of what it evaluates."""
        limit = self.settings.get("limit_test_batches")
        is_count = isinstance(limit, int)  # 1 is a batch, and 1.0 all of them
        is_limited = limit is not None and (is_count or limit != 1.0)  # Lightning counts 2.0 too
        return is_limited or bool(self.settings.get("fast_dev_run"))

    def is_first_time(self, *what: Any) -> bool:
        """Whether this is asked for the first time."""
        is_first = what not in self._done
        self._done.add(what)
        return is_first

    def remark(self, sentence: str) -> None:
        """Prints something that the user should know, once, by one process for all."""
        if self.is_first_time("remark", sentence) and rank_zero_only.rank == 0:
            print(sentence, flush=True)

    @property
    def hosts(self) -> int:
        """Number of machines."""
        return self.settings.get("num_nodes", 1)

    def trainer(
        self,
        callbacks: Sequence[Callback] = (),
        stage: Literal["train", "evaluate"] = "evaluate",
        trained: TrainableLM | None = None,
    ) -> Trainer:
        """A trainer for one stage, with the user's settings and these callbacks.

        Args:
            callbacks: the stage's own, behind those that the user gives.
            stage: the subdirectory of what is logged.
            trained: the model, where the stage is a training: `fsdp` shares out its parameters,
                gradients and optimiser state. In all other stages each rank has the whole model.

        Raises:
            InputError: Lightning refuses these settings on this machine.
        """
        settings = {**self.settings, "default_root_dir": self.directory}
        for name in ("strategy", "plugins"):  # a trainer makes them its own
            if settings.get(name) is not None:
                settings[name] = deepcopy(settings[name])
        if settings.get("logger") in (None, True):
            place = Path(stage, self.evaluation if stage == "evaluate" else "")
            settings["logger"] = Events(self.directory, place)
        strategy = settings.setdefault("strategy", "auto")
        if strategy == "fsdp":
            one_file = ModelParallelStrategy(save_distributed_checkpoint=False)
            settings["strategy"] = one_file if trained else "ddp"
            settings["inference_mode"] = False  # weights gathered in it could not be trained on
        plugins = settings.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            settings["plugins"] = [*plugins, WholeCheckpoints()]
        chosen = settings.get("callbacks") or []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        own = [LeaveRanks(), KeepSigterm()]
        if not any(isinstance(callback, ProgressBar) for callback in chosen):
            own += [StageProgress(shown=settings.get("enable_progress_bar") is not False)]
            settings["enable_progress_bar"] = False  # Lightning's own
        settings["callbacks"] = [*own, *chosen, *callbacks]
        keep_log(self.directory / "log.txt")
        try:
            trainer = Trainer(**settings)
            ddp = strategy in ("auto", "ddp") and isinstance(trainer.strategy, DDPStrategy)
            if ddp and trained is not None and trained.leaves_out_parameters:
                settings["strategy"] = "ddp_find_unused_parameters_true"
                trainer = Trainer(**settings)
        except (TypeError, ValueError, MisconfigurationException) as error:
            reason = " ".join(str(error).split()).split(". ")[0]
            raise InputError(f"--trainer.*: Lightning cannot do this here: {reason}") from error
        take_named_checkpoints_only(trainer)
        watch_ranks(trainer, self.lost_after)
        explain_aborts()
        self.device = trainer.strategy.root_device
        return trainer

    def from_first_rank(self, value: Any, model: LanguageModel) -> Any:
        """What the first of all ranks calls this with.

        Args:
            model: the one that the stages work with.
        """
        is_alone = self.trainer().world_size == 1
        return value if is_alone else self.join_ranks(model).gather(value)[0]

    def join_ranks(self, model: LanguageModel) -> Ranks:
        """Starts and connects all processes of this run, for what they do together between stages.

        Args:
            model: the one that the stages work with.
        """
        if self.ranks is None:
            self.trainer().predict(Scorer(model, Want()), [], return_predictions=False)
            self.ranks = Ranks.connect(TIMEOUT)
        return self.ranks
