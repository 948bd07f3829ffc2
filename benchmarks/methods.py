"""All memories and their mixtures on one text, alone and together, beside the graph network: what
each gains and costs, and where it helps and hurts.

    python -m benchmarks.methods --base.corpus FOLDER --output methods.json
    python -m benchmarks.methods --base.corpus FOLDER --turns 5

A small LM and a GNN-LM on it are trained on the first words of a corpus where they are missing, and
so is everything that memories are made of. All weights are fitted on the validation text; every way
of predicting then gets a pass over the test text of its own. The first table has perplexities with
paired bootstrap intervals, rates, bytes and searches; the second one splits the same tokens by what
they are. With `--turns`, passes with neighbours alone and with all that stands in `TOGETHER` are
timed by turns instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli

from benchmarks.measuring import environment
from benchmarks.texts import Base, read_clocks
from neighborlm.callbacks.interpolation import Interpolation
from neighborlm.common.contracts import Mixer, Want
from neighborlm.programs.evaluation import evaluate
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.hearing import Heard, hear
from neighborlm.programs.knn_lm import tuned_temperature
from neighborlm.programs.mixture import Mixing
from neighborlm.programs.places import as_json, check_writable, write_all
from neighborlm.programs.reports import as_markdown
from neighborlm.programs.resources import MadeOnDemand
from neighborlm.programs.settings import KNNSettings, MemorySettings
from neighborlm.programs.subject import PLAIN, Subject, score
from neighborlm.retrieval.memories import MIXERS, ConstantMixer
from neighborlm.retrieval.memories.slices import (
    BLOCK,
    Slices,
    by_bands,
    by_quantiles,
    by_truth,
    compared,
    gains,
    in_repeats,
)
from neighborlm.retrieval.store.arrays import token_counts

ALONE = ("knn", "ngram", "recent", "automaton")
TOGETHER = ("knn", "ngram", "recent")
OF_LM = (
    *((name,) for name in ALONE),
    *(("knn", "ngram"), ("knn", "recent"), ("ngram", "recent"), TOGETHER),
    ("automaton", "ngram", "recent"),
)
"""What is mixed with the LM, by one weight for all tokens."""
OF_NETWORK = (("knn",), ("recent",), TOGETHER)
"""What is mixed with the GNN-LM."""
MIXED_BY = ("buckets", "gate")
"""Other mixers of the LM and what stands in `TOGETHER`."""
REPEATED = 8
"""Tokens of a passage."""


@dataclass(frozen=True)
class Method:
    """A way of predicting the test text.

    Attributes:
        name: in the tables.
        losses: of every token, float64 `[n]`, in the order of the text.
        tokens_per_second: of the pass; for a model alone those of its own steps.
        bytes_on_disk: of what its memories are made of.
        searches: queries that they searched for.
        weights: mean weight of each memory.
    """

    name: str
    losses: np.ndarray
    tokens_per_second: float
    bytes_on_disk: int = 0
    searches: int = 0
    weights: Mapping[str, float] | None = None


class Comparison:
    """A model, with all memories at hand and what they say of the validation text.

    Args:
        subject: the model.
        base: what it is called.
        settings: of the memories.
    """

    def __init__(self, subject: Subject, base: str, settings: MemorySettings) -> None:
        self.subject = subject
        self.base = base
        self.settings = settings
        self.resources = MadeOnDemand(subject, settings)
        self.resources.mix_by(temperature=tuned_temperature(subject, self.resources))
        self.all = Mixing.of(ALONE, ConstantMixer(), None, self.resources)
        self.heard: Heard = hear(subject, "valid", self.all.memories, self.resources)

    def alone(self) -> list[Method]:
        """The model without memories: the LM, and a graph network on it if there is one."""
        evaluated = evaluate(self.subject, "test", keep_scores=True)
        found = [("LM", "lm_log_prob", evaluated.results)]
        if "gnn" in evaluated.results:
            found += [(self.base, "gnn_log_prob", evaluated.results["gnn"])]
        return [
            Method(name, -evaluated.scores[column].astype(np.float64), figures["tokens_per_second"])
            for name, column, figures in found
        ]

    def mixed(self, names: Sequence[str], kind: str = "constant") -> Method:
        """The model and some memories, weighed by a kind of mixer."""
        mixer: Mixer = MIXERS[kind]()
        mixer.fit(self.heard.sources(*names))
        mixing, seconds = self._pass(names, mixer)
        statistics = mixing.tally.statistics()
        table = mixing.tally.table.gathered()
        used = set().union(*(self.all.used[name] for name in names))
        return Method(
            " + ".join([self.base, *names]) + ("" if kind == "constant" else f", {kind}"),
            -table["log_prob"].astype(np.float64),
            len(table["log_prob"]) / seconds,
            self.resources.bytes_of(used),
            sum(mixing.tally.searches[name] for name in names),
            {name: statistics[f"weight.{name}"] for name in names},
        )

    def adaptive(self) -> Method:
        """The model, and neighbours that a gate has searched for where it saw fit."""
        names = ["adaptive"]
        evaluated = evaluate(self.subject, "test", names, settings=self.settings, keep_scores=True)
        row = evaluated.results["table"][-1]
        searched = row["searches"] / evaluated.results["tokens"]
        return Method(
            f"{self.base} + adaptive, {searched:.0%} searched",
            -evaluated.scores["log_prob"].astype(np.float64),
            row["tokens_per_second"],
            row["bytes_on_disk"],
            row["searches"],
            row["weights"],
        )

    def _pass(
        self, names: Sequence[str], mixer: Mixer, want: Want = PLAIN
    ) -> tuple[Interpolation, float]:
        memories = {name: self.all.memories[name] for name in names}
        text = self.resources.tokens("test")
        mixing = Interpolation(memories, mixer, text, keep_scores=True)
        made = score(self.subject, "test", mixing.want.and_also(want), [mixing])
        return mixing, made.seconds

    def turns(self, count: int) -> dict[str, float]:
        """What a pass with all that stands in `TOGETHER` takes for every second of one with
        neighbours alone, by the `clock` and in time of all `cores`: medians of some pairs."""
        mixers = {("knn",): ConstantMixer(), TOGETHER: ConstantMixer()}
        for names, mixer in mixers.items():
            mixer.fit(self.heard.sources(*names))
            self._pass(names, mixer)  # warms up
        ratios = []
        for _ in range(count):
            spent = []
            for names, mixer in mixers.items():
                clocks = read_clocks()
                self._pass(names, mixer)
                spent.append(read_clocks() - clocks)
            ratios.append(spent[1] / spent[0])
        return dict(zip(("clock", "cores"), np.median(ratios, axis=0).tolist(), strict=True))

    def slices(self, quantiles: int = 4) -> list[Slices]:
        """Classes of the test text's tokens."""
        names = ("ngram", "knn")
        mixer = ConstantMixer((1.0, 0.0, 0.0))
        mixing, _ = self._pass(names, mixer, Want(entropy=True))
        table = mixing.tally.table.gathered()
        text, train = self.resources.tokens("test"), self.resources.tokens("train")
        counts = token_counts(train, self.resources.vocab_size)[table["target"]]
        repeated = in_repeats(text, REPEATED)[table["position"]]
        overlap = table["ngram.suffix_length"]
        return [
            by_bands("token in the training text, times", counts, [0, 10, 100, 1000, 10_000]),
            by_bands("longest suffix in the training text, tokens", overlap, [0, 2, 3, 5, 9]),
            by_quantiles("nearest distance", table["knn.nearest_distance"], quantiles),
            by_quantiles("entropy of the LM, nats", table["lm.entropy"], quantiles),
            by_truth(
                f"in a passage of {REPEATED} tokens that this text has had before",
                repeated,
                "no",
                "yes",
            ),
        ]


