"""The settings that a datastore was made with, compared with those at hand.

Keys of the right model and text that have read other contexts than the queries can be searched, and
it may be wanted; so that is remarked upon. A datastore that is to be made with some settings is not
taken for made where it has others; so that is refused.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neighborlm.common.errors import InputError
from neighborlm.programs.settings import KNNSettings

FLAGS = {
    **{"break_mode": "--data.break_mode", "drop_long_lines": "--data.drop_long_lines"},
    **{"tokens_per_sample": "--data.tokens_per_sample", "context_window": "--data.context_window"},
    **{"min_context": "--knn.min_context", "precision": "--trainer.precision"},
}
"""Of the settings that decide what context each key has read, and how exactly it is computed."""


UNSAID = ("lm",)
"""What manifests of version 0.1 do not say of that from which their products were made."""


def comparable(expected: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What is expected of a product, but for what its manifest is too old to say."""
    return {name: v for name, v in expected.items() if name in found or name not in UNSAID}


class Difference(NamedTuple):
    """A setting that a datastore was made with, and that is another one now."""

    flag: str
    then: Any
    now: Any


def differences(made_from: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """The settings of `FLAGS` that differ.

    Args:
        made_from: of the datastore; settings that it does not name are not compared.
        now: what this command would make one from.
    """
    return [
        Difference(flag, made_from[name], now[name])
        for name, flag in FLAGS.items()
        if name in made_from and made_from[name] != now[name]
    ]


def as_made(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `--knn.*` that a datastore was made with, None where it does not say; those of a
    command that only uses it have no effect."""
    return {
        "dtype": manifest["dtype"],
        "min_context": manifest["made_from"].get("min_context"),
        "shards": len(manifest.get("shards", [1])),
        "placement": manifest.get("placement", KNNSettings.placement),
    }


def differences_in_shards(manifest: Mapping[str, Any], knn: KNNSettings) -> list[Difference]:
    """How a datastore was dealt into shards, where the settings ask for something else."""
    there, default = as_made(manifest), KNNSettings()
    return [
        Difference(f"--knn.{name}", found, getattr(knn, name))
        for name, found in there.items()
        if name in ("shards", "placement")
        and getattr(knn, name) not in (found, getattr(default, name))
        and knn.shard is None
    ]


def remark_on(path: Path, found: Sequence[Difference], place: str) -> str:
    """A sentence on a datastore that is used though it was made with other settings.

    Args:
        place: flag that names another place.
    """
    return (
        f"{path}: was made with {_listed(found, 'then')}, where this command has "
        f"{_listed(found, 'now')}; it is used as it is, and {place} names a place for another"
    )


def refuse_differences(path: Path, found: Sequence[Difference], place: str) -> None:
    """Refuses to take a datastore for the one that is to be made.

    Args:
        place: flag that names another place.

    Raises:
        InputError: there is a difference.
    """
    if found:
        raise InputError(
            f"{path}: was made with {_listed(found, 'then')}, but is to be made with "
            f"{_listed(found, 'now')}; expected the same, or another place ({place})"
        )


def _listed(found: Sequence[Difference], when: str) -> str:
    """The flags as they were, or as they are."""
    values = [(difference.flag, getattr(difference, when)) for difference in found]
    return " and ".join(
        f"{flag} {value if isinstance(value, str) else json.dumps(value)}" for flag, value in values
    )
