import numpy as np
import pytest
from small import ROOT

from retrieval.loops import compiled, round_to_bytes


def test_where_nothing_can_be_kept_functions_are_compiled_anew():
    """Such as one without a file."""
    names = {}
    exec("def twice(number): return 2 * number", names)
    assert compiled(names["twice"])(21) == 42


def test_all_that_is_compiled_is_in_one_file():
    """numba would not see that a function of another file has changed."""
    users = [path.name for path in ROOT.glob("*/*.py") if "numba" in path.read_text("utf-8")]
    assert sorted(users) == ["loops.py"]


@pytest.mark.parametrize("size", [1e-37, 1e-31, 1.0, 1e25, 3e37])
def test_vectors_of_any_size_are_rounded_and_their_errors_known(size):
    vectors = np.random.default_rng(0).standard_normal((50, 24)) * size
    vectors[3], vectors[4, 1:], vectors[5, 7] = 0, 0, np.inf
    vectors = vectors.astype(np.float32)
    rounded = np.empty(vectors.shape, dtype=np.int8)
    scales, lengths, errors, whole_lengths = round_to_bytes(vectors, rounded)
    assert np.isinf(errors[5])
    assert scales[5] == 0
    assert (rounded[5] == 0).all()
    finite = np.arange(50) != 5
    near = rounded[finite] * scales[finite, None].astype(np.float64)
    exact = vectors[finite].astype(np.float64)
    for found, expected in ((lengths, near), (errors, exact - near), (whole_lengths, exact)):
        expected = np.linalg.norm(expected, axis=1)
        np.testing.assert_allclose(found[finite], expected, rtol=1e-4, atol=size * 1e-6)
    assert (np.abs(exact - near).max(1) <= 0.51 * np.maximum(scales[finite], 2e-33)).all()
