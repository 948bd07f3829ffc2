"""The command line of generate.py: text from a trained model, alone or mixed with memories."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt
from pytorch_lightning.cli import LightningArgumentParser

from neighborlm.common.contracts import Vocabulary
from neighborlm.common.errors import InputError
from neighborlm.datamodules.dictionary import UNK, Dictionary
from neighborlm.models.decoding import Decoding
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.generation import (
    ALONE,
    Generated,
    check_generates,
    generate,
    opening,
)
from neighborlm.programs.kept_mixture import Mixture, make_mixture
from neighborlm.programs.memory_cli import MemoryCLI
from neighborlm.programs.page import page_of_text, write_page
from neighborlm.programs.places import check_writable, write_all
from neighborlm.programs.subject import Subject


class GenerateCLI(MemoryCLI):
    """The command line of generate.py."""

    tool = "generate"
    examples = """\
{program} runs/NAME --prompt "The cat"
{program} runs/NAME --knnlm --compare --prompt "The cat" --temperature 0.8 --top_p 0.9

runs/NAME is the directory of a training. Memories are weighed as the last evaluation with the same
--memories and --mixer found best (evaluate.py runs/NAME --knnlm); --knn.lmbda and --knn.temperature
say it themselves. Temperature, top_k, top_p and beams act on the mixture of model and memories.
"""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what only generation has."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--prompt",
            type=str | None,
            default=None,
            help="the text to continue, in the form of the corpus (default: none, a text begins)",
        )
        parser.add_argument(
            "--prompts",
            type=str | None,
            default=None,
            help="a file with a prompt on each line, which are continued in batches",
        )
        parser.add_class_arguments(Decoding, None)
        parser.add_argument(
            "--batch_size", type=PositiveInt, default=8, help="prompts at a time (default: 8)"
        )
        parser.add_argument(
            "--compare",
            action="store_true",
            help="show beside it what the model alone says, drawn by the same random numbers",
        )
        parser.add_argument(
            "--sources",
            type=NonNegativeInt,
            default=0,
            help="stored contexts to show for each token, those with the largest shares of the "
            "mixture (default: 0)",
        )
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="write what was generated to this file too, a line of JSON for each prompt",
        )
        parser.add_argument(
            "--page",
            type=str | None,
            default=None,
            help="write a page to this .html file that shows what each memory says of every token "
            "of the first prompt and of what was generated for it",
        )

    @property
    def decoding(self) -> Decoding:
        """How tokens are chosen."""
        return Decoding(**{field.name: self.config[field.name] for field in fields(Decoding)})

    @property
    def prompts(self) -> list[str]:
        """The texts to continue.

        Raises:
            InputError: the file cannot be read or has no line.
        """
        path = self.config.prompts
        if path is None:
            return [self.config.prompt or ""]
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise InputError(
                f"--prompts {path}: cannot be read ({reason}); expected a text file"
            ) from None
        if not lines:
            raise InputError(f"--prompts {path}: is empty; expected a prompt on each line")
        return lines

    def check_flags(self) -> None:
        """Refuses what nothing reads, and an output that cannot be written."""
        super().check_flags()
        self.decoding.check()
        if self.config.prompt is not None and self.config.prompts is not None:
            raise InputError(
                f"--prompt and --prompts {self.config.prompts}: are both given; expected one"
            )
        for flag, is_given in (
            ("--compare", self.config.compare),
            ("--sources", self.config.sources),
            ("--page", self.config.page),
        ):
            if is_given and not self.memories:
                raise InputError(
                    f"{flag}: has no effect without memories; expected --memories or --knnlm too"
                )
        self.prompts  # noqa: B018  (refuses a file that cannot be read)
        if self.config.output is not None:
            check_writable(Path(self.config.output), "--output")
        if self.config.page is not None:
            check_writable(Path(self.config.page), "--page")


def mixtures_of(cli: GenerateCLI, subject: Subject) -> Iterator[tuple[str, Mixture]]:
    """By what they are called, those that the command line asks for."""
    if cli.memories:
        mixture = make_mixture(subject, cli.memories, cli.config.mixer, cli.settings)
        yield f"with {', '.join(cli.memories)}", mixture
    if not cli.memories or cli.config.compare:
        yield "the model alone", ALONE


def say_what_is_unknown(cli: GenerateCLI, subject: Subject) -> None:
    """Remarks on words of the prompts that the dictionary does not have."""
    dictionary = subject.data.dictionary
    if not isinstance(dictionary, Dictionary):
        return
    ids = [i for prompt in cli.prompts for i in dictionary.encode(prompt)]
    if unknown := ids.count(UNK):
        print(
            f"prompt: {unknown} of its {len(ids):,} tokens are not in the dictionary and stand as "
            "<unk>"
        )


def show(generated: Generated, vocabulary: Vocabulary, is_shown: bool) -> None:
    """Prints a text, unless it was shown while it was made, and its sources."""
    if not is_shown:
        print(f"{generated.prompt}⟩{generated.text}")
    for token, log_prob, sources in zip(
        generated.tokens, generated.log_probs, generated.sources, strict=False
    ):
        print(f"{on_a_line(vocabulary.decode([token]))}  {math.exp(log_prob):.3f}")
        for source in sources:
            context = on_a_line(source.context)
            print(f"    {source.weight:.3f}  {context} ⟩ {on_a_line(source.token)}")


def on_a_line(text: str) -> str:
    """A text with a sign for each end of a line."""
    return text.replace("\n", "↵")


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Generates and prints."""
    cli = GenerateCLI(args)
    subject = Subject.of(
        cli.model, cli.datamodule, cli.make_run(), cli.neighbor_settings, cli.ckpt_path
    )
    check_generates(subject.model)
    say_what_is_unknown(cli, subject)
    prompts, written = cli.prompts, []
    for name, mixture in mixtures_of(cli, subject):
        print(f"-- {name}")
        streams = len(prompts) == 1 and cli.decoding.beams == 1
        if streams:
            print(f"{prompts[0]}⟩", end="", flush=True)
        sizes = (cli.config.batch_size, cli.config.sources if mixture is not ALONE else 0)
        found = generate(subject, prompts, cli.decoding, mixture, *sizes, print_piece)
        if streams:
            print()
        if cli.config.page is not None and mixture is not ALONE:
            show_memories(cli, subject, mixture, found[0])
        for generated in found:
            show(generated, subject.data.dictionary, streams)
            written.append({"by": name, **asdict(generated)})
    if cli.config.output is not None:
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in written)
        write_all({Path(cli.config.output): lines.encode()})
        print(f"written: {cli.config.output}")


def show_memories(
    cli: GenerateCLI, subject: Subject, mixture: Mixture, generated: Generated
) -> None:
    """Writes the page that `--page` asks for."""
    vocabulary = subject.data.dictionary
    ids = [*opening(vocabulary), *vocabulary.encode(generated.prompt), *generated.tokens]
    page = page_of_text(subject, mixture, ids, neighbors=16)
    title = f"{cli.run_dir.name}: {' + '.join(cli.memories)}, generated"
    before = len(ids) - len(generated.tokens) - 1
    made = f"{len(generated.tokens):,} tokens, behind a prompt of {before:,}"
    write_page(Path(cli.config.page), page, subject.data, title, made)
    print(f"page: {cli.config.page}, {len(page.positions):,} tokens")


def print_piece(text: str) -> None:
    """Prints a piece of a text as it is made."""
    print(text, end="", flush=True)
