"""What numpy must be told before it is loaded; to be imported first of all.

On Zen 4 (AMD's Ryzen 7000 and EPYC 9004) the instruction by which numpy's AVX-512 code sorts and
partitions, a compressing store, is microcoded: selecting 1,024 of 6,000 numbers takes four times as
long as with AVX2 (https://github.com/numpy/x86-simd-sort/issues/6). numpy is told not to use
AVX-512 there, unless the environment says what it shall use; torch and faiss go on using it.
"""

import os
from pathlib import Path

VARIABLE = "NPY_DISABLE_CPU_FEATURES"
AVX512 = "X86_V4 AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
"""What numpy's releases from 2.0 on call it; names that one does not know are passed over."""


def is_zen_4(cpu: str) -> bool:
    """Whether a processor is one of the kind.

    Args:
        cpu: what Linux says in /proc/cpuinfo.
    """
    first = cpu.partition("\n\n")[0]
    says = {key.strip(): value for key, _, value in (x.partition(":") for x in first.split("\n"))}
    family, flags = says.get("cpu family", "").strip(), says.get("flags", "").split()
    return "AuthenticAMD" in says.get("vendor_id", "") and family == "25" and "avx512f" in flags


_cpu = Path("/proc/cpuinfo")
if _cpu.exists() and is_zen_4(_cpu.read_text()):
    os.environ.setdefault(VARIABLE, AVX512)
