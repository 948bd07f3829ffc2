import faiss
import numpy as np
import pytest

from neighborlm.retrieval.engine.probing import FEWEST, MOST, NEIGHBORHOOD, SLACK, Probing
from neighborlm.retrieval.search.faiss_retriever import FaissRetriever
from neighborlm.retrieval.search.index import make_index, read_index
from neighborlm.retrieval.search.index_check import is_sound

N, DIM, LISTS = 4000, 16, 64


@pytest.fixture(scope="module")
def keys():
    """Some in dense places, some far away from all others."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((N, DIM)) * rng.uniform(0.2, 1.2, (N, 1))
    return keys.astype(np.float32)


class Store:
    """As much of a datastore as a retriever looks at."""

    def __init__(self, keys):
        self.keys, self.n_keys, self.masked = keys, len(keys), ()

    def rows_of(self, ids):
        return ids


def opened(folder, keys, factory, metric, nprobe):
    index = make_index(DIM, factory, metric)
    index.train(keys)
    index.add(keys)
    faiss.write_index(index, str(folder / "x.faiss"))
    is_sound(folder / "x.faiss")  # so that no process tries it out
    return FaissRetriever(read_index(folder / "x.faiss"), Store(keys), metric, nprobe)


def visited(ivf, queries, fewest=FEWEST, most=MOST):
    """By comparing everything with everything: bool `[Q, lists]`."""
    centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist).astype(np.float64)
    between = ((centroids[:, None] - centroids) ** 2).sum(-1)
    np.fill_diagonal(between, np.inf)
    slack = SLACK * between.min(1).mean()
    if ivf.metric_type == faiss.METRIC_INNER_PRODUCT:
        far, slack = -queries @ centroids.T, slack / 2
    else:
        far = ((queries[:, None] - centroids) ** 2).sum(-1)
    rank = far.argsort(1).argsort(1)
    near = far <= far.min(1, keepdims=True) + slack
    return (rank < most) & (near | (rank < fewest))


@pytest.mark.parametrize("factory", [f"IVF{LISTS},Flat", f"IVF{LISTS}_HNSW32,Flat"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_auto_visits_what_is_not_much_farther_than_the_nearest(tmp_path, keys, metric, factory):
    retriever = opened(tmp_path, keys, factory, metric, "auto")
    _, lists = retriever.probing.nearest(keys[:500])
    expected = visited(retriever.probing.ivf, keys[:500])
    found = np.zeros((500, LISTS + 1), dtype=bool)  # the last for -1
    np.put_along_axis(found, lists, True, axis=1)
    assert np.array_equal(found[:, :-1], expected)
    numbers = expected.sum(1)
    assert {FEWEST, MOST} < set(numbers.tolist())
    assert ((numbers > FEWEST) & (numbers < MOST)).mean() > 0.2


@pytest.mark.parametrize("queries", [3, 400])
@pytest.mark.parametrize(
    "factory",
    [
        f"IVF{LISTS},Flat",
        f"PCA12,IVF{LISTS},SQfp16",
        f"IVF{LISTS},PQ8",
        f"IVF{LISTS},PQ8x4fsr",
        f"RR16,IVF{LISTS},RaBitQfs",
    ],
)
def test_every_search_looks_at_just_these_lists(tmp_path, keys, factory, queries):
    """Asked for all keys it finds those of the lists that are visited, with one query or many."""
    retriever = opened(tmp_path, keys, factory, "l2", "auto")
    ivf, looking = retriever.probing.ivf, keys[:queries]
    chain = getattr(retriever.index, "chain", None)
    seen = chain.at(0).apply(looking) if chain else looking
    own = chain.at(0).apply(keys) if chain else keys
    lists = ivf.quantizer.assign(own, 1)[:, 0]
    expected = visited(ivf, seen)[:, lists]
    _, rows, _ = retriever.search(looking, N)
    found = np.zeros((queries, N + 1), dtype=bool)
    np.put_along_axis(found, rows, True, axis=1)
    assert (found[:, :-1] == expected).mean() > 0.999  # a key between two lists may lie in either
    shared = retriever.lists is not None and retriever.lists.pays(queries)
    assert shared == (queries == 400 and not factory.endswith(("fs", "fsr")))


def test_a_number_is_how_many_are_visited(tmp_path, keys):
    for nprobe, expected in ((5, 5), (200, LISTS)):
        retriever = opened(tmp_path, keys, f"IVF{LISTS},Flat", "l2", nprobe)
        assert (retriever.probing.nearest(keys[:9])[1] >= 0).sum() == 9 * expected
    few = opened(tmp_path, keys, "IVF6,Flat", "l2", "auto")
    assert (few.probing.nearest(keys[:9])[1] >= 0).sum() == 9 * 6


def test_of_many_centroids_a_sample_is_compared(tmp_path, keys):
    retriever = opened(tmp_path, keys, f"IVF{LISTS},Flat", "l2", "auto")
    of_all = retriever.probing.slack
    assert Probing(retriever.probing.ivf, "auto", sample=32).slack == pytest.approx(of_all, rel=0.5)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_the_lists_and_their_distances_are_those_of_faiss(tmp_path, keys, metric, shift):
    """Also of keys far from the origin, and where centroids are compared in several blocks."""
    keys = keys + np.float32(shift)
    retriever = opened(tmp_path, keys, f"IVF{LISTS},Flat", metric, 9)
    found, queries = Probing(retriever.probing.ivf, 9, block=7 * LISTS), keys[:100]
    distances, lists = found.nearest(queries, threads=2)
    centroids = found.ivf.quantizer.reconstruct_n(0, LISTS).astype(np.float64)
    if metric == "l2":
        exact = ((queries[:, None] - centroids) ** 2).sum(-1)
    else:
        exact = queries.astype(np.float64) @ centroids.T
    sign = 1 if metric == "l2" else -1
    nearest = np.sort(sign * exact, axis=1)[:, :9]
    tolerance = {"rtol": 1e-4, "atol": 1e-6 * np.abs(exact).max()}
    assert np.allclose(np.sort(sign * distances, axis=1), nearest, **tolerance)
    assert np.allclose(distances, np.take_along_axis(exact, lists, axis=1), **tolerance)
    assert all(len(set(row)) == 9 for row in lists.tolist())


def test_centroids_that_are_not_all_compared_are_left_to_faiss(tmp_path, keys):
    retriever = opened(tmp_path, keys, f"IVF{LISTS}_HNSW8,Flat", "l2", 5)
    found = retriever.probing
    _, expected = found.ivf.quantizer.search(keys[:50], 5)
    assert np.array_equal(found.nearest(keys[:50])[1], expected)


@pytest.mark.parametrize("lists", [NEIGHBORHOOD, 64, 100])
def test_lists_near_one_another_have_numbers_near_one_another(lists):
    """Centroids on a line: each part that is halved, and each half, is a stretch of it."""
    places = np.random.default_rng(0).permutation(lists)
    line = np.random.default_rng(1).standard_normal(DIM)
    quantizer = faiss.IndexFlatL2(DIM)
    quantizer.add(np.outer(places, line).astype(np.float32))
    ranks = Probing(faiss.IndexIVFFlat(quantizer, DIM, lists), 4).ranks
    assert sorted(ranks) == list(range(lists))
    parts = [places[ranks.argsort()]]
    while len(parts[0]) > NEIGHBORHOOD:
        parts = [half for part in parts for half in np.array_split(part, 2)]
    assert all(np.ptp(part) == len(part) - 1 for part in parts)


def test_lists_that_are_all_alike_are_numbered():
    quantizer = faiss.IndexFlatL2(DIM)
    quantizer.add(np.ones((100, DIM), dtype=np.float32))
    ranks = Probing(faiss.IndexIVFFlat(quantizer, DIM, 100), 4).ranks
    assert sorted(ranks) == list(range(100))
