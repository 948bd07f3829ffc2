"""Decodes the quantised keys that a graph network reads, in plain torch.

Product quantisation: Jégou et al., PAMI 2011; the rotation before it: Ge et al., CVPR 2013.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


class CodeDecoder(nn.Module):
    """Maps codes to vectors. It has no parameters, and its arrays are not saved in checkpoints.

    Args:
        arrays: fp32. Either `centroids` `[M, 256, d_out / M]` of a product quantiser, or `vmin` and
            `vdiff` `[d_out]` of an 8-bit scalar quantiser; with a linear transform before it, also
            the transform's matrix `A` `[d_out, d]`, whose rows are orthonormal, and its bias `b`
            `[d_out]` if it has one.
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
        """From codes uint8 `[n, M]` to vectors fp32 `[n, d]`."""
        if self.centroids is not None:
            columns = torch.arange(codes.shape[1], device=codes.device)
            vectors = self.centroids[columns, codes.long()].flatten(1)
        else:
            vectors = self.vmin + self.vdiff * ((codes + 0.5) / 255)
        if self.b is not None:
            vectors = vectors - self.b
        return vectors if self.A is None else vectors @ self.A
