"""Flags of evaluate.py that would change nothing are refused: whoever gives one expects another
figure than comes out."""

from collections.abc import Sequence
from dataclasses import fields

from neighborlm.common.errors import InputError
from neighborlm.programs.settings import MemorySettings

NEVER_SEARCH = {"ngram", "recent"}
"""Memories that have no use for a datastore and its settings."""


def check_effects(
    settings: MemorySettings, memories: Sequence[str], mixer: str, makes_products: bool
) -> None:
    """Refuses settings that nothing reads.

    Args:
        settings: those of the user.
        memories: that are mixed with the model.
        mixer: that weighs them.
        makes_products: whether a datastore or an index is made.

    Raises:
        InputError: there is such a setting; the sentence names it and what would read it.
    """
    if mixer != "constant" and not memories:
        raise InputError(
            f"--mixer {mixer}: has no effect without memories; expected --memories or --knnlm too"
        )
    reads = {
        "knn": makes_products or bool(set(memories) - NEVER_SEARCH),
        "recent": "recent" in memories,
        "automaton": "automaton" in memories,
    }
    readers = {
        "knn": "--knnlm, --memories knn, --save_datastore or --build_index",
        "recent": "--memories recent",
        "automaton": "--memories automaton",
    }
    for section, is_read in reads.items():
        changed = () if is_read else changed_of(getattr(settings, section))
        for name, value in changed:
            raise InputError(
                f"--{section}.{name} {value}: has no effect here; expected {readers[section]} too"
            )


def changed_of(section: object) -> list[tuple[str, object]]:
    """Settings of a section that differ from their defaults."""
    values = ((setting, getattr(section, setting.name)) for setting in fields(section))
    return [(setting.name, value) for setting, value in values if value != setting.default]
