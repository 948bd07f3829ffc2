"""`neighborlm codec ...`: what a GNN-LM's quantised features cost and lose; takes over those of the
original program."""

from dataclasses import asdict
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from neighborlm.common.errors import InputError
from neighborlm.originals.codes import import_codes
from neighborlm.programs.arguments import ToolParser
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.retrieval.neighbors.codec import compare_codecs
from neighborlm.retrieval.store.datastore import Datastore


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Compares codecs on a datastore, and takes over the codes of the original program.

    neighborlm codec compare --datastore DIR --codecs '["OPQ16_128,PQ16", "SQ8"]'
    neighborlm codec import --datastore DIR --codes FILE --quantizer FILE
    """

    def compare(
        datastore: Path, codecs: list[str], seed: int = 1, output: Path | None = None
    ) -> None:
        """Compares codecs in bytes and relative error, to choose --neighbors.codec by.

        Args:
            datastore: directory of a datastore, whose keys are encoded.
            codecs: faiss factory strings to compare, such as '["OPQ16_128,PQ16", "SQ8"]'.
            seed: of the sample of keys that codecs are trained and measured on; another one shows
                how much of a difference is chance.
            output: JSON file for the results; none by default.
        """
        check_writable(output, "--output")
        results = compare_codecs(Datastore.open(datastore), codecs, seed)
        table = Table("codec", "bytes a row", "relative error", "seconds to train")
        for name, quality in results.items():
            figures = f"{quality.relative_error:.4g}", f"{quality.train_seconds:.1f}"
            table.add_row(name, str(quality.code_size), *figures)
        Console(markup=False).print(table)
        if output is not None:
            found = {name: asdict(quality) for name, quality in results.items()}
            write_all({output: as_json(found)})

    def take_over(datastore: Path, codes: Path, quantizer: Path) -> None:
        """Takes over codes of the original GNN-LM for `--neighbors.codec imported`; copies nothing.

        Args:
            datastore: directory of the datastore whose keys were encoded.
            codes: the original's file of codes, uint8, raw or .npy.
            quantizer: the original's file of the faiss codec that made them.
        """
        for flag, path in (("--codes", codes), ("--quantizer", quantizer)):
            if not path.is_file():
                raise InputError(f"{flag} {path}: no such file; expected one of the original")
        taken = import_codes(Datastore.open(datastore), codes, quantizer)
        error = taken.manifest["relative_error"]
        print(f"codes: {taken.path}, {len(taken.codes):,} rows, relative error {error:.4f}")

    auto_cli(
        {"compare": compare, "import": take_over},
        args=args,
        parser_class=ToolParser,
        as_positional=False,
        prog="neighborlm codec",
        description="Compares codecs of a GNN-LM's features, and takes over codes of the original.",
    )
