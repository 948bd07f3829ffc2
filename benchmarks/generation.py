"""Measures generation with the memory knn beside the model alone, of transformers, in turns within
one process: tokens a second, with the times of the parts.

    python -m benchmarks.generation --pretrained DIR --corpus FOLDER --output generation.json

Both generate greedily from the same prompts, of the test split, and as many tokens, by
transformers' own `generate` and by the loop of generate.py. The datastore is made from the training
split, unless it is there.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import faiss
import torch
from jsonargparse import auto_cli
from rich.console import Console

from benchmarks.measuring import environment, new_table
from neighborlm.models.decoding import Decoding
from neighborlm.programs.cli import quiet
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.generation import ALONE, generate
from neighborlm.programs.kept_mixture import make_mixture
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.programs.pretrained import load_pretrained
from neighborlm.programs.run import Run
from neighborlm.programs.settings import KNNSettings, MemorySettings, PretrainedSettings
from neighborlm.programs.subject import Subject
from neighborlm.programs.with_memory import give_memory

PROMPT = 32
"""Tokens of a prompt."""


def measure(
    subject: Subject, knn: KNNSettings, batches: Sequence[int], tokens: int, turns: int
) -> list[dict]:
    """Tokens a second of each way, by batch: those of each turn, and their median."""
    mixture = make_mixture(subject, ["knn"], "constant", MemorySettings(knn))
    alone = load_pretrained(PretrainedSettings(subject.model.name)).model
    mixed = give_memory(subject.model.model, subject, mixture)
    text = subject.data.stream("test").tokens
    decoding = Decoding(tokens, temperature=0)
    measured = []
    for batch in batches:
        starts = torch.arange(batch) * (len(text) // batch)
        rows = [torch.from_numpy(text[at : at + PROMPT].astype("int64")) for at in starts.tolist()]
        inputs = torch.stack(rows)
        prompts = [subject.data.dictionary.decode(row.tolist()) for row in rows]
        how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        how |= {"pad_token_id": subject.data.dictionary.eos}
        how |= {"attention_mask": torch.ones_like(inputs)}
        ways: dict[str, Callable[[], object]] = {
            "transformers, alone": lambda: alone.generate(inputs, **how),  # noqa: B023
            "transformers, with knn": lambda: mixed.generate(inputs, **how),  # noqa: B023
            "generate.py, alone": lambda: generate(subject, prompts, decoding, ALONE),  # noqa: B023
            "generate.py, with knn": lambda: generate(subject, prompts, decoding, mixture),  # noqa: B023
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(turns + 1):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                if turn:  # the first one loads what it needs
                    rates[way].append(batch * tokens / (time.perf_counter() - start))
        measured += [
            {
                "batch": batch,
                "way": way,
                "tokens_per_second": statistics.median(of_way),
                "turns": of_way,
            }
            for way, of_way in rates.items()
        ]
    return measured


@exit_with_one_sentence
def benchmark(
    pretrained: Path,
    corpus: Path,
    output: Path = Path("generation.json"),
    place: Path = Path("generation-benchmark"),
    index: str = "auto",
    k: int = 1024,
    nprobe: int = 32,
    batches: Sequence[int] = (1, 8),
    tokens: int = 64,
    turns: int = 5,
    threads: int | None = None,
) -> None:
    """Measures and prints.

    Args:
        pretrained: directory of a model of transformers.
        corpus: folder of raw text, of which the training split is stored.
        output: JSON file of the figures.
        place: directory of the run, whose datastore is made where it is missing.
        index: what searches; see --knn.index.
        k: neighbours of each token.
        nprobe: inverted lists that a query visits.
        batches: numbers of prompts at a time.
        tokens: that are generated for each prompt.
        turns: how often each way is measured, one after another; the first is not counted.
        threads: of torch and faiss.
    """
    check_writable(output, "--output")
    quiet()
    used = threads or torch.get_num_threads()
    torch.set_num_threads(used)
    faiss.omp_set_num_threads(used)
    model = load_pretrained(PretrainedSettings(str(pretrained)))
    data = CorpusDataModule(
        str(corpus),
        tokens_per_sample=256,
        context_window=128,
        tokenizer=str(pretrained),
        cache_dir=str(place / "cache"),
    )
    subject = Subject.of(model, data, Run(place, {"logger": False}))
    knn = KNNSettings(index=index, k=k, nprobe=nprobe, lmbda=0.25, temperature=10.0)
    knn = replace(knn, datastore=str(place / "train"))
    measured = measure(subject, knn, batches, tokens, turns)
    rows = len(data.stream("train").tokens)
    found = {"keys": rows, "k": k, "nprobe": nprobe, "index": index, "tokens": tokens}
    write_all({output: as_json({**found, "measured": measured, **environment(used)})})
    title = f"{tokens} tokens, {rows:,} keys, k {k}, {nprobe} probes, {used} threads"
    table = new_table(title, "batch", "tokens/s", "of alone")
    for one in measured:
        of_alone = next(
            other["tokens_per_second"]
            for other in measured
            if other["batch"] == one["batch"]
            and other["way"] == f"{one['way'].partition(',')[0]}, alone"
        )
        rate = one["tokens_per_second"]
        table.add_row(one["way"], str(one["batch"]), f"{rate:,.0f}", f"{rate / of_alone:.2f}")
    Console(markup=False).print(table)


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
