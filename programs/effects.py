"""Flags that would change nothing, or leave a stage with a part of what it needs, are refused:
whoever gives one expects another figure than comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

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
        "adaptive": "adaptive" in memories,
    }
    readers = {
        "knn": "--knnlm, --memories knn, --save_datastore or --build_index",
        "recent": "--memories recent",
        "automaton": "--memories automaton",
        "adaptive": "--memories adaptive",
    }
    for section, is_read in reads.items():
        changed = () if is_read else changed_of(getattr(settings, section))
        for name, value in changed:
            raise InputError(
                f"--{section}.{name} {value}: has no effect here; expected {readers[section]} too"
            )


def check_trainer(settings: Mapping[str, Any], trains: bool, makes_products: bool) -> None:
    """Refuses settings of Lightning that these programs cannot follow.

    Args:
        settings: of `--trainer.*`.
        trains: whether a model is trained.
        makes_products: whether datastores may be made.

    Raises:
        InputError: there is such a setting.
    """
    if settings.get("overfit_batches"):
        raise InputError(
            f"--trainer.overfit_batches {settings['overfit_batches']}: is not possible here, where "
            "batches are dealt by the data module; expected --trainer.limit_train_batches, which "
            "takes the first of each epoch"
        )
    limit = settings.get("limit_predict_batches")
    if limit not in (None, 1.0) or isinstance(limit, int):
        raise InputError(
            f"--trainer.limit_predict_batches {limit}: a datastore needs every row of its split; "
            "expected no such flag"
        )
    if settings.get("fast_dev_run") and trains:
        raise InputError(
            "--trainer.fast_dev_run: would leave a run of a single batch behind; expected "
            "--trainer.max_steps 1 and another --trainer.default_root_dir"
        )
    if settings.get("fast_dev_run") and makes_products:
        raise InputError(
            "--trainer.fast_dev_run: a datastore needs every row of its split; expected "
            "--trainer.limit_test_batches 1, which shortens the evaluation alone"
        )


def changed_of(section: object) -> list[tuple[str, object]]:
    """Settings of a section that differ from their defaults."""
    values = ((setting, getattr(section, setting.name)) for setting in fields(section))
    return [(setting.name, value) for setting, value in values if value != setting.default]
