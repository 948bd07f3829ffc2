"""What messages call the things that fingerprints identify: the checkpoint of a model, the folder
of a corpus, the directory of a datastore. Names decide nothing; manifests keep those of all that
their products were made from.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_names: dict[str, str] = {}


def call(fingerprint: str, name: object) -> None:
    """Names what a fingerprint identifies, from now on."""
    _names[fingerprint] = str(name)


def recall(names: Any) -> None:
    """Learns the names in a manifest, of what has none yet."""
    for fingerprint, name in names.items() if isinstance(names, Mapping) else ():
        _names.setdefault(fingerprint, str(name))


def names_in(fields: Any) -> dict[str, str]:
    """The names of all fingerprints in JSON-able fields."""
    return {text: _names[text] for text in _texts(fields) if text in _names}


def named(value: Any) -> str:
    """A value for a message: a fingerprint by its name, all else as it is.

    >>> call("5ec3a1", "runs/mine/checkpoints/best.ckpt")
    >>> named("5ec3a1"), named(12)
    ('runs/mine/checkpoints/best.ckpt (5ec3a1)', '12')
    """
    name = _names.get(value) if isinstance(value, str) else None
    return str(value) if name is None else f"{name} ({value})"


def _texts(fields: Any) -> Iterator[str]:
    if isinstance(fields, str):
        yield fields
    elif isinstance(fields, Mapping | list | tuple):
        for part in fields.values() if isinstance(fields, Mapping) else fields:
            yield from _texts(part)