# -- tables --------------------------------------------------------------------------------------


def first_table(methods: Sequence[Method], block: int) -> tuple[list[dict[str, Any]], str]:
    """Figures of all methods, and the same as a table; the first is what others compare with."""
    intervals = compared({method.name: method.losses for method in methods}, block)
    rows, lines = [], []
    for method in methods:
        ppl, relative = intervals[method.name]
        figures = asdict(replace(method, losses=None))
        figures |= {"ppl": ppl._asdict(), "relative": relative._asdict()}
        rows.append(figures)
        lines.append(
            [
                method.name,
                f"{ppl.value:.2f} ({ppl.low:.1f} to {ppl.high:.1f})",
                f"{relative.value:.3f} ({relative.low:.3f} to {relative.high:.3f})",
                f"{method.tokens_per_second:,.0f}",
                f"{method.bytes_on_disk / 1e6:,.1f}",
                f"{method.searches:,}",
            ]
        )
    columns = ["", "perplexity", "relative to the LM", "tokens / s", "MB on disk", "searches"]
    return rows, as_markdown(columns, lines)


def second_table(
    methods: Sequence[Method], classes: Sequence[Slices]
) -> tuple[list[dict[str, Any]], str]:
    """What methods gain over the first one by classes of tokens, in nats a token, with the shares
    of tokens helped and hurt."""
    losses = {method.name: method.losses for method in methods}
    rows, lines = [], []
    for slices in classes:
        lines.append([f"**{slices.name}**", *[""] * (1 + len(methods))])
        for found in gains(losses, slices):
            of_methods = {name: gain._asdict() for name, gain in found.gains.items()}
            rows.append({"by": slices.name, **found._asdict(), "gains": of_methods})
            if found.share == 0:
                continue
            lines.append(
                [
                    found.label,
                    f"{found.share:.1%}",
                    f"{np.exp(found.loss):,.1f}",
                    *(
                        f"{gain.nats:+.2f} ({gain.helped:.0%}, {gain.hurt:.0%})"
                        for gain in found.gains.values()
                    ),
                ]
            )
    base, *others = losses
    return rows, as_markdown(["", "tokens", f"perplexity of the {base}", *others], lines)


