"""What an evaluation with memories has tuned and fitted, kept in its run: `generation/*.npz`, from
which the same mixture is made again without another pass over the validation split.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from neighborlm.common.contracts import Memory, Mixer
from neighborlm.common.errors import InputError
from neighborlm.programs.hearing import identities
from neighborlm.programs.knn_lm import is_knn_lm
from neighborlm.programs.mixture import check_mixing, check_names
from neighborlm.programs.resources import MadeOnDemand, check_search
from neighborlm.programs.settings import MemorySettings
from neighborlm.programs.subject import Evaluated, Subject
from neighborlm.retrieval.memories import MEMORIES, MIXERS, ConstantMixer
from neighborlm.retrieval.memories.fitted import read_arrays, write_arrays
from neighborlm.retrieval.store.artifact import refuse_mismatch


class Mixture(NamedTuple):
    """Memories and what weighs them with the model.

    Attributes:
        memories: by name.
        mixer: fitted.
    """

    memories: dict[str, Memory]
    mixer: Mixer


def keep_mixture(
    subject: Subject, names: Sequence[str], settings: MemorySettings, evaluated: Evaluated
) -> Path | None:
    """Writes what an evaluation has tuned and fitted; None where a mixer that is none of `MIXERS`
    weighed, or one that does not say what it has fitted."""
    kinds = [name for name, kind in MIXERS.items() if kind is type(evaluated.mixer)]
    state = evaluated.mixer.state() if kinds else {}
    if not state:
        return None
    arrays = {f"mixer.{name}": array for name, array in state.items()}
    searching = 1.0
    for name, memory in evaluated.memories.items():
        arrays |= {f"{name}.{key}": array for key, array in memory.state().items()}
        searching = getattr(memory, "temperature", searching) if name in SEARCHING else searching
    about = {"made_from": made_from(subject, names, settings), "temperature": searching}
    path = path_of(subject, names, kinds[0])
    write_arrays(path, about, arrays)
    return path


SEARCHING = ("knn", "automaton")
"""Memories that search the datastore, at one temperature."""


def make_mixture(
    subject: Subject, names: Sequence[str], mixer: str, settings: MemorySettings
) -> Mixture:
    """The mixture that an evaluation has tuned and fitted, or that is given by
    `--knn.lmbda`. Products that are missing are made.

    Raises:
        InputError: there was no such evaluation, or one of another model or text, or with other
            settings.
    """
    settings.check()
    check_names(names, mixer)
    check_mixing(names, mixer, settings.knn)
    if "adaptive" in names:
        raise InputError(
            "--memories adaptive: the network that it trains is not kept for generation; expected "
            "--memories knn"
        )
    if mixer == "meta_k":
        raise InputError(
            "--mixer meta_k: weighs several distributions of one memory, which generation does "
            "not; expected another mixer"
        )
    if set(SEARCHING) & set(names):
        check_search(subject, settings.knn, [])
    resources = MadeOnDemand(subject, settings)
    if is_knn_lm(names, mixer) and settings.knn.lmbda != "auto":
        weighing, states = ConstantMixer((1 - settings.knn.lmbda, settings.knn.lmbda)), {}
    else:
        if mixer not in MIXERS:
            raise InputError(
                f"--mixer {mixer}: generation takes what an evaluation kept; expected one of "
                f"{', '.join(MIXERS)}"
            )
        weighing, (about, states) = MIXERS[mixer](), read_kept(subject, names, mixer, settings)
        if settings.knn.temperature == "auto":
            resources.mix_by(temperature=about["temperature"])
        weighing.restore(of_section("mixer", states))
    memories = {name: MEMORIES[name](resources) for name in names}
    weighing.ask(memories)
    for name, memory in memories.items():
        if state := of_section(name, states):
            memory.restore(state)
    return Mixture(memories, weighing)


def read_kept(
    subject: Subject, names: Sequence[str], mixer: str, settings: MemorySettings
) -> tuple[dict, dict]:
    """What `keep_mixture` wrote: its description, and its arrays."""
    path = path_of(subject, names, mixer)
    earlier = subject.run.directory / "mixtures" / path.name  # where version 0.1 has kept it
    if earlier.is_file() and not path.is_file():
        path = earlier
    if not path.is_file():
        raise InputError(
            f"{path}: no such mixture; expected an evaluation with --memories {','.join(names)} "
            f"and --mixer {mixer} first, which tunes and keeps it (evaluate.py with the same flags)"
        )
    about, arrays = read_arrays(path, "mixture that an evaluation kept")
    advice = "evaluate with these settings first (evaluate.py with the same flags)"
    refuse_mismatch(path, about["made_from"], made_from(subject, names, settings), advice)
    return about, arrays


def made_from(subject: Subject, names: Sequence[str], settings: MemorySettings) -> dict:
    """What decides whether a mixture fits: the model, and what each memory remembers and how it is
    set."""
    return {"model": subject.model.fingerprint, **identities(subject, names, settings)}


def path_of(subject: Subject, names: Sequence[str], mixer: str) -> Path:
    """The file of a mixture."""
    return subject.run.directory / "generation" / f"{mixer}-{'+'.join(names)}.npz"


def of_section(section: str, arrays: dict) -> dict:
    """The arrays of one mixer or memory, by their own names."""
    mine = {name: array for name, array in arrays.items() if name.startswith(f"{section}.")}
    return {name.removeprefix(f"{section}."): array for name, array in mine.items()}
