"""Recomputes reference outputs of the original programs from their own artifacts and compares.

    python -m benchmarks.fidelity --fixtures DIR --output fidelity.json

DIR holds `checkpoint.pt`, `data-bin/`, raw datastores `dstore_<name>_keys.npy` and `_vals.npy`,
indexes `knn_<name>.index`, `expected.json` (case -> the original's command line and printed
figures) and `npz/<case>.npz` (its per-token scores). Every case's settings are read from its
command line and, as the original's are, from the arguments that its checkpoint holds. A datastore
that DIR has only the values of, and its index, are made as the original makes them. Prints a
Markdown table, and ends with status 1 where a difference is above the tolerance that it prints. A
directory with `world.npz` holds outputs of GNN-LM: `benchmarks/fidelity_gnn.py` compares those.
"""

import ast
import json
import math
import sys
import tempfile
from argparse import ArgumentParser
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import faiss
import numpy as np
import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks import fidelity_gnn
from neighborlm.common.contracts import Retriever, Scored, Want
from neighborlm.common.errors import InputError
from neighborlm.models.scorer import Scorer
from neighborlm.originals.fairseq_files import SAFE_GLOBALS
from neighborlm.originals.raw_datastore import import_datastore
from neighborlm.programs.checkpoints import load_model
from neighborlm.programs.cli import quiet
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.retrieval.memories import KNNMemory
from neighborlm.retrieval.memories.mixers import mixture
from neighborlm.retrieval.search.faiss_retriever import FaissRetriever
from neighborlm.retrieval.search.index import read_index
from neighborlm.retrieval.search.retriever import FlatRetriever
from neighborlm.retrieval.store.datastore import Datastore

KEY_TYPE = "last_ffn_input"
FOUND = -5000.0  # the original's log p_kNN of a target that no neighbour carries is near -10000

LM_TOLERANCE = 1e-4
"""In nats, of the LM's log-probability of any token."""
KNN_TOLERANCE, NEAR_TIES = 1e-3, 1 / 5000
"""In nats, of log p_kNN and of the mixture, of all tokens but a share (or two): where keys are
nearly tied at the k-th place, the rounding of the search decides which of them votes."""
LOSS_TOLERANCE, OTHER_INDEX_TOLERANCE = 1e-4, 1e-2
"""Of losses to the base 2; of those from an index that was trained here, which has other lists than
the original's, the second."""
TOLERANCES = (
    f"tolerance: {LM_TOLERANCE:.0e} nats for each token of the LM; {KNN_TOLERANCE:.0e} nats of kNN "
    f"and mixture for all but one token in {1 / NEAR_TIES:,.0f} (or two), and {LOSS_TOLERANCE:.0e} "
    f"of the loss; {OTHER_INDEX_TOLERANCE:.0e} of the loss where the index was trained here"
)


@dataclass(frozen=True)
class Case:
    """One run of the original.

    Attributes:
        name: its key in expected.json.
        args: its command line, parsed.
        loss_base2, ppl: what it printed.
    """

    name: str
    args: object
    loss_base2: str
    ppl: str

    @classmethod
    def read(cls, name: str, described: dict) -> "Case":
        """From an entry of expected.json."""
        parser = ArgumentParser()
        parser.add_argument("--gen-subset")
        parser.add_argument("--sample-break-mode", default="none")
        parser.add_argument("--context-window", type=int, default=0)
        parser.add_argument("--model-overrides", default="{}")
        parser.add_argument("--dstore-filename")
        parser.add_argument("--dstore-size", type=int)
        parser.add_argument("--indexfile", default="")
        parser.add_argument("--k", type=int, default=8)
        parser.add_argument("--lmbda", type=float)
        parser.add_argument("--probe", type=int, default=8)
        parser.add_argument("--knn-sim-func", default="l2")
        parser.add_argument("--knnlm", action="store_true")
        args, _ = parser.parse_known_args(described["args"])
        return cls(name, args, described["loss_base2_printed"], described["ppl_printed"])

    @property
    def overrides(self) -> dict[str, object]:
        """Arguments of the model that the command line sets anew."""
        return ast.literal_eval(self.args.model_overrides)


