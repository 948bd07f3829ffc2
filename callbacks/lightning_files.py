"""What Lightning writes, as it is written here: checkpoints that are seen whole or not at all, and
figures for TensorBoard. Of a disk that is full both say where it is."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io import TorchCheckpointIO
from pytorch_lightning.loggers import TensorBoardLogger

from neighborlm.common.errors import InputError, causes, free_at
from neighborlm.common.files import publishing
from neighborlm.common.units import size_of

BYTES_OF_FIGURES = 1 << 20
"""About what the figures of a stage take."""


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that others see whole or not at all. Lightning moves them from `TMPDIR`, which on
    another disk is copying, and a kill in the middle leaves neither the old nor the new one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any = None
    ) -> None:
        """Writes it beside its place, and brings it to disk before it takes it.

        Raises:
            InputError: it cannot be written; the one that was there stays.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with publishing(path) as making:
                torch.save(checkpoint, making)
        except (OSError, RuntimeError) as error:
            free, needed = free_at(path), bytes_of(checkpoint)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            if free < needed:  # torch says where its own file is at
                reason = os.strerror(errno.ENOSPC)
            sizes = f"{size_of(free)} free, about {size_of(needed)} needed"
            raise InputError(
                f"{path}: cannot be written ({reason}; {sizes}); what was there stays, and the "
                "same command goes on from it"
            ) from error


class Events(TensorBoardLogger):
    """What TensorBoard shows. Its files are written by a thread, whose errors come up later and do
    not say where.

    Args:
        directory: of the run.
        place: below it, and the name under which TensorBoard lists it.
    """

    def __init__(self, directory: Path, place: Path | str) -> None:
        # The settings come with the figures that they gave, not with -1 before there are any.
        super().__init__(directory, name="", version=str(place), default_hp_metric=False)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs some figures."""
        with errors_at(self.log_dir):
            super().log_metrics(metrics, step)

    def log_hyperparams(
        self,
        params: dict[str, Any],
        metrics: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Logs settings, and the figures that they gave."""
        with errors_at(self.log_dir):
            super().log_hyperparams(params, metrics, step)

    def save(self) -> None:
        """Brings what was logged to disk."""
        with errors_at(self.log_dir):
            super().save()

    def finalize(self, status: str) -> None:
        """Writes the rest."""
        with errors_at(self.log_dir):
            super().finalize(status)


@contextmanager
def errors_at(place: Path | str) -> Iterator[None]:
    """Names a place in errors of the disk that name none."""
    try:
        yield
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, OSError):
                cause.filename = cause.filename or str(place)
                cause.needed = BYTES_OF_FIGURES
        raise


def bytes_of(content: Any) -> int:
    """About what the tensors in nested dicts and lists take on disk."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, list | tuple):
        return 0
    return sum(map(bytes_of, content))
