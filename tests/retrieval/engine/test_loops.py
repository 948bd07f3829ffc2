import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher
from small import ROOT

from neighborlm.retrieval.engine import loops, suffix_loops
from neighborlm.retrieval.engine.loops import (
    compiled,
    kth_smallest,
    measure_halves,
    round_to_bytes,
    shift_halves,
)
from neighborlm.retrieval.store import thinning


def test_where_nothing_can_be_kept_functions_are_compiled_anew():
    """Such as one without a file."""
    names = {}
    exec("def twice(number): return 2 * number", names)
    assert compiled(names["twice"])(21) == 42


def test_what_is_compiled_calls_nothing_of_another_file():
    """numba would not see that a function there has changed."""
    for module in (loops, suffix_loops, thinning):
        functions = [f for f in vars(module).values() if isinstance(f, Dispatcher)]
        assert functions
        assert {f.py_func.__module__ for f in functions} == {module.__name__}
    rooms = ("retrieval", "models", "callbacks", "datamodules", "programs", "originals", "tools")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    users = [path for path in files if "numba" in path.read_text("utf-8")]
    assert sorted(path.name for path in users) == ["loops.py", "suffix_loops.py", "thinning.py"]
    assert [path.name for path in users if "cache=True" in path.read_text("utf-8")] == ["loops.py"]


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


def test_every_half_is_decoded():
    """Also the smallest ones, infinities and what is no number."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = bits.view(np.float16).astype(np.float32).reshape(-1, 32)
    n = len(expected)
    vectors, squares = np.empty((n, 33), np.float32), np.empty(n, np.float32)
    begins, bounds, shifts = np.array([0]), np.array([0, n]), np.zeros((1, 32), np.float32)
    shift_halves(bits, begins, 32, bounds, shifts, vectors, squares)
    np.testing.assert_array_equal(vectors[:, :32], expected)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_allclose(squares, (expected**2).sum(1), rtol=1e-5)


@pytest.mark.parametrize("query", [-1.5, 3e4, -1e5])
@pytest.mark.parametrize("similar", [False, True])
def test_every_half_is_measured(query, similar):
    """Also the infinite ones and those that are no numbers, which have no distance."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = bits.view(np.float16).astype(np.float32)
    halves, found = np.zeros((1 << 16, 9), np.uint16), np.empty(1 << 16, np.float32)
    halves[:, 4] = bits
    of_visit = [np.array([number]) for number in (0, len(bits))]
    queries = np.full((1, 9), 2, np.float32)
    queries[0, 4] = query
    visitor = row = np.array([0])
    measure_halves(halves.ravel(), *of_visit, queries, visitor, similar, row, found)
    with np.errstate(invalid="ignore"):
        expected = -query * numbers if similar else (numbers - query) ** 2 + 32
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_every_other_vector_of_some_lists_is_shifted():
    halves = np.random.default_rng(0).standard_normal((100, 24)).astype(np.float16)
    shifts = np.random.default_rng(1).standard_normal((3, 24)).astype(np.float32)
    chosen, of_lists = [70, 72, 74, 3, 5], [0, 0, 0, 2, 2]
    vectors, squares = np.empty((5, 24), np.float32), np.empty(5, np.float32)
    begins, bounds = np.array([70, 9, 3]) * 24, np.array([0, 3, 3, 5])
    shift_halves(halves.view(np.uint16).ravel(), begins, 48, bounds, shifts, vectors, squares)
    expected = halves[chosen].astype(np.float32) + shifts[of_lists]
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)
    np.testing.assert_allclose(squares, (expected**2).sum(1), rtol=1e-5)


@pytest.mark.parametrize("of", ["any", "few different", "every size", "infinite", "one far"])
def test_just_k_are_not_above_the_kth_smallest(of):
    rng = np.random.default_rng(0)
    for _ in range(500):
        row = rng.standard_normal(rng.integers(1, 300)).astype(np.float32)
        if of == "few different":
            row = np.round(3 * row)
        elif of == "every size":
            row = (row * 10.0 ** rng.integers(-44, 38, len(row))).astype(np.float32)
        elif of == "infinite":
            row[rng.random(len(row)) < 0.3], row[0] = np.inf, -np.inf
        elif of == "one far":
            row[-1] = 3e38
        k = rng.integers(1, len(row) + 1)
        limit, kth = kth_smallest(row, k), np.sort(row)[k - 1]
        below = (row <= limit).sum()
        assert below == k or (limit == kth and below > k)