class Fixtures:
    """The artifacts of a fixture directory, each opened once.

    Args:
        folder: the directory.
        scratch: where manifests for the raw datastores are written.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder = folder
        self.scratch = scratch
        self.expected = json.loads((folder / "expected.json").read_text())
        self.model = load_model(folder / "checkpoint.pt")
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        self.tokens_per_sample = checkpoint["args"].tokens_per_sample
        """Length of rows, which eval_lm.py takes from here whatever its command line says."""
        self.score = cache(self.score)
        self.datastore = cache(self.datastore)

    def cases(self) -> list[Case]:
        """All cases that have per-token scores, and artifacts to compute them with."""
        cases = []
        for name, described in self.expected.items():
            if (self.folder / "npz" / f"{name}.npz").is_file():
                case = Case.read(name, described)
                if not case.args.knnlm or self.has_datastore(case):
                    cases.append(case)
        return cases

    def datastore_name(self, case: Case) -> str:
        """`mini` of `ds/A_mini`."""
        return Path(case.args.dstore_filename).name.rpartition("_")[2]

    def has_datastore(self, case: Case) -> bool:
        """Whether the keys that a case searched are in the fixture, or the values to make them."""
        prefix = self.folder / f"dstore_{self.datastore_name(case)}"
        return Path(f"{prefix}_keys.npy").is_file() or Path(f"{prefix}_vals.npy").is_file()

    def row_lengths(self, overrides: dict[str, object]) -> tuple[int, int]:
        """Tokens of a row and of the longest block that the original does not drop."""
        longest = self.model.hparams.max_target_positions
        return (
            overrides.get("tokens_per_sample", self.tokens_per_sample),
            overrides.get("max_target_positions") or longest,
        )

    def score(
        self,
        split: str,
        break_mode: str,
        context_window: int,
        row_lengths: tuple[int, int],
        drop: bool,
    ) -> Scored:
        """Targets, log-probabilities and keys of a split, sorted by position."""
        tokens_per_sample, longest = row_lengths
        data = CorpusDataModule(
            str(self.folder / "data-bin"),
            break_mode=break_mode,
            tokens_per_sample=tokens_per_sample,
            context_window=context_window,
            max_tokens=8 * tokens_per_sample,
            drop_long_lines=drop,
        )
        data.max_target_positions = longest
        keep = KeepScores()
        trainer = pl.Trainer(
            callbacks=[keep],
            logger=False,
            accelerator="cpu",
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        scorer = Scorer(self.model, Want((KEY_TYPE,)))
        trainer.test(scorer, data.evaluation_dataloader(split), verbose=False)
        parts = zip(*map(columns_of, keep.batches), strict=True)
        columns = [torch.cat(part) for part in parts]
        order = columns[0].argsort()
        return of_columns(*(column[order] for column in columns))

    def datastore(self, name: str, size: int) -> Datastore:
        """A raw datastore of the original, in place."""
        width = self.model.key_width(KEY_TYPE)
        source = self.artifacts(name) / f"dstore_{name}"
        return import_datastore(source, self.scratch / name, size, width)

    def retriever(self, case: Case, datastore: Datastore) -> Retriever:
        """The case's index: exact search for a flat one, which fixtures do not store."""
        name = self.datastore_name(case)
        if "flat" in case.args.indexfile:
            return FlatRetriever(datastore, "l2")
        index = read_index(self.artifacts(name) / f"knn_{name}.index")
        return FaissRetriever(index, datastore, "l2", case.args.probe)

    def has_index(self, case: Case) -> bool:
        """Whether the index that a case searched, if any, is in the fixture, or gives the same
        wherever it is made."""
        if not case.args.knnlm or "flat" in case.args.indexfile:
            return True
        return (self.folder / f"knn_{self.datastore_name(case)}.index").is_file()

    def artifacts(self, name: str) -> Path:
        """The folder of a datastore's keys and index: the fixture's, or the scratch folder, where
        they are made as eval_lm.py and build_dstore.py make them."""
        if (self.folder / f"dstore_{name}_keys.npy").is_file():
            return self.folder
        keys_path = self.scratch / f"dstore_{name}_keys.npy"
        if keys_path.is_file():
            return self.scratch
        dumped, built = (self.made(name, flag) for flag in ("--dstore-mmap", "--faiss_index"))
        values = np.load(self.folder / f"dstore_{name}_vals.npy").ravel()
        context = int(dumped["--context-window"])
        lengths = self.row_lengths(ast.literal_eval(dumped.get("--model-overrides", "{}")))
        scores = self.score(dumped["--gen-subset"], "none", context, lengths, True)
        first = lengths[0] - context  # it loses the first block
        # And the last, if it was short and alone in its batch: the end then stays zero, which is
        # the value of no token.
        saved = int(np.flatnonzero(values).max(initial=-1)) + 1
        rows = slice(first, first + saved)
        if not np.array_equal(scores.targets[rows], values[:saved]):
            raise InputError(
                f"{self.folder}: the datastore {name} has other values than a row of {lengths[0]} "
                f"tokens with {context} of context gives; expected the original's of this data-bin"
            )
        keys = np.zeros((len(values), self.model.key_width(KEY_TYPE)), np.float32)
        keys[:saved] = scores.keys[KEY_TYPE][rows].numpy()
        values.astype(np.int64).tofile(self.scratch / f"dstore_{name}_vals.npy")
        lists, code_bytes = int(built["--ncentroids"]), int(built["--code_size"])
        width = keys.shape[1]
        coarse = faiss.IndexFlatL2(width)
        index = faiss.IndexIVFPQ(coarse, width, lists, code_bytes, 8)
        # As the original draws them: another generator gives another index.
        order = np.random.RandomState(1).choice(len(keys), min(1_000_000, len(keys)), replace=False)
        index.train(keys[order])
        index.add(keys)
        faiss.write_index(index, str(self.scratch / f"knn_{name}.index"))
        keys.tofile(keys_path)
        return self.scratch

    def made(self, name: str, flag: str) -> dict[str, str]:
        """The command line, by flags, that made a datastore, or its index, of this name."""
        for described in self.expected.values():
            args = described.get("args", [])
            if flag in args:
                values = dict(zip(args, [*args[1:], ""], strict=True))
                if Path(values[flag]).stem.rpartition("_")[2] == name:
                    return values
        raise InputError(f"{self.folder / 'expected.json'}: does not say how {name} was made")


