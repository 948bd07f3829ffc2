"""`neighborlm convert ...`: checkpoints and corpora to fairseq's files, and checkpoints back."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path

from jsonargparse import auto_cli

from neighborlm.datamodules.binarized import BinarizedCorpus, CorpusSettings
from neighborlm.datamodules.corpora import SPLITS
from neighborlm.originals.conversion import convert, export
from neighborlm.originals.databin import write_databin
from neighborlm.programs.arguments import ToolParser
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import check_writable


def to_databin(
    corpus: str, output: Path, threshold: int = 0, dictionary: str | None = None
) -> None:
    """Writes a corpus as a data-bin of fairseq: dict.txt, and .bin and .idx of every split.

    Args:
        corpus: folder of text, or the name of a known corpus.
        output: folder of the data-bin.
        threshold: words rarer than this in the training text become <unk>; 0, the default, keeps
            all.
        dictionary: an existing dict.txt to use in place of the training text's own.
    """
    check_writable(output, "--output", "folder")
    source = BinarizedCorpus(CorpusSettings(corpus, "word", threshold, dictionary))
    for split in SPLITS:
        write_databin(source.stream(split), output / split, len(source.dictionary))
    source.dictionary.save(output / "dict.txt")
    print(f"data-bin: {output}, a vocabulary of {len(source.dictionary):,} symbols")


def refusing(command: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """The command of a checkpoint and an output, which looks first whether it can write there."""

    @wraps(command)
    def run(checkpoint: Path, output: Path) -> None:
        check_writable(output, "output")
        command(checkpoint, output)

    return run


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Reads and writes files of fairseq.

    neighborlm convert from_fairseq checkpoint_best.pt lm.ckpt
    neighborlm convert to_fairseq lm.ckpt checkpoint_best.pt
    neighborlm convert to_databin FOLDER DATA-BIN
    """
    auto_cli(
        {
            "from_fairseq": refusing(convert),
            "to_fairseq": refusing(export),
            "to_databin": to_databin,
        },
        args=args,
        parser_class=ToolParser,
        prog="neighborlm convert",
        description="Checkpoints of fairseq to ours and back, and corpora to its data-bins.",
    )
