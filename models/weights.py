"""The identity of a model's weights: a hash of them, and a cheap way to notice that they have
changed."""

import hashlib
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn


def content_hash(module: nn.Module, settings: Mapping[str, Any]) -> str:
    """A hash of all weights and of some settings, independent of the file they came from.

    Args:
        settings: what else determines what the module computes.
    """
    digest = hashlib.blake2b(repr(dict(settings)).encode(), digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().reshape(-1)  # a single number has no bytes to view
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def not_finite(weights: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity, if any does."""
    for name, tensor in weights.items():
        # A sum costs a tenth of looking at each number, but can itself overflow.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            return name
    return None


def weights_version(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """A value that differs after a parameter or buffer was replaced, moved or changed in place.

    Changes that torch does not count go unnoticed: those of fused optimisers, and those made
    through `.data`.
    """
    tensors = chain(module.parameters(), module.buffers())
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
