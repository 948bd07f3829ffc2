"""The command line of evaluate.py: perplexity of a trained model, plain or with memories.

`--save_datastore` and `--build_index` do one stage as a job of its own.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import yaml
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.utilities import rank_zero_only

from neighborlm.common.errors import InputError
from neighborlm.programs.board import log_evaluation
from neighborlm.programs.evaluation import evaluate
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.memory_cli import MemoryCLI
from neighborlm.programs.page import check_choice, compared_with_scores, page_of, write_page
from neighborlm.programs.places import as_json, as_npz, check_writable, write_all
from neighborlm.programs.records import Record
from neighborlm.programs.reports import show
from neighborlm.programs.resources import make_products
from neighborlm.programs.run import Run
from neighborlm.programs.subject import Evaluated, Subject
from neighborlm.retrieval.search.index import resolve


class EvaluateCLI(MemoryCLI):
    """The command line of evaluate.py; the model is the checkpoint's, whatever the config says."""

    tool = "evaluate"
    examples = """\
{program} runs/NAME
{program} runs/NAME --knnlm --split test

runs/NAME is the directory of a training. Every setting is a flag and a line in YAML; what is
missing of datastore and index is made.
"""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what only an evaluation has."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--split",
            type=str | None,
            default=None,
            help="what to evaluate (default: test) or to store (default: train): train, valid, "
            "test, or any split that a data-bin has",
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
        parser.add_argument(
            "--page",
            type=str | None,
            default=None,
            help="write a page to this .html file that shows what each memory says of every token; "
            "it opens in any browser",
        )
        parser.add_argument(
            "--page_tokens",
            type=str,
            default="2000",
            help="tokens of the page: the first so many; a range such as 1000:3000; or gains:2000, "
            "the lines with the largest gains, up to so many tokens",
        )
        parser.add_argument(
            "--page_neighbors",
            type=PositiveInt,
            default=16,
            help="neighbours of a token on the page, at most; more make a larger file",
        )
        parser.add_argument(
            "--page_against",
            type=str | None,
            default=None,
            help="the --token_scores of another evaluation of the split, to compare with on the "
            "page",
        )

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
        if self.config.page is not None:
            check_writable(Path(self.config.page), "--page")

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

    @property
    def makes_products(self) -> bool:
        """Whether a datastore or an index is made whatever is mixed."""
        return self.config.save_datastore or self.config.build_index

    def check_flags(self) -> None:
        """Refuses what nothing reads, and places that cannot be written at."""
        super().check_flags()
        if self.config.page is not None:
            check_page(self.config, self.memories)
        for flag in ("page_tokens", "page_neighbors", "page_against"):
            value = self.config[flag]
            if self.config.page is None and value != self.parser.get_default(flag):
                raise InputError(f"--{flag} {value}: has no effect here; expected --page FILE too")
        if self.memories or not self.makes_products:
            self.check_places()


def check_page(config: Namespace, memories: Sequence[str]) -> None:
    """Everything about `--page` that can be wrong before any work."""
    if not memories:
        raise InputError("--page: shows what memories say; expected --knnlm or --memories too")
    check_choice(config.page_tokens)
    if config.page_against is not None and not Path(config.page_against).is_file():
        raise InputError(
            f"--page_against {config.page_against}: no such file; expected the --token_scores of "
            "another evaluation"
        )


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
    print(f"datastore: {datastore.path}, {len(datastore):,} keys of width {datastore.dim}")
    return seconds


def evaluate_subject(cli: EvaluateCLI, subject: Subject) -> Evaluated:
    """The evaluation that the command line describes."""
    split = cli.config.split or "test"
    keep_scores = cli.config.token_scores is not None or cli.config.page is not None
    return evaluate(subject, split, cli.memories, cli.config.mixer, cli.settings, keep_scores)


def publish(cli: EvaluateCLI, subject: Subject, evaluated: Evaluated) -> None:
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
    if cli.config.token_scores is not None:
        files[Path(cli.config.token_scores)] = as_npz(evaluated.scores)
    write_all(files)
    print(f"results: {cli.output}, {record.path}")
    log_evaluation(subject, evaluated, record.settings)


def show_memories(cli: EvaluateCLI, subject: Subject, evaluated: Evaluated) -> None:
    """Writes the page that `--page` asks for."""
    config, split = cli.config, cli.config.split or "test"
    page = page_of(subject, evaluated, split, config.page_tokens, config.page_neighbors)
    if config.page_against is not None:
        page = compared_with_scores(page, Path(config.page_against))
    title = f"{cli.run_dir.name}: {' + '.join(cli.memories)}, {split} split"
    write_page(Path(config.page), page, subject.data, title, f"evaluation {cli.record.name}")
    print(f"page: {config.page}, {len(page.positions):,} tokens")


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
        publish(cli, subject, evaluated)
    if cli.config.page is not None:
        show_memories(cli, subject, evaluated)
