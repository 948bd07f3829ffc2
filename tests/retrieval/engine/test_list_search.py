from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import faiss
import numpy as np
import pytest
import torch

from neighborlm.common.contracts import Votes
from neighborlm.retrieval.engine import Limits, ListSearch, list_search, sieve, visit
from neighborlm.retrieval.engine.processor import bytes_are_exact
from neighborlm.retrieval.search.index import make_index, read_index
from neighborlm.retrieval.search.index_check import is_sound

N, DIM = 3000, 16
FEW = Limits(sieve_from=12, sieve_from_in_all=0)
"""So that there are sieves where few vectors are visited, as in these tests."""


def filled(factory, metric, keys):
    index = make_index(DIM, factory, "l2" if metric == faiss.METRIC_L2 else "ip")
    index.train(keys)
    index.add(keys)
    return index


@cache
def of_random_keys(factory, metric, shift):
    keys = np.random.default_rng(0).standard_normal((N, DIM), dtype=np.float32)
    return filled(factory, metric, keys + shift)


def opened(tmp_path, factory, metric=faiss.METRIC_L2, shift=0.0, keys=None):
    index = (
        of_random_keys(factory, metric, shift) if keys is None else filled(factory, metric, keys)
    )
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    is_sound(tmp_path / "x.faiss")  # so that no process tries it out
    index = read_index(tmp_path / "x.faiss")
    index.nprobe = 5
    return index


def searching(index, **limits):
    return ListSearch(index, limits=replace(FEW, **limits))


def queries(n=200, shift=0.0):
    return np.random.default_rng(1).standard_normal((n, DIM), dtype=np.float32) + shift


def assert_same(found, expected):
    (distances, ids, *_), (expected_distances, expected_ids, *_) = found, expected
    assert np.allclose(distances, expected_distances, rtol=1e-4, atol=1e-4)
    assert (ids == expected_ids).mean() > 0.99  # nearly equal distances may change places
    assert np.array_equal(np.sort(ids < 0), np.sort(expected_ids < 0))


