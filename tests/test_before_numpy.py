from before_numpy import is_zen_4

import pytest

CPU = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nflags\t\t: fpu avx2 {}\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n"


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (CPU.format("AuthenticAMD", 25, "avx512f avx512_bf16"), True),
        (CPU.format("AuthenticAMD", 25, "vaes"), False),  # Zen 3
        (CPU.format("AuthenticAMD", 26, "avx512f"), False),  # Zen 5
        (CPU.format("GenuineIntel", 6, "avx512f"), False),
        (ARM, False),
    ],
)
def test_zen_4_is_told_from_others(cpu, expected):
    assert is_zen_4(cpu) == expected
    assert is_zen_4(f"{cpu}\n{cpu.replace('avx512f', '')}") == expected  # of many cores the first
