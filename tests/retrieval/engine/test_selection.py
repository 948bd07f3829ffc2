import numpy as np
import pytest

from neighborlm.retrieval.engine.selection import k_smallest, sort_rows


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


def test_all_none_and_too_many():
    values = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
    assert np.array_equal(k_smallest(values, 4), np.tile(np.arange(4), (3, 1)))
    assert k_smallest(values[:, :0], 0).shape == (3, 0)
    with pytest.raises(ValueError, match="5 of 4"):
        k_smallest(values, 5)


def test_numbers_of_every_size_and_sign_are_told_apart():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((200, 60)) * 10.0 ** rng.integers(-44, 38, (200, 60))
    values = values.astype(np.float32)
    values[::7, ::5], values[::11, ::3], values[::13, 4] = 0.0, -0.0, -np.inf
    for k in (1, 7, 59):
        chosen = np.take_along_axis(values, k_smallest(values, k), 1)
        assert np.array_equal(np.sort(chosen, axis=1), np.sort(values, axis=1)[:, :k])


def test_sorted_rows_and_where_their_numbers_were():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((20, 33), dtype=np.float32) * 10.0 ** rng.integers(-9, 9, (20, 33))
    values = values.astype(np.float32)
    values[3, :5], values[4, 7] = np.inf, 0.0
    ordered, places = sort_rows(values)
    assert np.array_equal(ordered, np.sort(values, axis=1))
    assert np.array_equal(np.take(values, places), ordered)
