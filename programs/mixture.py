"""The perplexity of a mixture of a model and memories."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neighborlm.callbacks.interpolation import Interpolation
from neighborlm.callbacks.tally import Tally
from neighborlm.common.contracts import Memory, Mixer
from neighborlm.common.errors import InputError
from neighborlm.common.files import digest_of
from neighborlm.programs.reports import figures
from neighborlm.programs.resources import MadeOnDemand
from neighborlm.programs.settings import KNNSettings, MemorySettings
from neighborlm.programs.subject import Evaluated, Pass, Subject, score, seconds_of
from neighborlm.retrieval.memories import MEMORIES, MIXERS
from neighborlm.retrieval.memories.fitted import FittedOn, save_mixer
from neighborlm.retrieval.memories.text_order import lines_are_shuffled


def evaluate_mixture(
    subject: Subject,
    split: str,
    names: Sequence[str],
    mixer: Mixer,
    resources: MadeOnDemand,
    keep_scores: bool,
    keep: Callable[[Mixer], Path] | None = None,
) -> Evaluated:
    """A mixture of any memories, weighed by a mixer that is fitted on the validation split unless
    it was before.

    Args:
        keep: writes the mixer to a file once it is fitted.
    """
    memories = {name: MEMORIES[name](resources) for name in names}
    check_order(subject, memories)
    stream = subject.data.stream(split)
    if "recent" in names and lines_are_shuffled(stream.tokens, stream.line_starts):
        print(
            f"--memories recent: the lines of the {split} split have no more rare words in common "
            "with the next line than with any other, as if they were shuffled; the running text "
            "has little to remember"
        )
    mixing = Interpolation(memories, mixer, resources.tokens(split), keep_scores)
    described = {"memories": list(names), "mixer": type(mixer).__name__}
    untuned = [name for name, memory in memories.items() if getattr(memory, "needs_tuning", False)]
    if mixer.needs_fitting or untuned:
        hearing = Interpolation(memories, None, resources.tokens("valid"), keep_scores=True)
        heard = score(subject, "valid", mixing.want, [hearing])
        opinions = hearing.tally.opinions(names)
        opinions |= {name: memories[name].tune() for name in untuned}
        if mixer.needs_fitting:
            mixer.fit(opinions)
            if keep is not None and mixer.state() and heard.trainer.is_global_zero:
                described["mixer_file"] = str(keep(mixer))
    made = score(subject, split, mixing.want, [mixing])
    if {"knn", "automaton"} & set(names):
        described["knn_temperature"] = resources.knn.temperature
    results = {"mixture": described | mixed_figures(mixing.tally, made) | seconds_in(mixing)}
    seconds = seconds_of(subject, resources.products)
    scores = mixing.tally.table.gathered() if keep_scores else None
    return Evaluated(made.results | results, seconds, made.trainer, memories, mixer, scores)


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
    for name in memories:
        if name not in MEMORIES:
            known = ", ".join(MEMORIES)
            raise InputError(f"--memories: {name} is no memory; expected some of {known}")
    if len(set(memories)) < len(memories):
        raise InputError(f"--memories are {','.join(memories)}; expected each once")
    if mixer not in MIXERS and Path(mixer).suffix != ".npz":
        known = ", ".join(MIXERS)
        raise InputError(f"--mixer is {mixer}; expected one of {known}, or a fitted one's .npz")


def check_mixing(memories: Sequence[str], mixer: str, knn: KNNSettings) -> None:
    """Refuses weights and temperatures that something else decides on."""
    alone = tuple(memories) == ("knn",) and mixer == "constant"
    if alone and knn.lmbda == "auto" and knn.temperature != "auto":
        raise InputError(
            f"--knn.temperature {knn.temperature}: has no effect with --knn.lmbda auto, which "
            "tunes both; expected a number as --knn.lmbda too, or no such flag"
        )
    if not alone and knn.cache is not None:
        raise InputError(
            f"--knn.cache {knn.cache}: keeps what the memory knn alone retrieves; expected no such "
            f"flag with --memories {','.join(memories)} and --mixer {mixer}"
        )
    if not alone and knn.lmbda != "auto":
        raise InputError(
            f"--knn.lmbda {knn.lmbda}: has no effect with --memories {','.join(memories)} and "
            f"--mixer {mixer}, which weighs them; expected no such flag"
        )


def mixed_figures(tally: Tally, made: Pass) -> dict[str, Any]:
    """Figures of the mixture of a pass."""
    tokens, loss = made.results["tokens"], tally.loss.compute()["loss"].item()
    return {"tokens": tokens, **figures(loss, tokens, made.seconds), **tally.statistics()}


def seconds_in(mixing: Interpolation) -> dict[str, dict[str, float]]:
    """What the time of a pass with memories was spent on."""
    seconds, alone = dict(mixing.seconds), len(mixing.memories) == 1
    for name, memory in mixing.memories.items():
        for what, spent in getattr(memory, "seconds", {}).items():
            seconds[what if alone else f"{name}.{what}"] = spent
    return {"seconds_of": seconds}


def identities(subject: Subject, names: Sequence[str], settings: MemorySettings) -> dict[str, str]:
    """By memory, what identifies what it remembers and how it is set: weights that were fitted
    beside it fit no other."""
    knn = {name: value for name, value in asdict(settings.knn).items() if name not in PLACES}
    sections = {"knn": [knn], "automaton": [knn, asdict(settings.automaton)]}
    sections["recent"] = [asdict(settings.recent)]
    remembered = subject.data.fingerprint("train")
    return {name: digest_of(json.dumps([remembered, sections.get(name)])) for name in names}


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


PLACES = ("datastore", "cache", "shards", "placement", "shard")
"""Settings of a datastore that change no vote."""
