import numpy as np
import pytest

from retrieval.selection import k_smallest, sort_rows


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_k_smallest_numbers_of_each_row_in_order_of_their_columns(k):
    values = np.random.default_rng(0).standard_normal((30, 40), dtype=np.float32)
    columns = k_smallest(values, k)
    assert (np.diff(columns, axis=1) > 0).all()
    expected = np.sort(np.argsort(values, axis=1)[:, :k], axis=1)
    assert np.array_equal(columns, expected)


def test_of_equal_numbers_at_the_last_place_some_are_taken():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (50, 30)).astype(np.float32)
    values[::3, 20:] = np.inf
    columns = k_smallest(values, 25)
    assert all(len(set(row)) == 25 for row in columns)
    chosen = np.sort(np.take_along_axis(values, columns, 1), axis=1)
    assert np.array_equal(chosen, np.sort(values, axis=1)[:, :25])


def test_sorted_rows_and_where_their_numbers_were():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((20, 33), dtype=np.float32) * 10.0 ** rng.integers(-9, 9, (20, 33))
    values = values.astype(np.float32)
    values[3, :5], values[4, 7] = np.inf, 0.0
    ordered, places = sort_rows(values)
    assert np.array_equal(ordered, np.sort(values, axis=1))
    assert np.array_equal(np.take(values, places), ordered)
