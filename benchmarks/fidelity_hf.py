"""What knn-transformers computes on a Hugging Face model, computed by evaluate.py.

    python -m benchmarks.fidelity_hf --fixture DIR --output fidelity.json

The fixture holds a model, raw texts, datastores with an index each (`dstore_<store>`), and of every
case its figures (`expected.json`) and the log-probability of each token (`per_token_logprobs.npz`).
The windows, the datastore and its index are those of that program; model, search, automaton and
mixture are ours. Ends with status 1 where a case is off.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from neighborlm.common.errors import InputError
from neighborlm.programs.evaluate import main as evaluate
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all

CASE = re.compile(
    r"(?P<store>\w+)/(?P<kind>base|knn|reto)(_k(?P<k>\d+)_t(?P<temperature>[\d.]+))?"
    r"(_p(?P<nprobe>\d+))?(_l(?P<lmbda>[\d.]+))?(?P<exact>_recomp)?_(?P<split>[a-z]+)\d*"
)
"""How a case is called."""
CONFIG = Path(__file__).parents[1] / "configs/text/hf.yaml"
NATS, PROBABILITY, SAVED = {"base": 1e-4}, 1e-3, 1e-12
"""How far ours may be off: log-probabilities by kind (or `PROBABILITY`), probabilities where the
index computes distances, and the share of searches that the automaton saves."""


@dataclass(frozen=True)
class Compared:
    """A case, ours beside the program's.

    Attributes:
        nats: the largest difference of log-probabilities.
        probability: the largest difference of probabilities.
        ppl: ours.
        expected_ppl: the program's.
        saved: share of searches that the automaton saves, as the program counts them; None for
            other cases.
        expected_saved: the program's.
        fits: whether ours is as near as it must be.
    """

    nats: float
    probability: float
    ppl: float
    expected_ppl: float
    saved: float | None
    expected_saved: float | None
    fits: bool


class Fixture:
    """Reference outputs.

    Args:
        folder: with all files.

    Raises:
        InputError: it has no expected.json.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "expected.json").is_file():
            raise InputError(f"--fixture {folder}: has no expected.json; expected a fixture")
        self.folder = folder.resolve()
        self.expected = json.loads((folder / "expected.json").read_text())
        self.settings = self.expected["settings"]
        self.log_probs = np.load(folder / "per_token_logprobs.npz")

    def cases(self, wanted: str) -> Iterator[tuple[str, re.Match]]:
        """Those whose names contain a regular expression."""
        for name in self.log_probs.files:
            match = CASE.fullmatch(name)
            if match and re.search(wanted, name):
                yield name, match

    def compare(self, name: str, case: re.Match) -> Compared:
        """Runs evaluate.py in the current folder."""
        expected = self.log_probs[name].astype(np.float64)
        store, case_name = name.split("/")
        figures = self.expected[store][case_name]
        flags = [*self._flags(case, len(expected)), *self._flags_of_memory(case)]
        with redirect_stdout(StringIO()):
            evaluate([*map(str, flags)])
        scores = np.load("scores.npz")
        ours = scores["lm_log_prob" if case["kind"] == "base" else "log_prob"]
        ours = ours[: len(expected)].astype(np.float64)
        if len(ours) < len(expected):
            raise InputError(f"{name}: has {len(expected)} tokens, but ours are {len(ours)}")
        nats = float(np.abs(ours - expected).max())
        probability = float(np.abs(np.exp(ours) - np.exp(expected)).max())
        ppl = float(np.exp(-ours.mean()))
        saved = self._saved(scores, len(expected)) if case["kind"] == "reto" else None
        by_index = case["kind"] != "base" and not case["exact"]
        fits = nats < NATS.get(case["kind"], PROBABILITY) or (
            by_index and probability < PROBABILITY
        )
        fits &= f"{ppl:.2f}" == f"{figures['ppl']:.2f}"
        expected_saved = figures.get("lookups_saved")
        fits &= saved is None or abs(saved - expected_saved) < SAVED
        return Compared(nats, probability, ppl, figures["ppl"], saved, expected_saved, fits)

    def _flags(self, case: re.Match, tokens: int) -> list[Any]:
        """Of the model, the text and its windows."""
        window, stride = self.settings["block_size"], self.settings["stride"]
        rows = self.settings["eval_batch_size"]
        batches = -(-tokens // (rows * stride))
        return [
            *("--config", CONFIG, "--model.pretrained", self.folder / "model"),
            *("--data.corpus", self.folder / "data", "--data.protocol", "knn-transformers"),
            *("--data.tokens_per_sample", window, "--data.context_window", window - stride),
            *("--data.max_tokens", rows * window, "--trainer.limit_test_batches", batches),
            *("--split", case["split"], "--trainer.default_root_dir", "run"),
            *("--trainer.enable_progress_bar", "false", "--token_scores", "scores.npz"),
        ]

    def _flags_of_memory(self, case: re.Match) -> list[Any]:
        """Of the datastore, its index and what is done with them."""
        if case["kind"] == "base":
            return []
        (keys,) = (self.folder / f"dstore_{case['store']}").glob("*_keys.npy")
        (index,) = keys.parent.glob("index_*.indexed")
        prefix = keys.with_name(keys.name.removesuffix("_keys.npy"))
        size, dim = prefix.name.split("_")[-2:]
        flags = [
            *("--knn.datastore", prefix, "--knn.size", size, "--knn.dim", dim),
            *("--knn.index", index, "--knn.nprobe", case["nprobe"] or self.settings["probe"]),
            *("--knn.distances", "exact" if case["exact"] else "index"),
            *("--knn.k", case["k"], "--knn.temperature", case["temperature"]),
            *("--knn.lmbda", case["lmbda"] or self.settings["lmbda"]),
        ]
        if case["kind"] == "knn":
            return [*flags, "--knnlm"]
        flags += ["--memories", "automaton", "--automaton.counting", "program"]
        return [*flags, "--automaton.walk_length", self._walk]

    @property
    def _walk(self) -> int:
        """Tokens that the program scores in a batch: it forgets its pointers with each."""
        return self.settings["stride"] * self.settings["eval_batch_size"]

    def _saved(self, scores: np.lib.npyio.NpzFile, tokens: int) -> float:
        """Share of the searches that were saved, in the program's count: of the tokens up to the
        last search of each batch."""
        searched = scores["automaton.searched"][:tokens] > 0
        walks = scores["position"][:tokens] // self._walk
        last = np.zeros(walks.max() + 1, dtype=np.int64)
        np.maximum.at(last, walks[searched], np.flatnonzero(searched))
        counted = np.arange(len(walks)) <= last[walks]
        return float(1 - searched.sum() / counted.sum())


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Parses the command line."""
    auto_cli(run, args=args, as_positional=False)


def run(fixture: Path, cases: str = "", output: Path | None = None) -> None:
    """Compares all cases and prints a table.

    Args:
        fixture: folder of the reference outputs.
        cases: regular expression; only cases whose names contain it are compared.
        output: JSON file for the figures.
    """
    check_writable(output, "--output")
    opened, found = Fixture(fixture), {}
    with TemporaryDirectory() as place, chdir(place):
        for name, case in opened.cases(cases):
            found[name] = opened.compare(name, case)
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("case", "nats", "p", "perplexity", "theirs", "saved", "theirs", "fits"):
        table.add_column(column, no_wrap=True)
    for name, c in found.items():
        saved = (
            f"{share:.4%}" if share is not None else "" for share in (c.saved, c.expected_saved)
        )
        differences = (f"{c.nats:.1e}", f"{c.probability:.1e}")
        figures = (f"{c.ppl:.2f}", f"{c.expected_ppl:.2f}")
        table.add_row(name, *differences, *figures, *saved, "yes" if c.fits else "NO")
    Console(markup=False).print(table)
    if output is not None:
        write_all({output: as_json({n: asdict(c) for n, c in found.items()})})
    if not found or not all(c.fits for c in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
