"""A run that is named on the command line: `evaluate.py runs/NAME` needs no other config, since the
run has its own.

What a training wrote to config.yaml is taken over as flags, as far as it says what was trained: not
how long, on which machine and from which checkpoint.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from neighborlm.common.errors import InputError

CONFIG = "config.yaml"
SECTIONS = ("data", "neighbors")
"""Those whose settings an evaluation has too."""


def with_settings_of_run(args: list[str]) -> list[str]:
    """A command line in which a run is followed by its settings, in front of all flags that change
    them. A run is named by its directory, as the first argument, or by its config, as `--config`.

    Raises:
        InputError: the first argument is no run.
    """
    named = args[:1] if args and not args[0].startswith("-") else []
    flags: list[str] = []
    for run in named:
        flags += flags_of(_read(Path(run) / CONFIG))
    rest = iter(args[len(named) :])
    for flag in rest:
        name, is_joined, value = flag.partition("=")
        given = [flag]
        if name in ("--config", "-c") and not is_joined:
            given += (following := list(islice(rest, 1)))
            value = "".join(following)
        path = Path(value)
        is_config = name in ("--config", "-c") and path.name == CONFIG and path.is_file()
        settings = _read(path) if is_config else {}
        if "checkpoint_every" in settings:  # which a training alone has
            given = flags_of(settings)
            named = named or [str(path.parent)]
        flags += given
    return named + flags


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """What an evaluation takes over of the settings of a training, as flags."""
    taken = {name: settings.get(name) for name in ("arch", "seed_everything")}
    taken["trainer.precision"] = settings.get("trainer", {}).get("precision")
    taken["model"] = settings.get("model")
    for section in SECTIONS:
        taken |= {f"{section}.{name}": value for name, value in settings.get(section, {}).items()}
    return list(_as_flags(taken))


def _as_flags(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if value is not None:
            yield f"--{name}={value if isinstance(value, str) else json.dumps(value)}"


def _read(path: Path) -> dict[str, Any]:
    """The settings in a run's config."""
    run = path.parent
    if not path.is_file():
        found = "has no config.yaml" if run.is_dir() else "no such directory"
        found = "is a file" if run.is_file() else found
        raise InputError(
            f"{run}: {found}; expected flags, or first the directory of a run that train.py made"
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        sections = (settings.get(name, {}) for name in ("trainer", *SECTIONS))
        if all(isinstance(section, dict) for section in sections):
            return settings
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        pass
    raise InputError(f"{path}: is no config; expected the one that train.py wrote")
