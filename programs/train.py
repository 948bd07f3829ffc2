"""The command line of train.py.

A run that was interrupted goes on from its last checkpoint when the same command is given again.
"""

from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.cli import LightningArgumentParser

from neighborlm.common.errors import InputError
from neighborlm.common.log import log
from neighborlm.datamodules.lm import check_row_length
from neighborlm.programs.architectures import ARCHITECTURES
from neighborlm.programs.belonging import is_same_text
from neighborlm.programs.cli import ProgramCLI
from neighborlm.programs.effects import check_trainer
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import check_folder, check_writable
from neighborlm.programs.training import read_checkpoint, train

FREE_TO_CHANGE = ("cache_dir", "num_workers", "compile", "activation_checkpointing", "shard")
"""Settings that a continued run may have otherwise: they change no number."""
OF_TEXT = ("corpus", "dictionary")
"""Settings that may be otherwise where the text and its vocabulary are the same."""
OF_UPDATES = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
)
"""Settings of the trainer that change what the updates to come do."""


class TrainCLI(ProgramCLI):
    """The command line of train.py."""

    tool = "train"
    examples = """\
{program} --config configs/text/lm.yaml --data.corpus FOLDER
{program} --config configs/text/gnn_lm.yaml --data.corpus FOLDER \\
    --model.lm_checkpoint runs/NAME/checkpoints/best.ckpt

FOLDER holds train.txt, valid.txt and test.txt, and NAME is the folder's own name. Every setting is
a flag and a line in YAML. A training that was interrupted goes on when its command is given again.
"""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is not a section; the model's vocabulary is the corpus's."""
        super().add_arguments_to_parser(parser)
        if self.architecture.make is None:
            trained = ", ".join(name for name, a in ARCHITECTURES.items() if a.make is not None)
            raise InputError(f"--arch {self.arch} is not trained here; expected one of {trained}")
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
        check_trainer(self.config.trainer, trains=True, makes_products=False)
        check_writable(self.run_dir, "--trainer.default_root_dir", "folder")
        if self.architecture.has_neighbors and self.config.neighbors.datastores is not None:
            check_folder(Path(self.config.neighbors.datastores), "--neighbors.datastores")
        if self.arch == "lm":  # known before the corpus is read
            longest = self.config.model.max_target_positions
            check_row_length(self.config.data.tokens_per_sample, longest)
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule, self.model = self.config_init.data, self.config_init.model


def checkpoint_to_continue(cli: TrainCLI) -> str | None:
    """The checkpoint that this command goes on from: the run's last one or, where that is damaged,
    its best one.

    Raises:
        InputError: the run directory holds a run with another model or other data.
    """
    if cli.config.ckpt_path is not None:
        if not Path(cli.config.ckpt_path).is_file():
            found = "is a folder" if Path(cli.config.ckpt_path).is_dir() else "no such file"
            raise InputError(
                f"--ckpt_path {cli.config.ckpt_path}: {found}; expected a checkpoint of train.py"
            )
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
    seed, new_seed = before.get("seed_everything"), now.get("seed_everything")
    if seed != new_seed:
        raise InputError(
            f"{cli.run_dir}: holds a run with --seed_everything {seed}, but this one has "
            f"{new_seed}; choose another --trainer.default_root_dir"
        )
    last, checkpoint = last_whole(last)
    same_text = is_same_text(checkpoint, cli.datamodule)
    for section in ("model", "data", "neighbors"):
        for name, value in now.get(section, {}).items():
            had = before.get(section, {}).get(name)
            same = had == value or (section == "data" and name in OF_TEXT and same_text)
            if section == "data" and name == "corpus" and same_text is None:
                same = Path(str(had)).resolve() == Path(value).resolve()
            if name not in FREE_TO_CHANGE and not same:
                raise InputError(
                    f"{cli.run_dir}: holds a run with --{section}.{name} {had}, but this one has "
                    f"{value}; choose another --trainer.default_root_dir"
                )
    for name in OF_UPDATES:
        had, value = (settings.get("trainer", {}).get(name) for settings in (before, now))
        if had != value:
            print(f"{cli.run_dir}: was begun with --trainer.{name} {had}, and goes on with {value}")
    print(f"continuing from {last}")
    return str(last)


def last_whole(last: Path) -> tuple[Path, dict[str, Any]]:
    """The run's last checkpoint, or its best one where that is damaged; and its content.

    Raises:
        InputError: neither can be read.
    """
    try:
        return last, read_checkpoint(last)
    except InputError as damage:
        best = last.with_name("best.ckpt")
        try:
            checkpoint = read_checkpoint(best)
        except InputError:
            raise damage from None
        print(f"{damage}; it is left aside")
        return best, checkpoint


def resolved_config(cli: TrainCLI) -> str:
    """Every setting of this run, as YAML."""
    return cli.parser.dump(cli.config, skip_unset=False, skip_link_targets=True)


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Trains, keeping the checkpoint with the lowest validation perplexity and the last one."""
    cli = TrainCLI(args)
    trained = train(
        cli.model,
        cli.datamodule,
        cli.make_run(),
        ckpt_path=checkpoint_to_continue(cli),
        checkpoint_every=cli.config.checkpoint_every,
        neighbors=cli.neighbor_settings,
        config=resolved_config(cli),
    )
    if trained.best_valid_ppl is not None:
        lowest = f"lowest validation perplexity {trained.best_valid_ppl:.2f}: {trained.checkpoint}"
        print(lowest)
        log(lowest)
