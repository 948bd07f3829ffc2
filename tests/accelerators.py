"""The devices that tests run on besides the CPU, where they are to be had."""

import sys

import pytest
import torch
from small import ROOT

STANDIN = (ROOT.parent / "shared" / "standin").resolve()
"""An accelerator of host memory that refuses CPU tensors, where it lies beside the checkout."""
ACCELERATORS = ["standin", pytest.param("cuda", marks=pytest.mark.gpu)]
"""As parameters of a fixture, which calls `skip_without`."""


def skip_without(device: str) -> None:
    """Skips the test where a device is not to be had."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if device == "standin":
        if not STANDIN.is_dir():
            pytest.skip("the stand-in accelerator does not lie beside the checkout")
        if str(STANDIN) not in sys.path:
            sys.path.append(str(STANDIN))
        pytest.importorskip("standin")
