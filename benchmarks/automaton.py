"""RetoMaton (Alon et al., ICML 2022): how many searches it saves, in what time and at what
perplexity, by `min_pointers`; and whether it computes what the original program does.

    python -m benchmarks.automaton --memory DATASTORE --valid DATASTORE --valid_scores scores.npz \\
        --test DATASTORE --test_scores scores.npz --temperature 5 --output automaton.json
    python -m benchmarks.automaton --fixtures DIR

The texts are datastores of the other splits, and scores what `evaluate.py --token_scores` wrote of
them; the weight of the automaton is fitted on `valid` for every setting and applied to `test`.
Fixtures are the reference outputs of knn-transformers on a GPT-2; they need `transformers`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.texts import KEY_TYPE, Asked, Text, ask, mixed
from neighborlm.common.contracts import NProbe, Retriever, Scored
from neighborlm.common.errors import InputError
from neighborlm.originals.raw_datastore import import_datastore
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.retrieval.memories.automaton import AutomatonMemory, AutomatonSettings
from neighborlm.retrieval.memories.knn_memory import KNNMemory
from neighborlm.retrieval.memories.mixers import mixture
from neighborlm.retrieval.search.clusters import cluster_count, ensure_clusters
from neighborlm.retrieval.search.faiss_retriever import FaissRetriever
from neighborlm.retrieval.search.index import Search, open_retriever, read_index
from neighborlm.retrieval.store.datastore import Datastore

# -- searches saved ------------------------------------------------------------------------------


def ask_automaton(memory: AutomatonMemory, text: Text) -> Asked:
    """As evaluate.py asks."""
    asked = ask(memory, text)
    figures = {
        "saved": memory.searches_saved,
        "pointers": memory.counts["pointers"] / len(text),
        "search_seconds": memory.seconds["search"],
        "measure_seconds": memory.seconds["measure"],
    }
    return replace(asked, figures=figures)


def ask_knn(memory: KNNMemory, text: Text) -> Asked:
    """A search for every token."""
    return replace(ask(memory, text), figures={"saved": 0.0, "pointers": 0.0})


def curve(
    memory: Datastore,
    retriever: Retriever,
    valid: Text,
    test: Text,
    k: int,
    temperature: float,
    min_pointers: Sequence[int],
    settings: AutomatonSettings,
) -> dict[str, dict[str, float]]:
    """Figures of the kNN-LM, and of the automaton for each of `min_pointers`."""
    retriever.prepare()
    clusters = None
    if settings.clusters:
        clusters = ensure_clusters(memory, cluster_count(memory, settings.clusters))
    searching = KNNMemory(memory, retriever, k, temperature, key_type=KEY_TYPE)
    knn = [ask_knn(searching, text) for text in (valid, test)]
    rows = {"kNN": mixed(valid, knn[0], test, knn[1])}
    for fewest in min_pointers:
        settings.min_pointers = fewest
        automaton = AutomatonMemory(
            memory, retriever, k, temperature, settings, key_type=KEY_TYPE, clusters=clusters
        )
        asked = [ask_automaton(automaton, text) for text in (valid, test)]
        rows[str(fewest)] = mixed(valid, asked[0], test, asked[1])
    return rows


def as_table(rows: dict[str, dict[str, float]], tokens: int, title: str) -> Table:
    """The figures of a curve."""
    columns = ("searches saved", "pointers", "weight", "perplexity")
    speeds = ("tokens per second", "processor ms a token")
    table = Table("min_pointers", *columns, *speeds, title=title)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['saved']:.1%}",
            f"{row['pointers']:.1f}",
            f"{row['weight']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{tokens / row['seconds']:,.0f}",
            f"{1000 * row['processor_seconds'] / tokens:.2f}",
        )
    return table


# -- what the original program computes ----------------------------------------------------------


CASE = re.compile(
    r"(?P<store>\w+)/reto_k(?P<k>\d+)_t(?P<temperature>[\d.]+)(_p(?P<nprobe>\d+))?"
    r"(_l(?P<lmbda>[\d.]+))?(?P<exact>_recomp)?_(?P<split>[a-z]+)(?P<blocks>\d+)?"
)
"""How a case without clusters is called."""


class Fixtures:
    """Reference outputs of knn-transformers.

    Args:
        folder: with the model, the blocks, the datastores and what was computed on them.

    Raises:
        InputError: `transformers` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if find_spec("transformers") is None:
            raise InputError(f"--fixtures {folder}: needs the package transformers, not installed")
        self.folder = folder
        self.expected = json.loads((folder / "expected.json").read_text())
        self.settings = self.expected["settings"]
        self.log_probs = np.load(folder / "per_token_logprobs.npz")
        self.scored: dict[tuple[str, int], list[Scored]] = {}

    def cases(self) -> dict[str, re.Match]:
        """Those that are compared, by their names."""
        found = {name: CASE.fullmatch(name) for name in self.log_probs.files}
        return {name: match for name, match in found.items() if match}

    def batches(self, split: str, blocks: int) -> list[Scored]:
        """What the model says of the first blocks of a split, by batches; each begins a walk of its
        own."""
        if (split, blocks) not in self.scored:
            from transformers import GPT2LMHeadModel

            model = GPT2LMHeadModel.from_pretrained(self.folder / "model").eval()
            arrays = np.load(self.folder / "blocks.npz")
            tokens, labels = (
                torch.from_numpy(arrays[f"{split}_{name}"][:blocks].astype(np.int64))
                for name in ("input_ids", "labels")
            )
            size = self.settings["eval_batch_size"]
            self.scored[split, blocks] = [
                score_batch(model, *batch, number)
                for number, batch in enumerate(
                    zip(tokens.split(size), labels.split(size), strict=True)
                )
            ]
        return self.scored[split, blocks]

    def open(self, store: str, nprobe: int, folder: Path) -> FaissRetriever:
        """The index of a datastore, with a manifest for that in `folder`."""
        (keys,) = (self.folder / f"dstore_{store}").glob("*_keys.npy")
        (index,) = keys.parent.glob("index_*")
        prefix = keys.with_name(keys.name.removesuffix("_keys.npy"))
        rows, dim = map(int, prefix.name.split("_")[-2:])
        datastore = import_datastore(prefix, folder / store, rows, dim)
        return FaissRetriever(read_index(index), datastore, "l2", nprobe)

    def compare(self, name: str, case: re.Match) -> dict[str, float]:
        """How far the mixture is from the original's at most, in nats, and searches saved."""
        expected = self.log_probs[name]
        default = self.settings.get(case["store"], {}).get("eval_blocks")
        batches = self.batches(case["split"], int(case["blocks"] or default or 1 << 30))
        lmbda = float(case["lmbda"] or self.settings["lmbda"])
        with TemporaryDirectory() as folder:
            nprobe = int(case["nprobe"] or self.settings["probe"])
            retriever = self.open(case["store"], nprobe, Path(folder))
            automaton = AutomatonMemory(
                retriever.datastore,
                retriever,
                int(case["k"]),
                float(case["temperature"]),
                AutomatonSettings(counting="program", walk_length=WALK),
                distances="exact" if case["exact"] else "index",
            )
            automaton.begin_pass()
            said = torch.cat([automaton.say(batch).log_probs for batch in batches])
        log_probs = torch.cat([batch.log_probs for batch in batches])
        found = mixture([log_probs.double(), said.double()], [1 - lmbda, lmbda]).numpy()
        return {
            "nats": float(np.abs(found - expected).max()),
            "saved": automaton.searches_saved,
            "expected": self._figures(name)["lookups_saved"],
        }

    def _figures(self, name: str) -> dict[str, Any]:
        store, case = name.split("/")
        return self.expected[store][case]


