"""Reads fairseq's checkpoint files without running code that they may hold.

Up to fairseq 0.9 a checkpoint says how its model was made in `args`, a Namespace; from 0.10 on in
`cfg`, a tree of settings: of omegaconf's objects in 0.10, of plain dictionaries later. omegaconf is
not needed: objects of whatever class become `Inert` ones, that do nothing.
"""

import io
import pickle
import pickletools
import re
import struct
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neighborlm.common.errors import InputError

LIGHTNING_KEY = "pytorch-lightning_version"
LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # of files of torch before 1.6
LEGACY_PICKLES = 4  # magic number, protocol version, system information, the saved object
READ_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, OSError, EOFError),
    *(ValueError, TypeError, LookupError, AttributeError, struct.error),  # of damaged files
)


class Inert:
    """Stands in for an object in a file, of whatever class: keeps what it was made from and its
    attributes, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


SAFE_GLOBALS = [
    Namespace,
    *((Inert, f"fairseq.meters.{name}Meter") for name in ("Average", "Time", "Stopwatch")),
]
"""What files of fairseq 0.9 hold besides tensors and plain values."""
OF_SETTINGS = re.compile(
    r"(omegaconf|fairseq|typing)\..*|_?operator\.getitem|argparse\.Namespace"
    r"|builtins\.(type|int|float|bool|str|list|dict|tuple|object)"
)
"""What those of fairseq 0.10 hold as well: types, and objects that name settings."""
NAMES_NOW = {"__builtin__.long": "builtins.int", "__builtin__.unicode": "builtins.str"}
"""By the names under which the second protocol of pickles keeps them."""
INTERPOLATED = re.compile(r"\$\{([\w.]+)\}")


def is_fairseq_checkpoint(path: Path | str) -> bool:
    """Whether a file looks like a fairseq checkpoint: torch wrote it, and it contains the strings
    `args` and `model` but no version of Lightning. Nothing is loaded."""
    try:
        strings = {text for _, text in _pickled(Path(path))}
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return {"args", "model"} <= strings and LIGHTNING_KEY not in strings


def read_checkpoint(path: Path) -> tuple[Namespace, dict[str, Tensor]]:
    """The arguments and the tensors of a fairseq checkpoint.

    Raises:
        InputError: the file cannot be read, or holds objects that are not allowed.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a fairseq checkpoint")
    try:
        with torch.serialization.safe_globals([*SAFE_GLOBALS, *_inert_globals(path)]):
            # With a memory map the state of the optimiser is never read.
            mapped = zipfile.is_zipfile(path)
            checkpoint = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except READ_ERRORS as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden is None:
            raise InputError(
                f"{path}: torch cannot read it; expected a fairseq checkpoint"
            ) from error
        raise InputError(
            f"{path}: refused, it holds a {forbidden[1]}; expected tensors, plain Python values "
            "and no other objects than a Namespace, and those of fairseq and omegaconf"
        ) from None
    found = sorted(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else []
    args, cfg, model = (checkpoint[k] if k in found else None for k in ("args", "cfg", "model"))
    if args is None and cfg is not None:
        try:
            args = arguments_of(cfg)
        except READ_ERRORS:  # such as settings that contain themselves
            args = None
    if not isinstance(args, Namespace) or not isinstance(model, Mapping):
        raise InputError(
            f"{path}: has the keys {found}; expected args (a Namespace) or cfg (settings), and "
            "model (its tensors) among them, as fairseq writes them"
        )
    return args, {name: value for name, value in model.items() if torch.is_tensor(value)}


def arguments_of(cfg: Any) -> Namespace | None:
    """The arguments of fairseq 0.9 that the settings of a later one stand for; None if there are
    no settings of a model."""
    plain = _plain(cfg)
    if not isinstance(plain, dict):
        return None
    sections = {name: value for name, value in plain.items() if isinstance(value, dict)}
    if not sections.get("model"):
        return None
    # Later sections win: a model's settings are of more weight than its optimiser's.
    order = ("optimization", "optimizer", "lr_scheduler", "task", "model")
    found = {name: v for section in order for name, v in sections.get(section, {}).items()}
    found = {name: _interpolated(value, sections) for name, value in found.items()}
    found = {name: value for name, value in found.items() if value not in (None, "???")}
    for section in ("optimizer", "lr_scheduler"):
        found[section] = sections.get(section, {}).get("_name")
    scheduled = sections.get("lr_scheduler", {})
    # What were lr and max_lr are min_lr and lr.
    if found["lr_scheduler"] == "cosine" and scheduled.get("max_lr") is None:
        lr = _first(_interpolated(scheduled.get("lr"), sections))
        found |= {"max_lr": lr, "lr": [scheduled.get("min_lr", 0.0)]}
    return Namespace(**found)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _interpolated(value: Any, sections: Mapping[str, Any]) -> Any:
    """A value, or the one of another section that it names, such as `${task.add_bos_token}`."""
    for _ in range(len(sections)):
        refers = INTERPOLATED.fullmatch(value) if isinstance(value, str) else None
        if refers is None:
            break
        *_, section, name = ("", *refers[1].split("."))
        value = sections.get(section, {}).get(name)
    return value


def _plain(value: Any) -> Any:
    """Dictionaries, lists and values in the place of omegaconf's nodes."""
    if isinstance(value, Namespace):
        return _plain(vars(value))
    if isinstance(value, Inert):
        attributes = vars(value)
        for name in ("_content", "_val"):  # of a container, and of a value
            if name in attributes:
                return _plain(attributes[name])
        return _plain(value.arguments[0]) if value.arguments else None  # a member of an enumeration
    if isinstance(value, Mapping):
        return {str(_plain(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# -- what is in a pickle -------------------------------------------------------------------------


def _inert_globals(path: Path) -> list[tuple[type, str]]:
    """The names in a file that settings are made of, each with its stand-in."""
    try:
        names = {text.replace(" ", ".") for op, text in _pickled(path) if op == "GLOBAL"}
        names = {NAMES_NOW.get(n, n.replace("__builtin__", "builtins")) for n in names}
    except (OSError, ValueError, zipfile.BadZipFile):
        return []
    known = {name for entry in SAFE_GLOBALS if isinstance(entry, tuple) for name in entry[1:]}
    known.add("argparse.Namespace")
    return [(Inert, name) for name in sorted(names - known) if OF_SETTINGS.fullmatch(name)]


def _pickled(path: Path) -> set[tuple[str, str]]:
    """All strings in the pickle of a file that torch.save wrote, each behind the name of its
    operation; none for any other file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"]
            return _strings(io.BytesIO(archive.read(names[0])), 1) if names else set()
    with open(path, "rb") as file:
        if file.read(len(LEGACY_START)) != LEGACY_START:
            return set()
        return _strings(file, LEGACY_PICKLES - 1)


def _strings(file: io.BufferedIOBase, pickles: int) -> set[tuple[str, str]]:
    return {
        (operation.name, argument)
        for _ in range(pickles)
        for operation, argument, _ in pickletools.genops(file)
        if isinstance(argument, str)
    }