# -- the program ---------------------------------------------------------------------------------


def run(
    base: Base,
    gnn_updates: int = 200,
    k: int = 1024,
    block: int = BLOCK,
    turns: int = 0,
    output: Path | None = None,
) -> None:
    """Prints both tables, and writes them.

    Args:
        base: the LM and its texts.
        gnn_updates: of the graph network; 0 leaves it out.
        k: neighbours of a search.
        block: tokens of a block that the bootstrap draws.
        turns: pairs of passes that are timed by turns, in place of the tables.
        output: JSON file for the figures.
    """
    check_writable(output, "--output")
    settings = MemorySettings(KNNSettings(k=k))
    of_lm = Comparison(base.subject, "LM", settings)
    if turns:
        found = of_lm.turns(turns)
        print(f"{' + '.join(TOGETHER)} over knn: {found['clock']:.2f} by the clock, ", end="")
        print(f"{found['cores']:.2f} in time of all cores")
        return
    methods = [*of_lm.alone(), *(of_lm.mixed(names) for names in OF_LM), of_lm.adaptive()]
    methods += [of_lm.mixed(TOGETHER, kind) for kind in MIXED_BY]
    in_slices = [m for m in methods if m.name in {"LM", *(f"LM + {name}" for name in ALONE)}]
    in_slices += [m for m in methods if m.name == " + ".join(["LM", *TOGETHER])]
    if gnn_updates:
        of_network = Comparison(base.on_network(gnn_updates), "GNN-LM", settings)
        _, network = of_network.alone()
        methods += [network, *(of_network.mixed(names) for names in OF_NETWORK)]
        in_slices.append(network)
    rows, first = first_table(methods, block)
    split, second = second_table(in_slices, of_lm.slices())
    print(f"\n{first}\n\n{second}\n")
    if output is not None:
        said = {"base": {**asdict(base), "corpus": base.part().name}, "methods": rows}
        said |= {"slices": split, "environment": environment(0)}
        write_all({output: as_json(said)})


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Parses the command line."""
    auto_cli(run, args=args, as_positional=False)


if __name__ == "__main__":
    main()
