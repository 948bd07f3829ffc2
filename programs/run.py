"""A run: the directory of its files, and how Lightning is told to work for each of its stages.

Programs make one from their command line; from Python `Run("runs/mine", {"max_steps": 200})` does.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from neighborlm.callbacks.lightning_internals import (
    KeepSigterm,
    WatchRanks,
    WholeCheckpoints,
    take_named_checkpoints_only,
)
from neighborlm.common.contracts import LanguageModel, Want
from neighborlm.common.errors import InputError
from neighborlm.models.scorer import Scorer
from neighborlm.models.trainable_lm import TrainableLM
from neighborlm.retrieval.cluster.distributed import TIMEOUT
from neighborlm.retrieval.cluster.ranks import Ranks

TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # batches are dealt by the data module
    "accelerator": "auto" if torch.cuda.is_available() else "cpu",
}
"""What every stage's trainer is told unless the user says otherwise."""


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

    @property
    def precision(self) -> str:
        """What Lightning computes in."""
        return str(self.settings.get("precision") or "32-true")

    @property
    def hosts(self) -> int:
        """How many machines it runs on."""
        return self.settings.get("num_nodes", 1)

    def trainer(
        self,
        callbacks: Sequence[Callback] = (),
        stage: Literal["train", "evaluate"] = "evaluate",
        trained: TrainableLM | None = None,
    ) -> Trainer:
        """A trainer for one stage, with the user's settings and these callbacks.

        Args:
            callbacks: of ours.
            stage: the subdirectory of what is logged.
            trained: the model, where the stage is a training: `fsdp` shares out what that needs; in
                all other stages each rank has the whole model.

        Raises:
            InputError: Lightning cannot do it here.
        """
        settings = {**self.settings, "default_root_dir": self.directory}
        for name in ("strategy", "plugins"):  # a trainer makes them its own
            if settings.get(name) is not None:
                settings[name] = deepcopy(settings[name])
        if settings.get("logger") in (None, True):
            settings["logger"] = TensorBoardLogger(self.directory, name="", version=stage)
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
        own = [WatchRanks(self.lost_after), KeepSigterm()]
        settings["callbacks"] = [*own, *chosen, *callbacks]
        try:
            trainer = Trainer(**settings)
            ddp = strategy in ("auto", "ddp") and isinstance(trainer.strategy, DDPStrategy)
            if ddp and trained is not None and trained.leaves_out_parameters:
                settings["strategy"] = "ddp_find_unused_parameters_true"
                trainer = Trainer(**settings)
        except (ValueError, MisconfigurationException) as error:
            reason = " ".join(str(error).split()).split(". ")[0]
            raise InputError(f"--trainer.*: Lightning cannot do this here: {reason}") from error
        take_named_checkpoints_only(trainer)
        self.device = trainer.strategy.root_device
        return trainer

    def join_ranks(self, model: LanguageModel) -> Ranks:
        """Has all processes of this run started and joined, for what they do together between the
        stages.

        Args:
            model: that one of the stages is of.
        """
        if self.ranks is None:
            self.trainer().predict(Scorer(model, Want()), [], return_predictions=False)
            self.ranks = Ranks.connect(TIMEOUT)
        return self.ranks
