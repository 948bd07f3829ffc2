import ctypes
import time
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from neighborlm.retrieval.engine.parallel import in_parallel, product

LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


def threads_of_libraries(_) -> list[int]:
    """That each would take in the calling thread."""
    counts = [torch.get_num_threads(), faiss.omp_get_max_threads()]
    mkl = (
        getattr(ctypes.CDLL(str(LIBRARY)), "MKL_Get_Max_Threads", None) if LIBRARY.is_file() else 0
    )
    return counts + ([mkl()] if mkl else [])


def test_each_thread_takes_one_core_and_the_caller_keeps_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = threads_of_libraries(None)
        found = in_parallel(threads_of_libraries, range(4), 2)
        assert found == [[1] * len(expected)] * 4
        assert threads_of_libraries(None) == expected
        assert expected[0] == 2
    finally:
        torch.set_num_threads(before)


def test_results_are_in_order():
    assert in_parallel(lambda part: part * part, range(50), 3) == [i * i for i in range(50)]
    assert in_parallel(lambda part: part, [], 3) == []


def test_it_raises_when_nothing_works_any_more():
    ended = []

    def work(part: int) -> None:
        if part == 0:
            raise ValueError("part 0")
        time.sleep(0.05)
        ended.append(part)

    with pytest.raises(ValueError, match="part 0"):
        in_parallel(work, range(4), 2)
    assert ended == [1, 2, 3]


@pytest.mark.parametrize("out", [True, False])
def test_product_of_parts_of_arrays(out):
    """Transposed and strided, as the search has them."""
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((n, 9), dtype=np.float32) for n in (5, 7))
    where = np.full((5, 7), np.nan, dtype=np.float32) if out else None
    found = product(left[:, :8], right[:, :8].T, out=where)
    np.testing.assert_allclose(found, left[:, :8] @ right[:, :8].T, rtol=1e-5, atol=1e-6)
    assert not out or found is where
