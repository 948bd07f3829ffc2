"""What train.py and evaluate.py share: the command line and where a run's files go."""

import logging
import signal
import sys
import threading
import warnings
from argparse import ArgumentParser
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import faiss
import torch
import yaml
from jsonargparse.typing import PositiveInt
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from neighborlm.common.errors import InputError
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.language_model import LanguageModel
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.programs.settings import NeighborSettings
from neighborlm.retrieval.cluster import rank_watch
from neighborlm.retrieval.cluster.distributed import TIMEOUT
from neighborlm.retrieval.cluster.ranks import Ranks

ARCHITECTURES: dict[str, type[LanguageModel]] = {"lm": TransformerLM, "gnn_lm": GNNLM}


class ProgramCLI(LightningCLI):
    """Sections trainer, model and data in YAML, each overridable by flags of the same name; `arch`
    says which model the section is of, and a GNN-LM adds the section neighbors.

    The data module is made at once; the trainer by `make_trainer`, as often as a program has
    stages.

    Attributes:
        device: this process's, once there has been a trainer.
        ranks: all processes, once `join_ranks` has been called.
    """

    ranks: Ranks | None = None

    def __init__(self) -> None:
        quiet()
        self.arch = chosen_architecture(sys.argv[1:])
        super().__init__(
            ARCHITECTURES[self.arch],
            CorpusDataModule,
            run=False,
            save_config_callback=None,
            seed_everything_default=1,
            trainer_defaults={
                "use_distributed_sampler": False,  # batches are dealt by the data module
                "accelerator": "auto" if torch.cuda.is_available() else "cpu",
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is not a section."""
        parser.add_argument(
            "--arch",
            type=Literal[tuple(ARCHITECTURES)],
            default="lm",
            help="what --model.* describes: a transformer LM, or a graph network on top of one",
        )
        parser.add_argument(
            "--threads",
            type=PositiveInt | None,
            default=None,
            help="cores that a process takes, model and search together (default: all there are)",
        )
        parser.add_argument(
            "--lost_after",
            type=PositiveInt,
            default=30,
            help="seconds without an answer from another host until the run stops",
        )
        if self.arch == "gnn_lm":
            parser.add_class_arguments(NeighborSettings, "neighbors")

    def before_instantiate_classes(self) -> None:
        """Sets the threads of torch and faiss."""
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
            faiss.omp_set_num_threads(self.config.threads)

    @property
    def run_dir(self) -> Path:
        """Where the run's files are: `--trainer.default_root_dir`, else runs/<corpus>[-<arch>]."""
        chosen = self.config.trainer.default_root_dir
        name = self.corpus_name + ("" if self.arch == "lm" else f"-{self.arch}")
        return Path(chosen) if chosen else Path("runs") / name

    @property
    def corpus_name(self) -> str:
        """The known corpus's name or the folder's."""
        return Path(self.config.data.corpus).resolve().name

    def make_trainer(
        self, callbacks: list[Callback], log_dir: Path, training: bool = False
    ) -> Trainer:
        """A Lightning trainer for one stage, with the user's settings and our callbacks.

        Args:
            training: whether the stage is a training: `fsdp` shares out what that needs, in all
                other stages each rank has the whole model.
        """
        settings = {**self.config_init.trainer}
        for name in ("strategy", "plugins"):  # a trainer makes them its own
            settings[name] = deepcopy(settings[name])
        if settings["logger"] in (None, True):
            settings["logger"] = TensorBoardLogger(log_dir.parent, name="", version=log_dir.name)
        settings["default_root_dir"] = self.run_dir
        if settings["strategy"] == "fsdp":
            one_file = ModelParallelStrategy(save_distributed_checkpoint=False)
            settings["strategy"] = one_file if training else "ddp"
            settings["inference_mode"] = False  # weights gathered in it could not be trained on
        watching = WatchRanks(self.config.lost_after)
        chosen = settings["callbacks"] or []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        settings["callbacks"] = [watching, KeepSigterm(), *chosen, *callbacks]
        try:
            trainer = Trainer(**settings)
            ddp = settings["strategy"] in ("auto", "ddp") and isinstance(
                trainer.strategy, DDPStrategy
            )
            if ddp and training and self.model.leaves_out_parameters:
                settings["strategy"] = "ddp_find_unused_parameters_true"
                trainer = Trainer(**settings)
        except (ValueError, MisconfigurationException) as error:
            reason = " ".join(str(error).split()).split(". ")[0]
            raise InputError(f"--trainer.*: Lightning cannot do this here: {reason}") from error
        self.device = trainer.strategy.root_device
        return trainer

    def join_ranks(self, model: LightningModule) -> Ranks:
        """Has all processes of this run started and joined, for what they do together between the
        stages.

        Args:
            model: that one of the stages is of.
        """
        if self.ranks is None:
            trainer = self.make_trainer([], self.run_dir / "evaluate")
            trainer.predict(model, [], return_predictions=False)
            self.ranks = Ranks.connect(TIMEOUT)
        return self.ranks


class WatchRanks(Callback):
    """Has every rank stop when another is lost, from the first stage on.

    Args:
        lost_after: seconds without an answer from a host.
    """

    def __init__(self, lost_after: int) -> None:
        self.lost_after = lost_after

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The process group has just been made."""
        if trainer.world_size > 1:
            environment = trainer.strategy.cluster_environment
            address = environment.main_address if trainer.num_nodes > 1 else None
            rank_watch.watch(
                trainer.global_rank,
                trainer.world_size,
                address,
                trainer.strategy.broadcast,
                self.lost_after,
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The others need not have met an exception: what is saved because of it is saved without
        waiting for them. And Lightning ends its processes after an interrupt, which is no loss."""
        trainer.strategy.barrier = lambda name=None: None
        if isinstance(exception, KeyboardInterrupt):
            rank_watch.leave("stop")


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


def chosen_architecture(args: list[str]) -> str:
    """`--arch`, or else what the config files say: it decides which flags there are."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--arch")
    parser.add_argument("--config", "-c", action="append", default=[])
    found, _ = parser.parse_known_args(args)
    said = [found.arch]
    for config in reversed(found.config):
        if Path(config).is_file():
            settings = yaml.safe_load(Path(config).read_text())
            said.append(settings.get("arch") if isinstance(settings, dict) else None)
    return next((arch for arch in said if arch in ARCHITECTURES), "lm")


def check_row_length(tokens_per_sample: int, max_target_positions: int) -> None:
    """Raises InputError where rows do not fit the model."""
    if tokens_per_sample > max_target_positions:
        raise InputError(
            f"--data.tokens_per_sample is {tokens_per_sample}, but the model reads at most "
            f"{max_target_positions} tokens (--model.max_target_positions)"
        )


def quiet() -> None:
    """Silences advice of libraries that does not concern the user of these programs."""
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*Couldn't infer the batch indices.*",
        ".*exists and is not empty.*",
        ".*lr_scheduler.step.*before.*optimizer.step.*",
        ".*LeafSpec.*",
        ".*in eval mode at the start of training.*",
        ".*Total length of .* is zero.*",  # processes are joined without batches
        ".*sync_dist=True.*",  # torchmetrics has reduced what is logged of an epoch
    ):
        warnings.filterwarnings("ignore", message)
