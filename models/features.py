"""Decodes the quantised keys that a graph network reads, in plain torch.

Product quantisation: Jégou et al., PAMI 2011; the rotation before it: Ge et al., CVPR 2013.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


class CodeDecoder(nn.Module):
    """From codes to vectors; has no parameters, and its arrays are in no checkpoint.

    Args:
        arrays: fp32. Either `centroids` `[M, 256, d_out / M]` of a product quantiser, or `vmin` and
            `vdiff` `[d_out]` of 8-bit scalars; where a linear transform comes first, also its
            matrix `A` `[d_out, d]`, with orthonormal rows, and if it has one its bias `b`
            `[d_out]`.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        for name in ("centroids", "vmin", "vdiff", "A", "b"):
            array = arrays.get(name)
            if array is not None and array.size == 0:
                array = None
            tensor = None if array is None else torch.tensor(array, dtype=torch.float32)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """uint8 `[R, M]` to fp32 `[R, d]`."""
        if self.centroids is not None:
            columns = torch.arange(codes.shape[1], device=codes.device)
            vectors = self.centroids[columns, codes.long()].flatten(1)
        else:
            vectors = self.vmin + self.vdiff * ((codes + 0.5) / 255)
        if self.b is not None:
            vectors = vectors - self.b
        return vectors if self.A is None else vectors @ self.A