def columns_of(scored: Scored) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, targets, log-probabilities and keys."""
    return scored.positions, scored.targets, scored.log_probs, scored.keys[KEY_TYPE]


def of_columns(positions: Tensor, targets: Tensor, log_probs: Tensor, keys: Tensor) -> Scored:
    """The reverse of `columns_of`."""
    return Scored(positions, targets, log_probs, {KEY_TYPE: keys})


class KeepScores(pl.Callback):
    """Keeps what every test step returned."""

    def __init__(self) -> None:
        self.batches: list[Scored] = []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_) -> None:
        """Takes a batch's scores."""
        self.batches.append(outputs)


def compute(case: Case, fixtures: Fixtures, faithful: bool = True) -> dict[str, np.ndarray]:
    """Our scores for a case.

    Args:
        faithful: with the options that reproduce what the original does to long lines and missing
            neighbours, where ours does otherwise by default.

    Returns:
        `position` int64, `lm` and, for kNN cases, `knn` and `mixed`, float32, by position.
    """
    a = case.args
    lengths = fixtures.row_lengths(case.overrides)
    scores = fixtures.score(a.gen_subset, a.sample_break_mode, a.context_window, lengths, faithful)
    result = {"position": scores.positions.numpy(), "lm": scores.log_probs.numpy()}
    if not a.knnlm:
        return result
    datastore = fixtures.datastore(fixtures.datastore_name(case), a.dstore_size)
    memory = KNNMemory(
        datastore,
        fixtures.retriever(case, datastore),
        a.k,
        key_type=KEY_TYPE,
        distances="index" if a.knn_sim_func == "do_not_recomp_l2" else "exact",
        similarity="ip" if a.knn_sim_func == "dot" else None,
        missing="last_row" if faithful else "left_out",
    )
    parts = zip(*(column.split(8192) for column in columns_of(scores)), strict=True)
    knn = torch.cat([memory.say(of_columns(*part)).log_probs for part in parts])
    log_probs = (scores.log_probs.double(), knn.double())
    mixed = mixture(log_probs, (1 - a.lmbda, a.lmbda)).float()
    return {**result, "knn": knn.numpy(), "mixed": mixed.numpy()}


def compare(case: Case, fixtures: Fixtures) -> dict:
    """The original's figures, ours and the largest differences."""
    ours = compute(case, fixtures)
    theirs = np.load(fixtures.folder / "npz" / f"{case.name}.npz")
    lm_case = "lm_" + case.args.gen_subset if case.args.knnlm else case.name
    position = np.cumsum(np.load(fixtures.folder / "npz" / f"{lm_case}.npz")["position"])
    if not np.array_equal(position, ours["position"]):
        raise InputError(
            f"{case.name}: scores {len(ours['position'])} tokens, which are not the "
            f"{len(position)} of {lm_case}.npz; expected the same"
        )
    differences = {}
    if case.args.knnlm:
        found = theirs["knn_score"] > FOUND
        for name, column in (("knn", "knn_score"), ("mixed", "score")):
            gap = np.abs(ours[name][found] - theirs[column][found])
            differences[name] = float(gap.max())
            differences[f"{name}_tokens_above_1e-3"] = int((gap > 1e-3).sum())
    else:
        differences["lm"] = float(np.abs(ours["lm"] - theirs["score"]).max())
    final = ours.get("mixed", ours["lm"])
    loss = -final.astype(np.float64).mean()
    gap = abs(loss + theirs["score"].astype(np.float64).mean()) / math.log(2)
    differences["loss_base2"] = float(gap)
    return {
        "case": case.name,
        "tokens": len(final),
        "original": {"loss_base2": case.loss_base2, "ppl": case.ppl},
        "ours": {"loss_base2": f"{loss / math.log(2):.4f}", "ppl": f"{math.exp(loss):.2f}"},
        "largest_difference": differences,
        "above_tolerance": above_tolerance(differences, len(final), fixtures.has_index(case)),
        "ours_by_default": by_default(case, fixtures),
    }


