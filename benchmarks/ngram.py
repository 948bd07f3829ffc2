"""Measures the n-gram memory at several sizes of the training text: how long the suffix array takes
to build, what it takes in memory and on disk, and how many tokens a second it is asked about.

    python -m benchmarks.ngram --output ngram.json --plot_to ngram.png

Texts are made up: phrases of a phrase book, which and of which words as Zipf says. With `--corpus`
the training and test text of a corpus are measured too.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console

from benchmarks.measuring import apart, environment, new_table
from neighborlm.common.contracts import Scored
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.retrieval.memories.ngram import NGramMemory
from neighborlm.retrieval.memories.suffix_array import SuffixArray

AT_ONCE = 10_240
"""Tokens asked about together, as in an evaluation."""
PHRASES, LONGEST_PHRASE = 1_000_000, 7


def zipfian(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """n numbers below `size`, int64, number i as often as 1 / (i + 2)."""
    shares = (1 / np.arange(2, size + 2)).cumsum()
    return np.searchsorted(shares, rng.random(n) * shares[-1])


def made_up_tokens(n: int, words: int, seed: int, phrase_seed: int = 0) -> np.ndarray:
    """A text of n tokens, uint32: phrases of 1 to 7 words one after the other.

    Args:
        n: tokens.
        words: V.
        seed: of which phrases follow one another.
        phrase_seed: of the phrase book.
    """
    rng = np.random.default_rng(phrase_seed)
    lengths = rng.integers(1, LONGEST_PHRASE + 1, PHRASES)
    starts = np.concatenate([[0], lengths.cumsum()])
    book = zipfian(starts[-1], words, rng).astype(np.uint32)
    rng = np.random.default_rng(seed)
    parts, missing = [], n
    while missing > 0:
        chosen = zipfian(1 << 20, PHRASES, rng)
        of_chosen = lengths[chosen]
        in_book = np.repeat(starts[chosen] - of_chosen.cumsum() + of_chosen, of_chosen)
        parts.append(book[(in_book + np.arange(len(in_book)))[:missing]])
        missing -= len(parts[-1])
    return np.concatenate(parts)


class Stopwatch:
    """Seconds by the clock and of all cores, from when it is made."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Seconds since."""
        clock, cores = self.start
        return {"clock": time.perf_counter() - clock, "cores": time.process_time() - cores}


def measure(
    tokens: np.ndarray, text: np.ndarray, vocab_size: int, threads: int, folder: Path
) -> dict:
    """Builds the memory of some tokens and asks it about a text, twice: what follows frequent
    tokens is counted when it is first asked for."""
    faiss.omp_set_num_threads(threads)
    build = Stopwatch()
    array = SuffixArray.ensure(folder, tokens, vocab_size, {})
    seconds = {"build": build.read()}
    memory = NGramMemory(array)
    memory.begin_pass(text)
    memory.prepare()
    lengths, hits = [], 0
    for name in ("first_pass", "second_pass"):
        asking = Stopwatch()
        for first in range(0, len(text), AT_ONCE):
            positions = torch.arange(first, min(first + AT_ONCE, len(text)))
            targets = torch.from_numpy(text[first : first + AT_ONCE].astype(np.int64))
            opinion = memory.say(Scored(positions, targets))
            lengths.append(opinion.features["suffix_length"])
            hits += (~opinion.log_probs.isneginf()).sum().item()
        seconds[name] = asking.read()
    return {
        "tokens": len(tokens),
        "vocab_size": vocab_size,
        "asked": len(text),
        "seconds": seconds,
        "bytes_on_disk": sum(file.stat().st_size for file in folder.iterdir()),
        "mean_suffix_length": torch.cat(lengths).double().mean().item(),
        "has_target": hits / (2 * len(text)),
    }


def made_up(size: int, queries: int, words: int, threads: int, folder: Path) -> dict:
    """See `measure`, of made-up texts."""
    tokens, text = made_up_tokens(size, words, seed=1), made_up_tokens(queries, words, seed=2)
    return {"text": "made up", **measure(tokens, text, words, threads, folder)}


def of_corpus(corpus: str, queries: int, threads: int, folder: Path) -> dict:
    """See `measure`, of a corpus."""
    data = LMDataModule(corpus)
    tokens, text = data.stream("train").tokens, data.stream("test").tokens[:queries]
    return {"text": Path(corpus).name, **measure(tokens, text, data.vocab_size, threads, folder)}


def plot(rows: list[dict], path: Path) -> None:
    """Seconds to build and tokens a second, over the size of the made-up texts."""
    from matplotlib.figure import Figure  # an extra

    rows = [row for row in rows if row["text"] == "made up"]
    sizes = [row["tokens"] for row in rows]
    figure = Figure(figsize=(9, 4), layout="constrained")
    building, asking = figure.subplots(1, 2)
    building.plot(sizes, [row["seconds"]["build"]["clock"] for row in rows], "o-")
    building.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds to build")
    for which in ("first", "second"):
        rates = [row["asked"] / row["seconds"][f"{which}_pass"]["cores"] for row in rows]
        asking.plot(sizes, rates, "o-", label=f"{which} pass")
    asking.set(xscale="log", yscale="log", xlabel="tokens", ylabel="tokens a second and core")
    asking.legend()
    figure.savefig(path, format="png")


@exit_with_one_sentence
def run(
    output: Path,
    sizes: list[int] = [1_000_000, 10_000_000, 100_000_000],  # noqa: B006
    queries: int = 200_000,
    words: int = 270_000,
    threads: int = 2,
    corpus: str | None = None,
    plot_to: Path | None = None,
    work_dir: Path | None = None,
) -> None:
    """Measures, prints a table and writes it as JSON.

    Args:
        output: JSON file.
        sizes: tokens of the made-up training texts.
        queries: tokens that are asked about.
        words: of the vocabulary of made-up texts.
        threads: that look up.
        corpus: to measure too, see `--data.corpus`.
        plot_to: PNG file.
        work_dir: where suffix arrays are made; needs four bytes a token.
    """
    check_writable(output, "--output")
    check_writable(plot_to, "--plot_to")
    rows = []
    with TemporaryDirectory(dir=work_dir) as folder:
        for number, size in enumerate([*sizes, *([] if corpus is None else [None])]):
            log, place = Path(folder) / f"{number}.log", Path(folder) / str(number)
            if size is None:
                found, peak = apart(log, of_corpus, corpus, queries, threads, place)
            else:
                found, peak = apart(log, made_up, size, queries, words, threads, place)
            rows.append({**found, "peak_bytes": peak})
    columns = (
        "build s",
        "peak GB",
        "disk MB",
        "k tokens/s",
        "a core",
        "first pass",
        "suffix",
        "hits",
    )
    table = new_table(f"{queries:,} tokens asked about, {threads} threads", *columns)
    for row in rows:
        asked, seconds = row["asked"], row["seconds"]
        table.add_row(
            f"{row['tokens']:,} {row['text']}",
            f"{seconds['build']['clock']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['bytes_on_disk'] / 1e6:.0f}",
            f"{asked / seconds['second_pass']['clock'] / 1000:,.0f}",
            f"{asked / seconds['second_pass']['cores'] / 1000:,.0f}",
            f"{asked / seconds['first_pass']['cores'] / 1000:,.0f}",
            f"{row['mean_suffix_length']:.2f}",
            f"{row['has_target']:.2f}",
        )
    Console(width=max(Console(markup=False).width, 110), markup=False).print(table)  # a file has 80
    write_all({output: as_json({**environment(threads), "rows": rows})})
    if plot_to is not None:
        plot(rows, plot_to)


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
