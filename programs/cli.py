"""What train.py and evaluate.py share: the command line and where a run's files go."""

import logging
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import faiss
import torch
from jsonargparse.typing import PositiveInt
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from neighborlm.common.digests import Verify, set_verification
from neighborlm.common.errors import InputError
from neighborlm.programs.architectures import ARCHITECTURES, Architecture
from neighborlm.programs.arguments import OneSentence, configs_of, flags_of, read_config
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.programs.run import TRAINER_DEFAULTS, Run
from neighborlm.programs.settings import NeighborSettings

HELP = {
    "config": "YAML file of settings; several are read one after another, and of a setting that is "
    "given more than once the last one counts, flags included",
    "seed_everything": "seed of all that is drawn at random, from 0 to 4294967295",
    "trainer.default_root_dir": "directory of the run: checkpoints, logs and results (default: "
    "runs/<corpus>, with -<arch> behind it unless that is lm)",
    "trainer.max_steps": "updates of a training, after which it ends",
    "trainer.limit_predict_batches": "refused: a datastore needs every row",
    "trainer.overfit_batches": "refused: --trainer.limit_train_batches takes the first batches",
    "model": "YAML file of this section alone",
    **{
        name: "YAML file of this section alone"
        for name in ("data", "knn", "neighbors", "recent", "automaton", "adaptive", "trainer")
    },
}
"""What is said of flags that Lightning or jsonargparse describe otherwise, or not."""
TITLES = {
    "model": "the model (--model.*)",
    "data": "the text, and how it is cut into rows (--data.*)",
    "knn": "the datastore, the search and the mixture (--knn.*)",
    "neighbors": "what a GNN-LM sees of each token's neighbours (--neighbors.*)",
    "recent": "the memory of the running text (--recent.*)",
    "automaton": "the memory automaton (--automaton.*)",
    "adaptive": "the memory adaptive (--adaptive.*)",
    "trainer": "the trainer of Lightning (--trainer.*)",
}
"""Of the sections of `--help`."""


class ProgramParser(OneSentence, LightningArgumentParser):
    """The parser of train.py and evaluate.py, whose help begins with examples, and ends with what
    is Lightning's.

    Args:
        examples: command lines.
    """

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.usage = f"{self.prog} [--config FILE] [--NAME VALUE ...] [--SECTION.NAME VALUE ...]"
        self.examples = examples

    def format_help(self) -> str:
        """What `--help` prints."""
        trainer = self.groups.get("trainer")
        self._action_groups.sort(key=lambda group: group is trainer)
        usage, _, sections = super().format_help().partition("\n\n")
        return f"{usage}\n\n{self.examples.format(program=self.prog)}\n{sections}"


class ProgramCLI(LightningCLI):
    """Sections trainer, model and data in YAML, each overridable by flags of the same name. `arch`
    says which kind of model the section model describes; a GNN-LM adds the section neighbors.

    The data module is made at once; `Run.trainer` makes a trainer for each stage of a program.

    Args:
        args: the command line of `neighborlm train` or `evaluate`; by default that of the process.

    Attributes:
        tool: what `neighborlm` calls the program.
        examples: two command lines, for its help.
    """

    tool: str
    examples: str

    def __init__(self, args: list[str] | None = None) -> None:
        quiet()
        given = self.completed(sys.argv[1:] if args is None else args)
        self.configs = {path: read_config(path) for path in configs_of(given)}
        self.arch = chosen_architecture(given, self.configs)
        self.architecture = ARCHITECTURES[self.arch]
        named = {} if args is None else {"prog": f"neighborlm {self.tool}"}
        super().__init__(
            self.architecture.make,
            CorpusDataModule,
            run=False,
            save_config_callback=None,
            seed_everything_default=1,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs=named | {"description": None, "examples": self.examples},
            parser_class=ProgramParser,
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

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Reads the command line and the config files.

        Raises:
            InputError: one of them cannot be read; the sentence says which.
        """
        describe(parser, HELP)
        for name, title in TITLES.items():
            if name in parser.groups:
                parser.groups[name].title = title
        try:
            super().parse_arguments(parser, args)
        except InputError as error:
            raise InputError(self._with_place(str(error), args)) from None
        seed = self.config.seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 1 << 32:
            raise InputError(f"--seed_everything is {seed}; expected 0 to {(1 << 32) - 1}")

    def _with_place(self, sentence: str, args: Sequence[str]) -> str:
        """A sentence on a setting with the config that holds it, and with the programs and
        architectures that have such a setting."""
        key = re.split(r":? ", sentence.removeprefix("--"), maxsplit=1)[0]
        section, _, name = key.partition(".")
        for arch, other in ARCHITECTURES.items():
            if "has no" not in sentence or arch == self.arch:
                continue
            has_neighbors = section == "neighbors" and other.has_neighbors
            if has_neighbors or (section == "model" and f"--{key}" in model_flags(other)):
                sentence = f"{sentence.split(';')[0]}; --arch {arch} has it"
        if section in ("knn", "recent", "automaton") and section not in self.parser.groups:
            sentence = f"{sentence.split(';')[0]}; evaluate.py has it"
        if not any(flag.partition("=")[0] == f"--{key}" for flag in args):
            for path, content in self.configs.items():
                found = content.get(section)
                if found is not None and (not name or (isinstance(found, dict) and name in found)):
                    return f"--config {path}: {sentence}"
        return sentence

    def before_instantiate_classes(self) -> None:
        """Sets the threads of torch and faiss, and when files are verified; a pretrained model
        brings its tokenizer."""
        set_verification(self.config.verify)
        pretrained = dict(self.config.model).get("pretrained")
        if pretrained is not None and self.config.data.tokenizer is None:
            self.config.data.tokenizer = pretrained
            self.config.data.tokenizer_revision = dict(self.config.model).get("revision")
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


def describe(parser: LightningArgumentParser, texts: Mapping[str, str]) -> None:
    """Replaces the help of flags by what they mean here."""
    for action in parser._actions:
        action.help = texts.get(action.dest, action.help)


def model_flags(architecture: Architecture) -> list[str]:
    """The flags `--model.*` by which a model of an architecture is trained."""
    parser = LightningArgumentParser()
    if architecture.make is not None:
        parser.add_lightning_class_args(architecture.make, "model")
    return flags_of(parser)


def chosen_architecture(args: Sequence[str], configs: Mapping[str, Mapping[str, Any]]) -> str:
    """`--arch`, or else what the last of the config files says; it decides which flags exist.

    Args:
        args: a command line.
        configs: the contents of the config files that it names, by path.

    Raises:
        InputError: a config file is for another architecture.
    """
    parser = OneSentence(add_help=False)
    parser.add_argument("--arch")
    given = parser.parse_known_args(args)[0].arch
    said = {path: content["arch"] for path, content in configs.items() if "arch" in content}
    chosen = given or next(reversed(said.values()), "lm")
    if chosen not in ARCHITECTURES:
        return "lm"  # the parser refuses it
    for path, arch in said.items():
        if arch != chosen and arch in ARCHITECTURES:
            raise InputError(
                f"--config {path}: is for --arch {arch}, but --arch {chosen} is asked for; "
                f"expected another config, or --arch {arch}"
            )
    return chosen


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
        ".*is smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",
        ".*Total length of .* is zero.*",  # processes are joined without batches
        ".*sync_dist=True.*",  # torchmetrics has reduced what is logged of an epoch
    ):
        warnings.filterwarnings("ignore", message)
