"""What the command lines of evaluate.py and generate.py share: a trained model, and the memories
that are mixed with it."""

from pathlib import Path

from pytorch_lightning.cli import LightningArgumentParser

from neighborlm.datamodules.lm import LMDataModule
from neighborlm.programs.architectures import Source
from neighborlm.programs.cli import ProgramCLI
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.programs.effects import NEVER_SEARCH, check_effects, check_trainer
from neighborlm.programs.named_run import with_settings_of_run
from neighborlm.programs.places import check_folder
from neighborlm.programs.run import run_of
from neighborlm.programs.settings import MemorySettings
from neighborlm.retrieval.memories import MEMORIES, MIXERS


class MemoryCLI(ProgramCLI):
    """A command line whose model is the checkpoint's, whatever the config says."""

    makes_products = False
    """Whether a datastore or an index is made whatever is mixed."""

    def completed(self, args: list[str]) -> list[str]:
        """A run that is named is followed by its settings."""
        return with_settings_of_run(args)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The sections; what the one of the model says is only carried along."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items()})
        if self.architecture.settings is not None:
            parser.add_class_arguments(self.architecture.settings, "model")
        else:
            ignored = "settings of training; the checkpoint has them"
            parser.add_argument("--model", type=dict, default={}, help=ignored)
        parser.add_lightning_class_args(CorpusDataModule, "data")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is not a section of train.py."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "run",
            type=str | None,
            nargs="?",
            default=None,
            help="in front of all flags, the directory of a run, such as runs/NAME: its checkpoint "
            "is evaluated, with the corpus and the rows that it was trained on",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="trained model (default: checkpoints/best.ckpt of the run directory)",
        )
        parser.add_argument(
            "--knnlm", action="store_true", help="mix with the memories of --memories"
        )
        parser.add_argument(
            "--memories",
            type=str | None,
            default=None,
            help=f"what is mixed with the model, separated by commas: {', '.join(MEMORIES)} "
            "(default: knn with --knnlm, else none)",
        )
        parser.add_argument(
            "--mixer",
            type=str,
            default="constant",
            help="what weighs the model and its memories, fitted on the validation split unless "
            f"--knn.lmbda gives the weight of knn alone: {', '.join(MIXERS)}, or the .npz of one "
            "that an earlier evaluation has fitted",
        )
        for name, kind in MemorySettings.kinds().items():
            parser.add_class_arguments(kind, name)

    @property
    def memories(self) -> list[str]:
        """Names of the memories to mix with; none for the model alone."""
        if self.config.memories is None:
            return ["knn"] if self.config.knnlm else []
        return [name.strip() for name in self.config.memories.split(",")]

    @property
    def run_dir(self) -> Path:
        """`--trainer.default_root_dir`, else the run that the checkpoint lies in, else the run that
        is named, else runs/<corpus>[-<arch>]."""
        if self.config.trainer.default_root_dir:
            return super().run_dir
        named = None if self.config.run is None else Path(self.config.run)
        checkpoint = self.config.ckpt_path
        return run_of(checkpoint) or named or super().run_dir

    def check_flags(self) -> None:
        """Refuses what nothing reads, and a file in the place of a folder."""
        check_effects(self.settings, self.memories, self.config.mixer, self.makes_products)
        searches = self.makes_products or bool(set(self.memories) - NEVER_SEARCH)
        check_trainer(self.config.trainer, False, searches or self.architecture.has_neighbors)
        if self.settings.knn.datastore is not None:
            check_folder(Path(self.settings.knn.datastore), "--knn.datastore")
        neighbors = self.neighbor_settings
        if neighbors is not None and neighbors.datastores is not None:
            check_folder(Path(neighbors.datastores), "--neighbors.datastores")

    def instantiate_classes(self) -> None:
        """Makes the settings, then the data module; the model comes from the checkpoint."""
        sections = {name: self.config[name].as_dict() for name in MemorySettings.kinds()}
        self.settings = MemorySettings.of(sections)
        self.settings.check()
        self.check_flags()
        self.knn = self.settings.knn
        run = Path(self.config.run or self.run_dir)
        self.ckpt_path = Path(self.config.ckpt_path or run / "checkpoints" / "best.ckpt")
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule: LMDataModule = self.config_init.data
        source = Source(self.datamodule, self.ckpt_path, dict(self.config.model))
        self.model = self.architecture.load(source)
        if self.memories or self.makes_products:
            for key_type in filter(None, (self.knn.key_type, self.knn.rescore_key_type)):
                self.model.key_width(key_type)
                place = getattr(self.model, "key_places", {}).get(key_type)
                if place is not None:
                    print(f"keys {key_type}: {place}")