def above_tolerance(differences: dict[str, float], tokens: int, same_index: bool) -> list[str]:
    """Which of the differences of a case are too large.

    Args:
        tokens: how many were scored.
        same_index: whether the search was in the original's index.
    """
    rare = max(2, NEAR_TIES * tokens)
    largest = {
        "lm": LM_TOLERANCE,
        "loss_base2": LOSS_TOLERANCE,
        "knn_tokens_above_1e-3": rare,
        "mixed_tokens_above_1e-3": rare,
    }
    if not same_index:
        largest = {"loss_base2": OTHER_INDEX_TOLERANCE}
    # Not `<=`, which nan would pass.
    return [n for n, limit in largest.items() if n in differences and not differences[n] <= limit]


def by_default(case: Case, fixtures: Fixtures) -> dict:
    """What ours gives without the options that reproduce the original."""
    scores = compute(case, fixtures, faithful=False)
    final = scores.get("mixed", scores["lm"]).astype(np.float64)
    return {"tokens": len(final), "ppl": f"{math.exp(-final.mean()):.2f}"}


def as_markdown(rows: list[dict]) -> str:
    """A line a case."""
    lines = [
        "| case | loss, base 2: original | ours | perplexity: original | ours | largest difference "
        "(nats) | by default: perplexity | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        gaps = row["largest_difference"]
        largest = ", ".join(
            f"{name} {gap:.1e}" for name, gap in gaps.items() if name in ("lm", "knn", "mixed")
        )
        many = gaps.get("mixed_tokens_above_1e-3")
        original, ours, default = row["original"], row["ours"], row["ours_by_default"]
        lines.append(
            f"| {row['case']} | {original['loss_base2']} | {ours['loss_base2']} "
            f"| {original['ppl']} | {ours['ppl']} "
            f"| {largest}{f' ({many} tokens above 1e-3)' if many else ''} "
            f"| {default['ppl']} | {default['tokens']:,} |"
        )
    return "\n".join(lines)


def run(fixtures: Path, output: Path, only: list[str] | None = None) -> list[dict]:
    """Compares the cases of a fixture directory, prints the table and what is above the tolerance,
    and writes both as JSON.

    Args:
        fixtures: directory of reference outputs.
        output: JSON file for the comparison.
        only: names of cases; all by default.
    """
    check_writable(output, "--output")
    quiet()
    if (fixtures / "world.npz").is_file():
        compared = fidelity_gnn.compare(fixtures)
        write_all({output: as_json(compared)})
        print(fidelity_gnn.as_markdown(compared))
        return verdict(compared["cases"], fidelity_gnn.TOLERANCES)
    if not (fixtures / "expected.json").is_file():
        raise InputError(
            f"--fixtures {fixtures}: has neither expected.json nor world.npz; expected reference "
            "outputs of kNN-LM or GNN-LM"
        )
    with tempfile.TemporaryDirectory() as scratch:
        opened = Fixtures(fixtures, Path(scratch))
        cases = [case for case in opened.cases() if only is None or case.name in only]
        rows = [compare(case, opened) for case in cases]
    if not rows:
        raise InputError(f"--fixtures {fixtures}: has no case to compare; expected one of --only")
    write_all({output: as_json(rows)})
    print(as_markdown(rows))
    return verdict(rows, TOLERANCES)


def verdict(rows: list[dict], tolerances: str) -> list[dict]:
    """Prints the tolerances, and which cases are above them."""
    print(f"\n{tolerances}")
    for row in rows:
        if row["above_tolerance"]:
            print(f"above the tolerance: {row['case']}: {', '.join(row['above_tolerance'])}")
    if not any(row["above_tolerance"] for row in rows):
        print(f"all {len(rows)} cases are within it")
    return rows


@exit_with_one_sentence
def main() -> None:
    """The command line."""
    if any(row["above_tolerance"] for row in auto_cli(run, as_positional=False)):
        sys.exit(1)


if __name__ == "__main__":
    main()
