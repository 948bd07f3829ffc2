"""Writes and reads what came of a pass over a split: fitted mixers, and opinions of memories. Each
is an `.npz` file of arrays and, as `about`, a JSON text that says what they are and were made from.

A mixer is refused on the text that it was fitted on, where its figures would be too good, and with
another model or other memories than it was fitted for.
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neighborlm.common.contracts import Mixer, Opinion
from neighborlm.common.errors import InputError, raise_no_memory
from neighborlm.common.files import needing, publishing
from neighborlm.retrieval.store.artifact import refuse_mismatch

FORMAT = 1
ABOUT = "about"


@dataclass(frozen=True)
class FittedOn:
    """What a mixer was fitted on.

    Attributes:
        split: its name, such as `valid`.
        text: fingerprint of the split's tokens.
        model: fingerprint of the language model.
        memories: by name, in their order, what identifies what each remembers and how it is set.
    """

    split: str
    text: str
    model: str
    memories: dict[str, str]


def save_mixer(path: Path, name: str, mixer: Mixer, fitted_on: FittedOn) -> None:
    """Writes a fitted mixer; a reader sees the old file or the new one, never a part.

    Args:
        path: of the file.
        name: of the mixer, as `load_mixer` finds it.

    Raises:
        InputError: it is not fitted.
    """
    write_arrays(path, {"mixer": name, "fitted_on": asdict(fitted_on)}, mixer.state())


def load_mixer(
    path: Path,
    mixers: Mapping[str, Callable[[], Mixer]],
    text: str,
    model: str,
    memories: Mapping[str, str],
) -> tuple[Mixer, FittedOn]:
    """A mixer that was fitted before, for a split at hand.

    Args:
        path: of the file.
        mixers: makes each, by name.
        text: fingerprint of the split that it is to be used on.
        model: fingerprint of the model.
        memories: by name, in their order; see `FittedOn`.

    Raises:
        InputError: missing, damaged, not a mixer, fitted on this very text, or for another model or
            other memories.
    """
    about, state = read_arrays(path, "fitted mixer")
    name, fitted_on = about["mixer"], FittedOn(**about["fitted_on"])
    if name not in mixers:
        raise InputError(f"{path}: is a mixer {name}; expected one of {', '.join(mixers)}")
    if fitted_on.text == text:
        raise InputError(
            f"{path}: was fitted on this very text, the split {fitted_on.split}, where its figures "
            "would be too good; expected another split"
        )
    if list(fitted_on.memories) != list(memories):
        raise InputError(
            f"{path}: was fitted for the memories {','.join(fitted_on.memories)}, not for "
            f"{','.join(memories)}; expected those, in this order"
        )
    for memory, found in fitted_on.memories.items():
        if found != memories[memory]:
            raise InputError(
                f"{path}: was fitted for another memory {memory} ({found}) than is here "
                f"({memories[memory]}); fit it anew"
            )
    if fitted_on.model != model:
        raise InputError(
            f"{path}: was fitted for another model ({fitted_on.model}) than is here ({model}); fit "
            "it anew"
        )
    mixer = mixers[name]()
    try:
        mixer.restore(state)
    except KeyError as error:
        raise InputError(f"{path}: lacks {error}; expected a fitted mixer {name}") from None
    return mixer, fitted_on


# -- opinions ------------------------------------------------------------------------------------


def save_opinion(
    path: Path, opinion: Opinion, state: Mapping[str, np.ndarray], made_from: Mapping[str, Any]
) -> None:
    """Writes what a memory said of all tokens of a split.

    Args:
        path: of the file.
        opinion: in the order of the text.
        state: of the memory, see `Memory.state`.
        made_from: JSON-able, what decides the opinion.
    """
    arrays = {f"state.{name}": array for name, array in state.items()}
    arrays |= {f"feature.{name}": x.numpy() for name, x in opinion.features.items()}
    write_arrays(path, {"made_from": made_from}, arrays | {"log_probs": opinion.log_probs.numpy()})


def load_opinion(path: Path, made_from: Mapping[str, Any]) -> tuple[Opinion, dict[str, np.ndarray]]:
    """What a memory said of all tokens of a split, and its state.

    Raises:
        InputError: missing, damaged, or made from something else.
    """
    about, arrays = read_arrays(path, "memory's opinion")
    refuse_mismatch(path, about.get("made_from", {}), made_from)

    def named(section: str) -> dict[str, np.ndarray]:
        found = {name: array for name, array in arrays.items() if name.startswith(f"{section}.")}
        return {name.removeprefix(f"{section}."): array for name, array in found.items()}

    features = {name: torch.from_numpy(array) for name, array in named("feature").items()}
    return Opinion(torch.from_numpy(arrays["log_probs"]), features), named("state")


# -- the files -----------------------------------------------------------------------------------


def write_arrays(path: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays and what they are; a reader sees the old file or the new one, never a part."""
    text = np.array(json.dumps({"format": FORMAT, **about}))
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(array.nbytes for array in arrays.values())
    with publishing(path) as making, needing(needed, making), open(making, "wb") as file:
        np.savez(file, **{ABOUT: text}, **arrays)


def read_arrays(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Arrays, and what they are.

    Raises:
        InputError: missing, damaged or of another format.
    """
    expected = f"expected the file of a {kind}"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop(ABOUT)))
        found = about["format"]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {expected}") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise_no_memory(error)
        raise InputError(f"{path}: cannot be read ({error}); {expected}") from None
    if found != FORMAT:
        raise InputError(f"{path}: has format {found}; this program reads {FORMAT}")
    return about, arrays