WALK = 1 << 24
"""More tokens than a batch has: a walk goes through all rows of one."""


def score_batch(model: Any, tokens: Tensor, labels: Tensor, number: int) -> Scored:
    """What a GPT-2 says of the tokens `[B, T]` with a label, as one walk; labels are those of the
    tokens themselves, -100 where they only give context."""
    captured = []
    handle = model.transformer.h[-1].mlp.register_forward_pre_hook(
        lambda _, inputs: captured.append(inputs[0])
    )
    with torch.inference_mode():
        log_probs = model(tokens).logits.log_softmax(dim=-1)[:, :-1]
    handle.remove()
    targets = labels[:, 1:]
    scored = targets != -100
    targets = targets[scored]
    return Scored(
        torch.arange(len(targets)) + number * WALK,
        targets,
        log_probs[scored].gather(1, targets[:, None])[:, 0],
        {KEY_TYPE: captured[0][:, :-1][scored]},
    )


# -- the program ---------------------------------------------------------------------------------


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Parses the command line."""
    auto_cli(run, args=args, as_positional=False)


def run(
    memory: Path | None = None,
    valid: Path | None = None,
    valid_scores: Path | None = None,
    test: Path | None = None,
    test_scores: Path | None = None,
    temperature: float = 1.0,
    k: int = 1024,
    index: str = "auto",
    nprobe: NProbe = "auto",
    min_pointers: list[int] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1 << 20],  # noqa: B006
    automaton: AutomatonSettings | None = None,
    limit: int = 1 << 40,
    output: Path | None = None,
    fixtures: Path | None = None,
) -> None:
    """Prints a table, and writes it.

    Args:
        memory: the datastore that is walked through; its index must be there.
        valid: datastore of the split that weights are fitted on.
        valid_scores: the LM's of it.
        test: datastore of the split that is evaluated.
        test_scores: the LM's of it.
        temperature: of the scores, such as `--knn.lmbda auto` finds.
        k: neighbours of a search.
        index: see --knn.index.
        nprobe: see --knn.nprobe.
        min_pointers: to be compared.
        automaton: how it walks otherwise.
        limit: tokens of either split.
        output: JSON file for the figures.
        fixtures: reference outputs of the original program to be compared with instead.
    """
    check_writable(output, "--output")
    if fixtures is not None:
        opened = Fixtures(fixtures)
        table = Table("case", "nats at most", "searches saved", "of the original")
        for name, case in opened.cases().items():
            found = opened.compare(name, case)
            saved = (f"{found[column]:.6%}" for column in ("saved", "expected"))
            table.add_row(name, f"{found['nats']:.1e}", *saved)
        Console(markup=False).print(table)
        return
    given = {"memory": memory, "valid": valid, "valid_scores": valid_scores}
    given |= {"test": test, "test_scores": test_scores}
    for name, value in given.items():
        if value is None:
            raise InputError(f"--{name} is missing; expected it, or --fixtures")
    opened = Datastore.open(memory)
    texts = [
        Text.of(Datastore.open(store), dict(np.load(scores)), limit)
        for store, scores in ((valid, valid_scores), (test, test_scores))
    ]
    retriever = open_retriever(opened, Search(index, nprobe=nprobe))
    settings = automaton or AutomatonSettings()
    rows = curve(opened, retriever, *texts, k, temperature, min_pointers, settings)
    tokens = len(texts[1])
    Console(markup=False).print(
        as_table(rows, tokens, f"{tokens:,} tokens, {opened.n_keys:,} keys")
    )
    if output is not None:
        write_all({output: as_json({"tokens": tokens, "rows": rows})})


if __name__ == "__main__":
    main()
