"""The perplexity of mixtures of a model and memories: of all memories together, and of each alone,
from one pass over the validation split, which tunes and fits them all, and one over the split that
is evaluated."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neighborlm.callbacks.interpolation import Interpolation
from neighborlm.callbacks.tally import ALONE, Tally, summed
from neighborlm.common.contracts import Memory, Mixer, Want
from neighborlm.common.errors import InputError
from neighborlm.programs.hearing import Heard, hear, identities
from neighborlm.programs.reports import figures
from neighborlm.programs.resources import MadeOnDemand
from neighborlm.programs.settings import KNNSettings, MemorySettings
from neighborlm.programs.subject import Evaluated, Pass, Subject, score, seconds_of
from neighborlm.retrieval.memories import MEMORIES, MIXERS
from neighborlm.retrieval.memories.fitted import FittedOn, save_mixer
from neighborlm.retrieval.memories.text_order import lines_are_shuffled


@dataclass
class Mixing:
    """Memories, what weighs them, and what they take.

    Attributes:
        memories: by name.
        mixer: weighs the model and all of them.
        alone: by memory, what weighs the model and this memory alone; empty where there is one
            memory or the mixer was fitted before.
        used: by memory, what it has asked of its resources.
    """

    memories: dict[str, Memory]
    mixer: Mixer
    alone: dict[str, Mixer] = field(default_factory=dict)
    used: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, names: Sequence[str], mixer: Mixer, kind: str | None, resources: MadeOnDemand
    ) -> "Mixing":
        """Makes the memories.

        Args:
            kind: name of the mixer, where it is to be fitted.
        """
        mixing = cls({}, mixer)
        for name in names:
            resources.used.clear()
            mixing.memories[name] = MEMORIES[name](resources)
            mixing.used[name] = set(resources.used)
        mixer.ask(mixing.memories)
        if kind is not None and len(names) > 1:
            mixing.alone = {name: mixer_alone(kind, name) for name in names}
        return mixing

    @property
    def want(self) -> Want:
        """What the mixers need to know of the model."""
        want = Want()
        for mixer in (self.mixer, *self.alone.values()):
            want = want.and_also(mixer.want)
        return want

    @property
    def needs_validation(self) -> bool:
        """Whether anything is to be tuned or fitted."""
        untuned = any(memory.needs_tuning for memory in self.memories.values())
        return untuned or self.mixer.needs_fitting

    def fit(self, heard: Heard) -> None:
        """Fits all mixers that need it to the same opinions."""
        if self.mixer.needs_fitting:
            self.mixer.fit(heard.sources())
        for name, mixer in self.alone.items():
            mixer.fit(heard.sources(name))


def mixer_alone(kind: str, memory: str) -> Mixer:
    """What weighs the model and one memory: meta-k, which reads neighbours, those of knn alone."""
    return MIXERS["constant" if kind == "meta_k" and memory != "knn" else kind]()


def evaluate_mixture(
    subject: Subject,
    split: str,
    mixing: Mixing,
    resources: MadeOnDemand,
    keep_scores: bool,
    keep: Callable[[Mixer], Path] | None = None,
) -> Evaluated:
    """Mixtures of memories, weighed by mixers that are fitted on the validation split unless they
    were before.

    Args:
        keep: writes the mixer to a file once it is fitted.

    Returns:
        figures under `mixture`, and the rows of the one table under `table`.
    """
    memories, names = mixing.memories, list(mixing.memories)
    check_order(subject, memories)
    stream = subject.data.stream(split)
    if "recent" in names and lines_are_shuffled(stream.tokens, stream.line_starts):
        print(
            f"--memories recent: the lines of the {split} split have no more rare words in common "
            "with the next line than with any other, as if they were shuffled; the running text "
            "has little to remember"
        )
    described: dict[str, Any] = {"memories": names}
    if mixing.needs_validation:
        start = time.perf_counter()
        heard = hear(subject, "valid", memories, resources, mixing.want)
        mixing.fit(heard)
        resources.products.seconds["tuning"] = time.perf_counter() - start
        fitted = keep is not None and mixing.mixer.state()
        if fitted and heard.made.trainer.is_global_zero:
            described["mixer_file"] = str(keep(mixing.mixer))
    if resources.knn.cache is None:
        callback = Interpolation(
            memories, mixing.mixer, resources.tokens(split), keep_scores, alone=mixing.alone
        )
        made = score(subject, split, callback.want, [callback])
        tally, seconds = callback.tally, dict(callback.seconds)
    else:
        start = time.perf_counter()
        heard = hear(subject, split, memories, resources, mixing.want)
        tally = heard.tallied(mixing.mixer, mixing.alone, keep_scores)
        made = Pass(heard.made.results, time.perf_counter() - start, heard.made.trainer)
        seconds, described["cached_k"] = dict(heard.seconds), heard.cached_k
    described["mixer"] = type(mixing.mixer).__name__
    for name in ("knn", "automaton", "adaptive"):
        if name in memories:
            described["knn_temperature"] = memories[name].temperature
    results = made.results | {
        "mixture": described | mixed_figures(tally, made) | seconds_in(memories, seconds),
        "table": table_of(made, tally, mixing, resources, seconds),
    }
    scores = tally.table.gathered() if keep_scores else None
    spent = seconds_of(subject, resources.products)
    asked = (memories, mixing.mixer, scores, tally.sample.gathered(), tally.shown)
    return Evaluated(results, spent, made.trainer, *asked)


# -- figures -------------------------------------------------------------------------------------


def mixed_figures(tally: Tally, made: Pass) -> dict[str, Any]:
    """Figures of the mixture of a pass."""
    tokens, loss = made.results["tokens"], tally.loss.compute()["loss"].item()
    means = {k: v for k, v in tally.statistics().items() if not k.startswith(f"{ALONE}.")}
    return {"tokens": tokens, **figures(loss, tokens, made.seconds), **means}


def seconds_in(
    memories: Mapping[str, Memory], seconds: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """What the time of a pass with memories was spent on."""
    found, alone = dict(seconds), len(memories) == 1
    for name, memory in memories.items():
        for what, spent in getattr(memory, "seconds", {}).items():
            found[what if alone else f"{name}.{what}"] = spent
    return {"seconds_of": found}


def table_of(
    made: Pass,
    tally: Tally,
    mixing: Mixing,
    resources: MadeOnDemand,
    seconds: Mapping[str, float],
) -> list[dict[str, Any]]:
    """The rows of the one table: the LM, the graph network on it, each memory alone with the model,
    and all together.

    Each has `name`, `memories`, `loss`, `ppl`, `tokens_per_second`, `weights` by memory (means),
    `bytes_on_disk` and `searches`. The rate of a model is that of its own steps, that of one memory
    among several the rate at which it answered, and that of all the rate of the pass.
    """
    results, names, means = made.results, list(mixing.memories), tally.statistics()
    searches, tokens = summed(tally.searches), results["tokens"]
    rates = ("loss", "ppl", "tokens_per_second")

    def row(memories: list[str], measured: Mapping[str, Any], kind: str) -> dict[str, Any]:
        used = set().union(*(mixing.used[name] for name in memories))
        return {
            "name": " + ".join([base, *memories]),
            "memories": memories,
            **{name: measured[name] for name in rates},
            "weights": {name: means[f"{kind}.{name}"] for name in memories},
            "bytes_on_disk": resources.bytes_of(used),
            "searches": sum(searches[name] for name in memories),
        }

    base = "LM"
    rows = [row([], results, "weight")]
    if "gnn" in results:
        base = "GNN-LM"
        rows += [row([], results["gnn"], "weight")]
    for name, total in tally.alone.items():
        loss, spent = total.compute()["loss"].item(), seconds.get(name, made.seconds)
        rows += [row([name], figures(loss, tokens, spent), ALONE)]
    loss = tally.loss.compute()["loss"].item()
    return [*rows, row(names, figures(loss, tokens, made.seconds), "weight")]


# -- what can be wrong ---------------------------------------------------------------------------


def check_order(subject: Subject, memories: Mapping[str, Memory]) -> None:
    """Refuses several ranks where a memory that reads the text in its order would read less of it
    in one than the whole before."""
    ranks = subject.run.trainer().world_size
    for name, memory in memories.items():
        if not memory.in_order or ranks == 1:
            continue
        if memory.warm_up is None:
            raise InputError(
                f"--memories {name}: must have read all of the text before a token, but {ranks} "
                "ranks would read a part each; expected --trainer.devices 1"
            )
        if subject.run.evaluates_part:
            raise InputError(
                f"--memories {name}: reads the text in its order, and {ranks} ranks read a part "
                "each, of which --trainer.limit_test_batches or --trainer.fast_dev_run would leave "
                "out the end; expected --trainer.devices 1, or no such flag"
            )


def check_names(memories: Sequence[str], mixer: str) -> None:
    """Refuses unknown memories and mixers, and a memory that is named twice."""
    known = ", ".join(MEMORIES)
    for name in memories:
        if not name:
            given = ",".join(memories)
            raise InputError(f"--memories {given!r}: names no memory; expected some of {known}")
        if name not in MEMORIES:
            raise InputError(f"--memories: {name} is no memory; expected some of {known}")
    if len(set(memories)) < len(memories):
        raise InputError(f"--memories are {','.join(memories)}; expected each once")
    if mixer not in MIXERS and Path(mixer).suffix != ".npz":
        known = ", ".join(MIXERS)
        raise InputError(f"--mixer is {mixer}; expected one of {known}, or a fitted one's .npz")


def check_mixing(memories: Sequence[str], mixer: str, knn: KNNSettings) -> None:
    """Refuses weights and temperatures that something else decides on."""
    if "adaptive" in memories and (len(memories) > 1 or mixer != "constant"):
        raise InputError(
            f"--memories {','.join(memories)} --mixer {mixer}: adaptive decides before each search "
            "what the neighbours weigh; expected it alone, and no --mixer"
        )
    alone = tuple(memories) == ("knn",) and mixer == "constant"
    if alone and knn.lmbda == "auto" and knn.temperature != "auto":
        raise InputError(
            f"--knn.temperature {knn.temperature}: has no effect with --knn.lmbda auto, which "
            "tunes both; expected a number as --knn.lmbda too, or no such flag"
        )
    if "knn" not in memories and knn.cache is not None:
        raise InputError(
            f"--knn.cache {knn.cache}: keeps what the memory knn retrieves; expected knn among "
            f"--memories {','.join(memories)}, or no such flag"
        )
    one = len(memories) == 1 and memories[0] in ("knn", "automaton") and mixer == "constant"
    if not one and knn.lmbda != "auto":
        raise InputError(
            f"--knn.lmbda {knn.lmbda}: has no effect with --memories {','.join(memories)} and "
            f"--mixer {mixer}, which weighs them; expected no such flag"
        )


# -- files ---------------------------------------------------------------------------------------


def keep_mixer(
    subject: Subject, names: Sequence[str], mixer: str, settings: MemorySettings
) -> Callable[[Mixer], Path]:
    """What keeps a fitted mixer in the run's directory, where `--mixer FILE` finds it."""
    path = subject.run.directory / "mixers" / f"{mixer}-{'+'.join(names)}.npz"
    text, model = subject.data.fingerprint("valid"), subject.model.fingerprint
    fitted_on = FittedOn("valid", text, model, identities(subject, names, settings))

    def keep(fitted: Mixer) -> Path:
        save_mixer(path, mixer, fitted, fitted_on)
        return path

    return keep
