"""What numpy and faiss must be told before they are loaded; to be imported first of all.

On Zen 4 (AMD's Ryzen 7000 and EPYC 9004) the instruction by which numpy's AVX-512 code sorts and
partitions, a compressing store, is microcoded: selecting 1,024 of 6,000 numbers takes four times as
long as with AVX2 (https://github.com/numpy/x86-simd-sort/issues/6). numpy is told not to use
AVX-512 there. torch and faiss go on using it.

faiss brings a version of OpenBLAS that does not know Intel's processors from 2022 on, and takes
them for one of 2004: training an index takes three times as long as it need. It is told what they
have.

What the environment says already is left as it is.
"""

import os
from pathlib import Path

NUMPY, AVX512 = (
    "NPY_DISABLE_CPU_FEATURES",
    "X86_V4 AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
)
"""What numpy's releases from 2.0 on call it; names that one does not know are passed over."""
OPENBLAS = "OPENBLAS_CORETYPE"


def settings_for(cpu: str) -> dict[str, str]:
    """Environment variables for a processor.

    Args:
        cpu: what Linux says in /proc/cpuinfo.
    """
    first = cpu.partition("\n\n")[0]
    says = {key.strip(): value for key, _, value in (x.partition(":") for x in first.split("\n"))}
    vendor, family = says.get("vendor_id", ""), says.get("cpu family", "").strip()
    flags = set(says.get("flags", "").split())
    if "AuthenticAMD" in vendor and family == "25" and "avx512f" in flags:
        return {NUMPY: AVX512}
    if "GenuineIntel" in vendor and family == "6" and {"avx2", "fma"} <= flags:
        newer = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags
        return {OPENBLAS: "SKYLAKEX" if newer else "HASWELL"}
    return {}


_cpu = Path("/proc/cpuinfo")
if _cpu.exists():
    for _name, _value in settings_for(_cpu.read_text()).items():
        os.environ.setdefault(_name, _value)