@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
@pytest.mark.parametrize("factory", ["IVF20,Flat", "IVF20,SQfp16", "IVF20,SQ8", "IVF20,PQ8"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("k", "by_bytes"), [(70, False), (20, False), (20, True), (3, True)])
def test_it_finds_what_faiss_finds(tmp_path, monkeypatch, factory, metric, threads, k, by_bytes):
    """With a sieve where k is small, and in several parts."""
    if by_bytes and not bytes_are_exact():
        pytest.skip("this processor's products of bytes lose bits")
    limits = {"by_bytes": by_bytes, "visit_bytes": 1 << 18, "sieve_bytes": 1 << 18}
    limits |= {"sieve_queries": 17, "sieve_vectors": 50}
    left, real = [], sieve.Sieve.hand_over
    monkeypatch.setattr(sieve.Sieve, "hand_over", lambda *a: left.append(real(*a)) or left[-1])
    index = opened(tmp_path, factory, metric)
    assert ListSearch.serves(index)
    expected = index.search(queries(), k)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        assert_same(searching(index, **limits).search(queries(), k), expected)
    finally:
        faiss.omp_set_num_threads(before)
    assert (len(left) > 1) == (k < 70)
    assert not left or np.concatenate(left).mean() < 0.02


@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
@pytest.mark.parametrize(("threads", "little"), [(1, 0), (3, 0), (3, list_search.LITTLE)])
@pytest.mark.parametrize("n", [1, 8, 20])
def test_a_few_queries_find_what_faiss_finds(tmp_path, monkeypatch, metric, threads, little, n):
    """Also where there are fewer than k vectors, and for a query that is not finite; by several
    threads where there is much to read."""
    keys = np.random.default_rng(0).standard_normal((N, DIM), dtype=np.float32)
    keys[::100] *= 1e-4  # many halves below 2**-14, which have fewer digits
    keys[7] = 6e4  # a centroid far out
    index = opened(tmp_path, "IVF20,SQfp16", metric, keys=keys)
    search, looking = searching(index), queries(n)
    assert search.reads_halves
    monkeypatch.setattr(faiss, "omp_get_max_threads", lambda: threads)
    monkeypatch.setattr(list_search, "LITTLE", little)
    for k in (1, 70, 900):
        expected = index.search(looking, k)
        assert_same(search.search_each(looking, k), expected)
        distances, ids, _ = search.search_each(looking, k, ordered=False)
        order = np.argsort(distances if metric == faiss.METRIC_L2 else -distances, axis=1)
        assert_same([np.take_along_axis(x, order, axis=1) for x in (distances, ids)], expected)
    assert search.search_each(looking[:0], 5).rows.shape == (0, 5)
    looking[0, 3] = np.nan
    _, ids, _ = search.search_each(looking, 5)
    assert (ids[0] == -1).all()
    assert (ids[1:] >= 0).all()


needs_exact_bytes = pytest.mark.skipif(
    not bytes_are_exact(), reason="this processor's products of bytes lose bits"
)


@needs_exact_bytes
@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("outlier", [1.0, 300.0])
@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_products_of_bytes_lose_nothing_below_the_bound(tmp_path, metric, outlier, shift):
    """Whatever the bound is, and where one dimension takes most of a byte's steps."""
    rng = np.random.default_rng(2)
    scale = np.ones(DIM, dtype=np.float32)
    scale[3] = outlier
    keys = scale * rng.standard_normal((N, DIM), dtype=np.float32) + np.float32(shift)
    looking = scale * queries(40) + np.float32(shift)
    lists = searching(opened(tmp_path, "IVF20,Flat", metric, keys=keys))
    vectors, squares, _ = lists.vectors([7])
    relative = looking - lists.middle
    if metric == faiss.METRIC_L2:
        exact = ((relative[:, None].astype(np.float64) - vectors) ** 2).sum(-1)
    else:
        exact = -relative.astype(np.float64) @ vectors.T.astype(np.float64)
    who = np.arange(3, 40, 2)
    for share in (0.01, 0.1, 0.7, 1.1):
        bounds = np.quantile(exact, min(share, 1), axis=1).astype(np.float32)
        bounds[: 40 if share > 1 else 0] = np.inf
        by = sieve.Bytes(lists.similar, relative, bounds)
        right, of_vectors = by.of(vectors, squares)
        products = (torch._int_mm(by.left[who], right).numpy(), by.of_queries[who], of_vectors)
        room = (np.empty(exact.size, type) for type in (np.int32, np.int64, np.float32))
        asked, near, distances = kept = tuple(room)
        n, computed = sieve.keep(
            *products, who, relative, vectors, bounds, lists.similar, 0, *kept, 0
        )
        below = exact[who] < bounds[who, None].astype(np.float64)
        close = np.isclose(exact[who], bounds[who, None], rtol=1e-5, atol=1e-5)
        found = np.zeros_like(below)
        found[np.searchsorted(who, asked[:n]), near[:n]] = True
        assert np.array_equal(found | close, below | close)
        expected = exact[asked[:n], near[:n]]
        assert np.allclose(distances[:n], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        assert computed >= n
        if share < 0.5 and outlier == 1 and not (shift and metric != faiss.METRIC_L2):
            assert computed < 2 * n + 100  # it spares most of the work


@needs_exact_bytes
def test_where_bytes_tell_too_little_numbers_do(tmp_path, monkeypatch):
    """One dimension takes all steps of a byte, and of others the distances are made."""
    keys = np.random.default_rng(0).standard_normal((N, DIM), dtype=np.float32)
    keys[:, 0] = 5000
    asked = queries()
    asked[:, 0] = 5000
    index = opened(tmp_path, "IVF2,Flat", faiss.METRIC_INNER_PRODUCT, keys=keys)
    index.nprobe = 2
    limits = {"by_bytes": True, "sieve_queries": 20, "sieve_vectors": 50}
    used, real = [], sieve.Numbers.rounded
    monkeypatch.setattr(
        sieve.Numbers, "rounded", staticmethod(lambda *a: used.append(1) or real(*a))
    )
    distances, _, _ = searching(index, **limits).search(asked, 3)
    assert np.allclose(distances, index.search(asked, 3)[0], rtol=1e-6)
    assert used


def votes_by_brute_force(distances, ids, values, targets, temperature, sign, counts=None):
    """In float64, of what faiss finds."""
    scores = np.where(ids < 0, -np.inf, -sign * distances.astype(np.float64))
    hits = values[ids] == targets[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_weights = (scores - scores.max(1, keepdims=True)) / temperature
        log_weights += 0 if counts is None else np.log(counts[ids])
        of_hits = np.logaddexp.reduce(np.where(hits, log_weights, -np.inf), axis=1)
        log_probs = of_hits - np.logaddexp.reduce(log_weights, axis=1)
    return Votes(log_probs, scores.max(1), np.where(ids < 0, np.inf, scores).min(1))


@pytest.mark.parametrize("k", [1, 20, 70, 900])
@pytest.mark.parametrize("temperature", [1.0, 0.02, 30.0])
@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_votes_are_those_of_what_faiss_finds(tmp_path, metric, temperature, k):
    """Also where k is more than there are, hits weigh next to nothing, and a value is of no key;
    with a sieve where k is small."""
    index = opened(tmp_path, "IVF20,Flat", metric)
    rng = np.random.default_rng(3)
    values, targets = rng.integers(0, 40, N), rng.integers(0, 42, 200)
    votes = searching(index).vote(queries(), k, values, targets, temperature)
    found = index.search(queries(), k)
    sign = 1 if metric == faiss.METRIC_L2 else -1
    expected = votes_by_brute_force(*found, values, targets, temperature, sign)
    close = np.isclose(votes, expected, rtol=2e-5, atol=2e-4 / temperature)
    assert close[0].mean() > 0.99  # nearly equal distances may change places at the k-th
    assert close[1:].all()
    assert np.isneginf(votes.log_probs).any()
    assert (found[1] < 0).any() == (k == 900)


@pytest.mark.parametrize("k", [20, 70, 900])
@pytest.mark.parametrize("temperature", [1.0, 0.02])
@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_an_entry_votes_for_all_that_were_merged_into_it(tmp_path, metric, temperature, k):
    """Some stand for as many as a count can say."""
    index = opened(tmp_path, "IVF20,Flat", metric)
    rng = np.random.default_rng(3)
    values, targets = rng.integers(0, 40, N), rng.integers(0, 42, 200)
    counts = rng.integers(1, 20, N).astype(np.uint32)
    counts[rng.random(N) < 0.01] = 2**32 - 1
    votes = searching(index).vote(queries(), k, values, targets, temperature, counts)
    found = index.search(queries(), k)
    sign = 1 if metric == faiss.METRIC_L2 else -1
    expected = votes_by_brute_force(*found, values, targets, temperature, sign, counts)
    close = np.isclose(votes, expected, rtol=2e-5, atol=2e-4 / temperature)
    assert close[0].mean() > 0.99
    assert close[1:].all()


def test_of_equal_keys_at_the_last_place_just_k_vote(tmp_path):
    keys = np.repeat(np.eye(DIM, dtype=np.float32), 40, axis=0)
    search = searching(opened(tmp_path, "IVF4,Flat", keys=keys))
    asked, targets = np.eye(DIM, dtype=np.float32)[:8].repeat(25, axis=0), np.zeros(200, int)
    _, ids, _ = search.search(asked, 30)
    values = np.zeros(len(keys), dtype=np.int64)
    values[::3] = 7
    votes = search.vote(asked, 30, values, targets, 1.0)
    share = (values[ids] == 0).mean(1)
    assert np.allclose(np.exp(votes.log_probs), share, atol=1e-6)
    assert np.allclose(votes.nearest, 0, atol=1e-5)
    assert np.allclose(votes.farthest, 0, atol=1e-5)


def test_queries_that_find_nothing_hear_no_votes(tmp_path):
    search = searching(opened(tmp_path, "IVF20,Flat"))
    asked = queries()
    asked[5], asked[9, 3] = np.nan, np.inf
    votes = search.vote(asked, 70, np.zeros(N, int), np.zeros(200, int), 1.0)
    for number in (5, 9):
        assert [column[number] for column in votes] == [-np.inf, -np.inf, np.inf]
    assert np.allclose(np.delete(votes.log_probs, [5, 9]), 0, atol=1e-6)


def test_parts_with_one_query_that_fills_more_than_one(tmp_path):
    index = opened(tmp_path, "IVF20,Flat")
    index.nprobe = 20
    search = searching(index, visit_bytes=1 << 12, sieve_bytes=1 << 12)
    assert_same(search.search(queries(8), 1000), index.search(queries(8), 1000))


def in_a_new_thread(function, *args):
    """Which has used no memory yet."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


@pytest.mark.parametrize("k", [70, 3])
def test_only_queries_that_are_not_finite(tmp_path, k):
    search = searching(opened(tmp_path, "IVF20,Flat"))
    asked = np.full((200, DIM), np.nan, dtype=np.float32)
    _, ids, _ = in_a_new_thread(search.search, asked, k)
    assert (ids == -1).all()


def test_a_part_of_which_no_query_is_finite(tmp_path):
    index = opened(tmp_path, "IVF20,Flat")
    asked = queries(400)
    asked[100:] = np.inf
    search = searching(index, visit_bytes=1 << 16, sieve_bytes=1 << 16)
    distances, ids, _ = search.search(asked, 3)
    assert (ids[100:] == -1).all()
    assert_same((distances[:100], ids[:100]), index.search(asked[:100], 3))


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_vectors_of_one_number(tmp_path, metric, equal):
    """Where they are equal, nothing is nearer than the bound."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((N, 1), dtype=np.float32)
    keys = np.sign(keys) if equal else keys
    index = make_index(1, "IVF2,Flat", "l2" if metric == faiss.METRIC_L2 else "ip")
    index.train(keys)
    index.add(keys)
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    index = read_index(tmp_path / "x.faiss")
    index.nprobe = 2
    asked = rng.standard_normal((200, 1), dtype=np.float32)
    search = searching(index, too_many=1000)
    distances, _, _ = in_a_new_thread(search.search, asked, 20)
    assert np.allclose(distances, index.search(asked, 20)[0], rtol=1e-5, atol=1e-6)


@needs_exact_bytes
@pytest.mark.parametrize(
    ("of_queries", "of_keys"), [(1.0, 1e20), (1.0, 2e38), (1e20, 1.0), (1e-18, 1e-18)]
)
def test_numbers_that_are_very_large_or_small(tmp_path, of_queries, of_keys):
    """Where errors, or their bounds, are infinite or vanish, nothing is lost."""
    keys = np.random.default_rng(0).standard_normal((N, DIM), dtype=np.float32)
    keys[8] = 1
    keys[slice(8, 9) if of_keys > 1 else slice(None)] *= np.float32(of_keys)
    keys[7] = 0
    index = make_index(DIM, "IVF4,Flat", "ip")
    index.train(keys[9:])
    index.add(keys)
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    index = read_index(tmp_path / "x.faiss")
    index.nprobe = 4
    asked = np.eye(DIM, dtype=np.float32)[np.arange(200) % DIM] * np.float32(of_queries)
    distances, _, _ = searching(index, by_bytes=True).search(asked, 20)
    expected = np.sort(asked.astype(np.float64) @ keys.T.astype(np.float64))[:, ::-1][:, :20]
    assert np.allclose(distances / expected, 1, rtol=1e-5)


@pytest.mark.parametrize("by_bytes", [False, pytest.param(True, marks=needs_exact_bytes)])
@pytest.mark.parametrize("k", [70, 3])
@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_queries_that_are_not_finite_find_nothing(tmp_path, metric, k, by_bytes):
    """And spoil no other query."""
    index = opened(tmp_path, "IVF20,Flat", metric)
    asked = queries()
    asked[3, 2], asked[150] = np.nan, np.inf
    distances, ids, _ = searching(index, by_bytes=by_bytes).search(asked, k)
    finite = np.isfinite(asked).all(axis=1)
    assert (ids[~finite] == -1).all()
    assert_same((distances[finite], ids[finite]), index.search(asked[finite], k))


@needs_exact_bytes
def test_a_key_that_is_not_finite_hides_no_other(tmp_path):
    """faiss keeps one in an index of inner products."""
    keys = np.random.default_rng(0).standard_normal((N, DIM), dtype=np.float32)
    index = make_index(DIM, "IVF4,Flat", "ip")
    index.train(keys)
    keys[5, 3] = np.inf
    index.add(keys)
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    index = read_index(tmp_path / "x.faiss")
    index.nprobe = 4
    asked = queries()
    asked[:, 3] = -np.abs(asked[:, 3])  # far from that key
    search = searching(index, by_bytes=True)
    assert_same(search.search(asked, 10), index.search(asked, 10))


@needs_exact_bytes
def test_one_large_query_changes_no_other(tmp_path):
    search = searching(opened(tmp_path, "IVF20,Flat"), by_bytes=True)
    large = np.vstack([queries(), np.full((1, DIM), 1e3, np.float32)])
    distances, ids, _ = search.search(queries(), 3)
    with_it, ids_with_it, _ = search.search(large, 3)
    assert np.array_equal(ids, ids_with_it[:-1])
    assert np.array_equal(distances, with_it[:-1])


@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_a_bound_that_is_too_near_loses_nothing(tmp_path, monkeypatch, metric):
    """Half of the queries get one below which fewer than k vectors are left."""
    index = opened(tmp_path, "IVF20,Flat", metric)
    real = visit.Visit.farthest

    def too_near(visit):
        bounds = real(visit)
        bounds[::2] -= 0.5 * np.abs(bounds[::2])
        return bounds

    monkeypatch.setattr(visit.Visit, "farthest", too_near)
    assert_same(searching(index).search(queries(), 30), index.search(queries(), 30))


def test_order_and_threads_of_a_sieve_change_no_figure(tmp_path):
    """A token's neighbours come in the same order whatever else is searched for with it."""
    search = searching(opened(tmp_path, "IVF20,SQfp16"))
    expected, expected_ids, _ = search.search(queries(), 20, ordered=False)
    faiss.omp_set_num_threads(3)
    for part in (slice(0, 200), slice(40, 90)):
        distances, ids, _ = search.search(queries()[part], 20, ordered=False)
        assert np.array_equal(ids, expected_ids[part])
        assert np.allclose(distances, expected[part], rtol=1e-6)


@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_missing_neighbours_are_as_faiss_gives_them(tmp_path, metric):
    index = opened(tmp_path, "IVF20,Flat", metric)
    index.nprobe = 1
    distances, ids, _ = searching(index).search(queries(), 400)
    expected, expected_ids = index.search(queries(), 400)
    assert (ids < 0).any()
    assert_same((distances, ids), (expected, expected_ids))


@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
@pytest.mark.parametrize("k", [70, 900])
def test_in_any_order_it_finds_the_same(tmp_path, metric, k):
    search = searching(opened(tmp_path, "IVF20,SQfp16", metric))
    distances, ids, _ = search.search(queries(), k, ordered=False)
    assert (ids < 0).any() == (k == 900)
    expected, expected_ids, _ = search.search(queries(), k)
    order = np.argsort(ids, axis=1, kind="stable")
    right = np.argsort(expected_ids, axis=1, kind="stable")
    assert np.array_equal(
        np.take_along_axis(ids, order, 1), np.take_along_axis(expected_ids, right, 1)
    )
    assert np.array_equal(
        np.take_along_axis(distances, order, 1), np.take_along_axis(expected, right, 1)
    )


def test_empty_lists_and_few_keys(tmp_path):
    keys = np.repeat(np.eye(DIM, dtype=np.float32), 40, axis=0)
    index = opened(tmp_path, "IVF30,Flat", keys=keys)
    distances, _, _ = searching(index).search(queries(), 3)
    assert np.allclose(distances, index.search(queries(), 3)[0], atol=1e-5)


def test_distances_far_from_the_origin_keep_their_digits(tmp_path):
    shift = 1000.0
    index = opened(tmp_path, "IVF20,Flat", shift=shift)
    index.nprobe = 20
    distances, ids, _ = searching(index).search(queries(shift=shift), 10)
    keys = np.random.default_rng(0).standard_normal((N, DIM), dtype=np.float32) + np.float32(shift)
    own = queries(shift=shift)[:, None].astype(np.float64)
    exact = ((own - keys[ids]) ** 2).sum(-1)
    assert np.abs(distances - exact).max() < 1e-4 * exact.max()


def test_types_it_cannot_read_are_left_to_faiss(tmp_path):
    assert not ListSearch.serves(opened(tmp_path, "IVF20,PQ8x4fs"))
    assert not ListSearch.serves(faiss.index_factory(DIM, "IVF20,Flat"))
    # Codes of 13 bytes: ids do not lie at multiples of 8 bytes from one another.
    keys = np.random.default_rng(0).standard_normal((N, 13), dtype=np.float32)
    index = faiss.index_factory(13, "IVF20,SQ8")
    index.train(keys)
    index.add(keys)
    faiss.write_index(index, str(tmp_path / "y.faiss"))
    assert not ListSearch.serves(read_index(tmp_path / "y.faiss"))
