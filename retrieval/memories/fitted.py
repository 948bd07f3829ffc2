"""Writes and reads fitted mixers: an `.npz` file of the arrays of `Mixer.state` and, as `about`, a
JSON text that names the mixer and what it was fitted on.

A mixer is refused on the text that it was fitted on, where its figures would be too good, and with
another model or other memories than it was fitted for.
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from neighborlm.common.contracts import Mixer
from neighborlm.common.errors import InputError
from neighborlm.common.files import publishing

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
    about = {"format": FORMAT, "mixer": name, "fitted_on": asdict(fitted_on)}
    state = mixer.state()
    path.parent.mkdir(parents=True, exist_ok=True)
    with publishing(path) as making, open(making, "wb") as file:
        np.savez(file, **{ABOUT: np.array(json.dumps(about))}, **state)


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
    about, state = _read(path)
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


def _read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The JSON description of a mixer, and its arrays."""
    expected = "expected the file of a fitted mixer"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop(ABOUT)))
        found = about["format"]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {expected}") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read ({error}); {expected}") from None
    if found != FORMAT:
        raise InputError(f"{path}: has format {found}; this program reads {FORMAT}")
    return about, arrays
