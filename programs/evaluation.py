"""Perplexity of a trained model, plain or mixed with memories.

`evaluate` takes a model, a corpus and a run, makes what is missing of the memories, and returns the
figures.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from neighborlm.callbacks.token_scores import LMScores
from neighborlm.common.errors import InputError
from neighborlm.programs.hearing import check_cache, identities
from neighborlm.programs.kept_mixture import keep_mixture
from neighborlm.programs.knn_lm import (
    evaluate_adaptive,
    evaluate_knn,
    is_knn_lm,
    tuned_temperature,
)
from neighborlm.programs.mixture import (
    Mixing,
    check_mixing,
    check_names,
    evaluate_mixture,
    keep_mixer,
)
from neighborlm.programs.reports import with_bits_per_character, with_text_figures
from neighborlm.programs.resources import MadeOnDemand, check_search
from neighborlm.programs.settings import MemorySettings
from neighborlm.programs.subject import (
    Evaluated,
    Subject,
    measure_of,
    score,
    seconds_of,
    text_size_of,
    tokens_of,
)
from neighborlm.retrieval.memories import MIXERS, ConstantMixer
from neighborlm.retrieval.memories.fitted import load_mixer


def evaluate(
    subject: Subject,
    split: str = "test",
    memories: Sequence[str] = (),
    mixer: str = "constant",
    settings: MemorySettings | None = None,
    keep_scores: bool = False,
) -> Evaluated:
    """The perplexity of a model on a split, and with memories the mixture's.

    Args:
        subject: what is evaluated.
        split: of the corpus.
        memories: names of `MEMORIES`; none for the model alone.
        mixer: a name of `MIXERS`.
        settings: of the memories.
        keep_scores: keep every token's log-probabilities.

    Raises:
        InputError: something does not fit together; before any long work.
    """
    settings = settings or MemorySettings()
    settings.check()
    subject.data.stream(split)
    check_same_model(subject)
    if memories:
        evaluated = evaluate_with_memories(subject, split, memories, mixer, settings, keep_scores)
        if evaluated.trainer.is_global_zero:
            keep_mixture(subject, memories, settings, evaluated)
    else:
        evaluated = evaluate_alone(subject, split, keep_scores)
    tokens, whole = evaluated.results["tokens"], tokens_of(subject.data, split)
    part = {"part": f"first {tokens:,} of {whole:,} tokens"} if tokens < whole else {}
    results = measure_of(subject.data) | part | evaluated.results
    size = text_size_of(subject.data, split, tokens)
    if size is not None:
        results = with_text_figures(results, size)
    if results["unit"] == "char":
        results = with_bits_per_character(results)
    return replace(evaluated, results=results)


def check_same_model(subject: Subject) -> None:
    """Raises InputError where ranks have read different models from one checkpoint."""
    if subject.run.trainer().world_size == 1:
        return
    own = subject.model.fingerprint
    first = subject.run.from_first_rank(own, subject.model)
    if own != first:
        raise InputError(
            f"{getattr(subject.model, 'checkpoint', None) or 'the model'}: is {own} here, but "
            f"{first} on rank 0, as where a training has replaced it meanwhile; repeat the command"
        )


def evaluate_alone(subject: Subject, split: str, keep_scores: bool) -> Evaluated:
    """The model without memories."""
    lm_scores = LMScores()
    alone = score(subject, split, callbacks=[lm_scores] if keep_scores else [])
    scores = lm_scores.table.gathered() if keep_scores else None
    return Evaluated(alone.results, seconds_of(subject), alone.trainer, scores=scores)


def evaluate_with_memories(
    subject: Subject,
    split: str,
    memories: Sequence[str],
    mixer: str,
    settings: MemorySettings,
    keep_scores: bool,
) -> Evaluated:
    """The model and its mixture with memories."""
    check_names(memories, mixer)
    check_mixing(memories, mixer, settings.knn)
    given = is_knn_lm(memories, mixer) and settings.knn.lmbda != "auto"
    if not given and mixer in MIXERS:
        subject.data.stream("valid")  # what the mixture is tuned on
    if SEARCHING & set(memories):
        splits = [split] if given else sorted({split, "valid"})
        check_search(subject, settings.knn, splits)
        check_cache(subject, settings.knn, splits)
    resources = MadeOnDemand(subject, settings)
    if is_knn_lm(memories, mixer):
        return evaluate_knn(subject, split, resources, keep_scores)
    if "adaptive" in memories:
        if split == "valid":
            raise InputError("--split valid: is what the gate is trained on; expected another")
        return evaluate_adaptive(subject, split, resources, keep_scores)
    keep = None
    if mixer in MIXERS:
        weighing, lmbda = MIXERS[mixer](), settings.knn.lmbda
        if lmbda != "auto":  # of one memory
            weighing = ConstantMixer((1 - lmbda, lmbda))
        if weighing.needs_fitting and split == "valid":
            raise InputError("--split valid: is what the mixer is fitted on; expected another")
        keep = keep_mixer(subject, memories, mixer, settings)
    else:
        text, model = subject.data.fingerprint(split), subject.model.fingerprint
        remembered = identities(subject, memories, settings)
        weighing, _ = load_mixer(Path(mixer), MIXERS, text, model, remembered)
    open_temperature = settings.knn.temperature == "auto" and settings.knn.lmbda == "auto"
    if open_temperature and "automaton" in memories:
        resources.mix_by(temperature=tuned_temperature(subject, resources))
    kind = mixer if mixer in MIXERS else None
    mixing = Mixing.of(memories, weighing, kind, resources)
    return evaluate_mixture(subject, split, mixing, resources, keep_scores, keep)


SEARCHING = {"knn", "automaton", "adaptive"}
"""Memories that search the datastore."""
