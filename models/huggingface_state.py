"""What a model of transformers has read of some rows, in a cache of its own kind."""

from typing import Any

import torch
from torch import Tensor


class HuggingFaceState:
    """See `common.contracts.State`.

    Attributes:
        cache: of the model's own class; None before anything was read.
        mask: int64 `[B, C]`, 1 where a token was read, 0 in front of the first one of a row.
    """

    def __init__(self, cache: Any = None, mask: Tensor | None = None) -> None:
        self.cache = cache
        self.mask = mask

    def inputs(self, tokens: Tensor, name_of_cache: str) -> dict[str, Any]:
        """What the model's `forward` is given to read tokens int64 `[B, T]`, -1 in front of the
        first token of a row."""
        new = (tokens >= 0).long()
        self.mask = new if self.mask is None else torch.cat([self.mask, new], dim=1)
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return {
            "input_ids": tokens.clamp(min=0),
            "attention_mask": self.mask,
            "position_ids": positions,
            name_of_cache: self.cache,
            "use_cache": True,
        }

    def select(self, rows: Tensor) -> "HuggingFaceState":
        """See `common.contracts.State.select`; the cache itself is rearranged."""
        self.cache.reorder_cache(rows)
        return HuggingFaceState(self.cache, self.mask[rows])
