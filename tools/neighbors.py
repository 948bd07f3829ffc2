"""`neighborlm neighbors ...`: takes over neighbour tables of the original GNN-LM."""

from pathlib import Path

from jsonargparse import auto_cli

from neighborlm.common.progress import progress_bars
from neighborlm.originals.neighbor_table import import_table
from neighborlm.programs.arguments import ToolParser
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.retrieval.store.datastore import Datastore


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Takes over a neighbour table of the original program: `--neighbors.index imported` uses it.

    neighborlm neighbors --table neighbors.mmap.128 --k 128 --queries DIR --memory DIR
    """

    def take_over(table: Path, k: int, queries: Path, memory: Path) -> None:
        """Takes over a table of the original GNN-LM for `--neighbors.index imported`.

        Args:
            table: the original's file neighbors.mmap.<k>.
            k: neighbours of a token in the table.
            queries: directory of the datastore of the split whose tokens the table is of.
            memory: directory of the datastore whose rows the table names, that of the training
                split.
        """
        with progress_bars(f"neighbours k={k}", transient=True) as report:
            taken = import_table(table, k, Datastore.open(queries), Datastore.open(memory), report)
        print(f"neighbours: {taken.path}, {len(taken.rows):,} tokens")

    auto_cli(
        take_over,
        args=args,
        parser_class=ToolParser,
        as_positional=False,
        prog="neighborlm neighbors",
    )
