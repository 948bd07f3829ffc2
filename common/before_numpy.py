"""Environment variables that numpy and faiss read when they are loaded; import this module first.

On Zen 4 (AMD's Ryzen 7000 and EPYC 9004) the compressing store by which numpy's AVX-512 code sorts
and partitions is microcoded: selecting 1,024 of 6,000 numbers takes four times as long as with AVX2
(https://github.com/numpy/x86-simd-sort/issues/6). There numpy runs without AVX-512; torch and faiss
keep it.

faiss ships a version of OpenBLAS that does not know Intel's processors from 2022 on and treats them
as one of 2004, which makes the training of an index three times slower. It is given the kernels
that these processors can run.

Variables that are already set are left alone.
"""

import os
from pathlib import Path

NUMPY, AVX512 = (
    "NPY_DISABLE_CPU_FEATURES",
    "X86_V4 AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
)
"""The names of AVX-512 in numpy's releases from 2.0 on; a release ignores those it lacks."""
OPENBLAS = "OPENBLAS_CORETYPE"


def settings_for(cpu: str) -> dict[str, str]:
    """Environment variables for a processor.

    Args:
        cpu: contents of Linux's /proc/cpuinfo.
    """
    lines = (line.partition(":") for line in cpu.partition("\n\n")[0].split("\n"))  # first core
    fields = {name.strip(): value for name, _, value in lines}
    vendor, family = fields.get("vendor_id", ""), fields.get("cpu family", "").strip()
    flags = set(fields.get("flags", "").split())
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
