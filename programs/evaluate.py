"""The command line of evaluate.py: perplexity of a trained model, plain or with memories.

`--save_datastore` and `--build_index` do one stage as a job of its own.
"""

from functools import cached_property
from pathlib import Path

import yaml
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.utilities import rank_zero_only

from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.programs.architectures import Source
from neighborlm.programs.cli import ProgramCLI
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.programs.effects import NEVER_SEARCH, check_effects, check_trainer
from neighborlm.programs.evaluation import evaluate
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.named_run import with_settings_of_run
from neighborlm.programs.places import as_json, as_npz, check_writable, write_all
from neighborlm.programs.records import Record
from neighborlm.programs.reports import log_figures, show
from neighborlm.programs.resources import make_products
from neighborlm.programs.run import Run, run_of
from neighborlm.programs.settings import KNNSettings, MemorySettings
from neighborlm.programs.subject import Evaluated, Subject
from neighborlm.retrieval.memories import MEMORIES, MIXERS
from neighborlm.retrieval.memories.adaptive import AdaptiveSettings
from neighborlm.retrieval.memories.automaton import AutomatonSettings
from neighborlm.retrieval.memories.recent import RecentSettings
from neighborlm.retrieval.search.index import resolve


class EvaluateCLI(ProgramCLI):
    """The command line of evaluate.py; the model is the checkpoint's, whatever the config says."""

    tool = "evaluate"
    examples = """\
{program} runs/NAME
{program} runs/NAME --knnlm --split test

runs/NAME is the directory of a training. Every setting is a flag and a line in YAML; what is
missing of datastore and index is made.
"""

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
            "--split",
            type=str | None,
            default=None,
            help="what to evaluate (default: test) or to store (default: train): train, valid, "
            "test, or any split that a data-bin has",
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
        parser.add_argument(
            "--save_datastore", action="store_true", help="only write the split's datastore"
        )
        parser.add_argument(
            "--build_index", action="store_true", help="only build the datastore's index"
        )
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="where the latest results are written besides their record in evaluations/ "
            "(default: results.json; both in the run directory)",
        )
        parser.add_argument(
            "--token_scores",
            type=str | None,
            default=None,
            help="write every token's log-probabilities to this .npz file",
        )
        parser.add_class_arguments(KNNSettings, "knn")
        parser.add_class_arguments(RecentSettings, "recent")
        parser.add_class_arguments(AutomatonSettings, "automaton")
        parser.add_class_arguments(AdaptiveSettings, "adaptive")

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

    @property
    def output(self) -> Path:
        """Where the latest results are written."""
        return Path(self.config.output or self.run_dir / "results.json")

    def check_places(self) -> None:
        """Refuses places that cannot be written at; one process writes for all."""
        if rank_zero_only.rank != 0:
            return
        check_writable(self.run_dir, "--trainer.default_root_dir", "folder")
        check_writable(self.record.path, "the record")
        check_writable(self.output, "--output")
        if self.config.token_scores is not None:
            check_writable(Path(self.config.token_scores), "--token_scores")

    @cached_property
    def record(self) -> Record:
        """Of the evaluation that this command line describes."""
        settings = self.parser.dump(self.config, skip_unset=False, skip_link_targets=True)
        return Record(
            self.run_dir,
            self.config.split or "test",
            self.arch,
            self.memories,
            yaml.safe_load(settings),
            Path(self.config.mixer).stem,
        )

    def make_run(self) -> Run:
        """A run that logs this evaluation beside others."""
        run = super().make_run()
        run.evaluation = self.record.name
        return run

    def instantiate_classes(self) -> None:
        """Makes the settings, then the data module; the model comes from the checkpoint."""
        self.settings = MemorySettings(
            KNNSettings(**self.config.knn.as_dict()),
            RecentSettings(**self.config.recent.as_dict()),
            AutomatonSettings(**self.config.automaton.as_dict()),
            AdaptiveSettings(**self.config.adaptive.as_dict()),
        )
        self.settings.check()
        makes_products = self.config.save_datastore or self.config.build_index
        check_effects(self.settings, self.memories, self.config.mixer, makes_products)
        searches = makes_products or bool(set(self.memories) - NEVER_SEARCH)
        check_trainer(self.config.trainer, False, searches or self.architecture.has_neighbors)
        if self.memories or not makes_products:
            self.check_places()
        self.knn = self.settings.knn
        run = Path(self.config.run or self.run_dir)
        self.ckpt_path = Path(self.config.ckpt_path or run / "checkpoints" / "best.ckpt")
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule: LMDataModule = self.config_init.data
        source = Source(self.datamodule, self.ckpt_path, dict(self.config.model))
        self.model = self.architecture.load(source)
        if self.memories or makes_products:
            for key_type in filter(None, (self.knn.key_type, self.knn.rescore_key_type)):
                self.model.key_width(key_type)
                place = getattr(self.model, "key_places", {}).get(key_type)
                if place is not None:
                    print(f"keys {key_type}: {place}")


def subject_of(cli: EvaluateCLI) -> Subject:
    """What the command line says is to be evaluated."""
    subject = Subject.of(
        cli.model, cli.datamodule, cli.make_run(), cli.neighbor_settings, cli.ckpt_path
    )
    if cli.config.split is not None:
        cli.datamodule.stream(cli.config.split)
    return subject


def make_stages(cli: EvaluateCLI, subject: Subject, split: str) -> dict[str, float]:
    """`--save_datastore` and `--build_index`: what they ask for and no more; how long each took."""
    with_index = cli.config.build_index
    products = subject.products(cli.knn)
    if cli.config.save_datastore:
        products.refuse_other(split)
    elif products.open_fitting_datastore(split) is None:
        raise InputError(
            f"{products.datastore_path(split)}: no complete datastore to index; --save_datastore "
            "makes it"
        )
    datastore, seconds = make_products(subject, split, cli.knn, with_index)
    if with_index:
        print(f"index: {resolve(datastore, cli.knn.index)}")
    print(f"datastore: {datastore.path}, {len(datastore)} keys of width {datastore.dim}")
    return seconds


def evaluate_subject(cli: EvaluateCLI, subject: Subject) -> Evaluated:
    """The evaluation that the command line describes."""
    split, keep_scores = cli.config.split or "test", cli.config.token_scores is not None
    return evaluate(subject, split, cli.memories, cli.config.mixer, cli.settings, keep_scores)


def publish(cli: EvaluateCLI, evaluated: Evaluated) -> None:
    """Shows the figures, writes them and logs them, in this order, as a disk may be full.

    Raises:
        InputError: something cannot be written.
    """
    checkpoint = str(cli.ckpt_path) if cli.ckpt_path.exists() else None
    made_by = {"checkpoint": checkpoint, "stage_seconds": evaluated.seconds}
    results, record = evaluated.results | made_by, cli.record
    show(results)
    latest = results | {"record": str(record.path)}
    files = {record.path: as_json(record.content(results)), cli.output: as_json(latest)}
    if evaluated.scores is not None:
        files[Path(cli.config.token_scores)] = as_npz(evaluated.scores)
    write_all(files)
    print(f"results: {cli.output}, {record.path}")
    log_figures(results, getattr(cli.model, "updates", 0), evaluated.trainer.loggers)


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Does the stages that the flags ask for."""
    cli = EvaluateCLI(args)
    subject = subject_of(cli)
    if cli.config.save_datastore or cli.config.build_index:
        make_stages(cli, subject, cli.config.split or "train")
        if not cli.memories:
            return
    evaluated = evaluate_subject(cli, subject)
    if evaluated.trainer.is_global_zero:
        publish(cli, evaluated)
