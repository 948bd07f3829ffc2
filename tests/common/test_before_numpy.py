import pytest

from neighborlm.common.before_numpy import AVX512, NUMPY, OPENBLAS, settings_for

CPU = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nflags\t\t: fpu fma avx2 {}\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n"
SERVER = "avx512f avx512dq avx512bw avx512vl avx512cd"


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (CPU.format("AuthenticAMD", 25, "avx512f avx512_bf16"), {NUMPY: AVX512}),
        (CPU.format("AuthenticAMD", 25, "vaes"), {}),  # Zen 3
        (CPU.format("AuthenticAMD", 26, "avx512f"), {}),  # Zen 5
        (CPU.format("GenuineIntel", 6, SERVER), {OPENBLAS: "SKYLAKEX"}),
        (CPU.format("GenuineIntel", 6, "avx512f avx512cd avx512er"), {OPENBLAS: "HASWELL"}),
        (CPU.format("GenuineIntel", 6, "vaes"), {OPENBLAS: "HASWELL"}),
        (CPU.format("GenuineIntel", 6, "").replace("avx2", "avx"), {}),
        (ARM, {}),
    ],
)
def test_processors_are_told_from_one_another(cpu, expected):
    assert settings_for(cpu) == expected
    of_many = f"{cpu}\n{cpu.replace('avx512f', '').replace('avx2', '')}"
    assert settings_for(of_many) == expected  # of many cores the first
