"""What train.py and evaluate.py share: the command line and where a run's files go."""

import logging
import sys
import warnings
from argparse import ArgumentParser
from pathlib import Path
from typing import Literal

import faiss
import torch
import yaml
from jsonargparse.typing import PositiveInt
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from neighborlm.common.digests import Verify, set_verification
from neighborlm.programs.architectures import ARCHITECTURES
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.programs.run import TRAINER_DEFAULTS, Run
from neighborlm.programs.settings import NeighborSettings


class ProgramCLI(LightningCLI):
    """Sections trainer, model and data in YAML, each overridable by flags of the same name. `arch`
    says which kind of model the section model describes; a GNN-LM adds the section neighbors.

    The data module is made at once; `Run.trainer` makes a trainer for each stage of a program.

    Args:
        args: the command line of `neighborlm train` or `evaluate`; by default that of the process.

    Attributes:
        tool: what `neighborlm` calls the program.
    """

    tool: str

    def __init__(self, args: list[str] | None = None) -> None:
        quiet()
        given = self.completed(sys.argv[1:] if args is None else args)
        self.arch = chosen_architecture(given)
        self.architecture = ARCHITECTURES[self.arch]
        super().__init__(
            self.architecture.make,
            CorpusDataModule,
            run=False,
            save_config_callback=None,
            seed_everything_default=1,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={} if args is None else {"prog": f"neighborlm {self.tool}"},
            args=given,
        )

    def completed(self, args: list[str]) -> list[str]:
        """The command line with what it stands for; as it is unless a program says otherwise."""
        return args

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is no section, and the section neighbors of a GNN-LM."""
        parser.add_argument(
            "--arch",
            type=Literal[tuple(ARCHITECTURES)],
            default="lm",
            help="what --model.* describes: lm, a transformer LM, gnn_lm, a graph network on top "
            "of one, or huggingface, any causal LM of transformers (default: what the config file "
            "says, else lm)",
        )
        parser.add_argument(
            "--threads",
            type=PositiveInt | None,
            default=None,
            help="cores of a process, for model and memories together (default: all there are); "
            "fewer where several processes share a machine",
        )
        parser.add_argument(
            "--lost_after",
            type=PositiveInt,
            default=30,
            help="seconds without an answer from another host until the run stops (default: 30); "
            "more on a slow network",
        )
        parser.add_argument(
            "--verify",
            type=Verify,
            default="changed",
            help="when files are compared with the checksums that they were written with: large "
            "ones only if they have changed since the last time, as by a copy (default: changed), "
            "or always, or never",
        )
        if self.architecture.has_neighbors:
            parser.add_class_arguments(NeighborSettings, "neighbors")

    def before_instantiate_classes(self) -> None:
        """Sets the threads of torch and faiss, and when files are verified."""
        set_verification(self.config.verify)
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
            faiss.omp_set_num_threads(self.config.threads)

    @property
    def run_dir(self) -> Path:
        """Where the run's files are: `--trainer.default_root_dir`, else runs/<corpus>[-<arch>]."""
        chosen = self.config.trainer.default_root_dir
        name = self.corpus_name + ("" if self.arch == "lm" else f"-{self.arch}")
        return Path(chosen) if chosen else Path("runs") / name

    def make_run(self) -> Run:
        """The run that the command line describes; refuses what Lightning cannot do here."""
        settings = {**self.config_init.trainer}
        del settings["default_root_dir"]
        run = Run(self.run_dir, settings, self.config.seed_everything, self.config.lost_after)
        run.trainer()
        return run

    @property
    def neighbor_settings(self) -> NeighborSettings | None:
        """The section neighbors, of a GNN-LM."""
        if not self.architecture.has_neighbors:
            return None
        return NeighborSettings(**self.config.neighbors.as_dict())

    @property
    def corpus_name(self) -> str:
        """The known corpus's name or the folder's."""
        return Path(self.config.data.corpus).resolve().name


def chosen_architecture(args: list[str]) -> str:
    """`--arch`, or else what the config files say; it decides which flags exist."""
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


def quiet() -> None:
    """Silences advice of libraries that does not concern the user of these programs."""
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.WARNING)
    for message in (
        ".*args parameter is intended to run from within Python.*",  # `neighborlm train` has both
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
