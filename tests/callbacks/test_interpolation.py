"""The mixing callback, fed by hand, against brute force over all keys."""

import math
import threading
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch

from neighborlm.callbacks.interpolation import Interpolation
from neighborlm.callbacks.tally import Tally
from neighborlm.callbacks.token_scores import ScoreTable
from neighborlm.common.contracts import Neighbors, Scored
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories import ConstantMixer, KNNMemory
from neighborlm.retrieval.memories.cache_builder import RetrievalCacheBuilder
from neighborlm.retrieval.memories.knn_memory import opinion_from_cache
from neighborlm.retrieval.search import BaseRetriever, Search
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import open_retriever
from neighborlm.retrieval.search.retriever import FlatRetriever
from neighborlm.retrieval.store.datastore import DatastoreBuilder

N, D, Q, K, LMBDA, TEMPERATURE = 200, 6, 70, 9, 0.3, 2.0
KEYS, OTHERS = "last_ffn_input", "last_hidden"


def knn_interpolation(
    store, retriever, k, lmbda, temperature=1.0, *, keep_scores=False, at_once=1024, **how
) -> Interpolation:
    """Mixes with the neighbours alone, by one weight."""
    memory = KNNMemory(store, retriever, k, temperature, **how)
    mixer = ConstantMixer((1 - lmbda, lmbda))
    return Interpolation({"knn": memory}, mixer, np.zeros(Q), keep_scores, at_once)


class FakeModule:
    """All that the callback wants of a model."""

    device = torch.device("cpu")
    part = torch.nn.Identity()
    first_position = 0

    @classmethod
    def modules(cls) -> list[torch.nn.Module]:
        return [cls.part]


class FakeTrainer:
    """All that it wants of a trainer."""

    strategy = SimpleNamespace(root_device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("model", "other"),
    [
        ({"fingerprint": "m"}, None),
        ({"fingerprint": "n"}, "n"),
        ({"fingerprint": "n", "lm": SimpleNamespace(fingerprint="m")}, None),
        ({"fingerprint": "n", "lm": SimpleNamespace(fingerprint="o"), "lm_fingerprint": "m"}, None),
        ({"fingerprint": "n", "lm": SimpleNamespace(fingerprint="o"), "lm_fingerprint": "o"}, "n"),
        ({}, None),  # a model that has none
    ],
)
def test_queries_of_another_model_are_refused(make_store, model, other):
    """The datastore's model is `m`."""
    store, *_ = make_store()
    mixing = knn_interpolation(store, FlatRetriever(store, "l2"), 4, 0.5)
    module = SimpleNamespace(model=SimpleNamespace(**model))
    if other is None:
        mixing.setup(FakeTrainer, module, "test")
        return
    with pytest.raises(InputError, match=f"keys of the model m, .* queries are those of {other};"):
        mixing.setup(FakeTrainer, module, "test")


@pytest.fixture
def world(tmp_path):
    """A datastore and scored tokens."""
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(N, D)).astype(np.float32), rng.integers(0, 12, N)
    builder = DatastoreBuilder(tmp_path / "s", N, D, "fp32", 12, {}, np.empty(0, np.int64))
    builder.write(np.arange(N), keys, values)
    builder.sync()
    scores = Scored(
        torch.from_numpy(rng.permutation(Q)),
        torch.from_numpy(rng.integers(0, 12, Q)),
        torch.from_numpy(rng.normal(-3, 1, Q).astype(np.float32)),
        {KEYS: torch.from_numpy(rng.normal(size=(Q, D)).astype(np.float32))},
    )
    return builder.finish(), keys, values, scores


def parts_of(scores: Scored, size: int) -> list[Scored]:
    """Batches of some tokens each."""
    columns = (scores.positions, scores.targets, scores.log_probs, scores.keys[KEYS])
    batches = zip(*(column.split(size) for column in columns), strict=True)
    return [Scored(*columns, {KEYS: keys}) for *columns, keys in batches]


def feed(callback: Interpolation, scores: Scored, batch: int) -> Interpolation:
    callback.setup(FakeTrainer, FakeModule, "test")
    callback.background.submit(faiss.omp_set_num_threads, 1)  # each thread has its own setting
    callback.on_test_start(FakeTrainer, FakeModule)
    callback.on_test_epoch_start(None, FakeModule)
    try:
        for part in parts_of(scores, batch):
            callback.on_test_batch_end(None, FakeModule, part, None, 0)
        callback.on_test_epoch_end(None, FakeModule)
    finally:
        callback.on_test_end(None, FakeModule)
    return callback


@pytest.mark.parametrize(("batch", "queries_at_once"), [(70, 1024), (7, 20), (1, 1)])
def test_equals_brute_force(world, batch, queries_at_once):
    store, keys, values, scores = world
    how = {"keep_scores": True, "at_once": queries_at_once}
    callback = knn_interpolation(store, FlatRetriever(store, "l2"), K, LMBDA, TEMPERATURE, **how)
    feed(callback, scores, batch)

    queries, targets = scores.keys[KEYS].double().numpy(), scores.targets.numpy()
    distances = ((queries[:, None] - keys) ** 2).sum(-1)
    nearest = np.argsort(distances, 1)[:, :K]
    close = np.take_along_axis(distances, nearest, 1)
    weights, hits = np.exp(-close / TEMPERATURE), values[nearest] == targets[:, None]
    p_knn = (weights * hits).sum(1) / weights.sum(1)
    mixed = np.log(LMBDA * p_knn + (1 - LMBDA) * scores.log_probs.double().exp().numpy())

    total = callback.tally.loss.compute()
    assert total["tokens"] == Q
    assert total["loss"].item() == pytest.approx(-mixed.mean(), rel=1e-6)
    statistics = callback.tally.statistics()
    assert statistics["knn.nearest_distance"] == pytest.approx(close[:, 0].mean(), rel=1e-5)
    assert statistics["knn.kth_distance"] == pytest.approx(close[:, -1].mean(), rel=1e-5)
    assert statistics["knn.has_target"] == pytest.approx(hits.any(1).mean())
    table = callback.tally.table.gathered()
    np.testing.assert_array_equal(table["position"], np.arange(Q))
    order = np.argsort(scores.positions.numpy())
    np.testing.assert_allclose(table["log_prob"], mixed[order], rtol=1e-4)
    np.testing.assert_allclose(np.exp(table["knn_log_prob"]), p_knn[order], rtol=1e-4, atol=1e-9)


def test_other_keys_weigh_what_an_exact_search_finds(world, tmp_path):
    store, keys, values, scores = world
    rng = np.random.default_rng(1)
    others = rng.normal(size=(N, 4)).astype(np.float32)
    made_from = {"key_type": OTHERS}
    builder = DatastoreBuilder(tmp_path / "o", N, 4, "fp32", 12, made_from, np.empty(0, np.int64))
    builder.write(np.arange(N), others, values)
    builder.sync()
    asked = torch.from_numpy(rng.normal(size=(Q, 4)).astype(np.float32))
    retriever = open_retriever(store, Search("torch", "l2", 32))
    assert retriever.exact
    callback = knn_interpolation(store, retriever, K, LMBDA, rescoring=builder.finish())
    callback.setup(FakeTrainer, FakeModule, "test")
    callback.on_test_epoch_start(None, FakeModule)
    outputs = scores._replace(keys={**scores.keys, OTHERS: asked})
    callback.on_test_batch_end(None, FakeModule, outputs, None, 0)
    callback.on_test_epoch_end(None, FakeModule)

    distances = ((scores.keys[KEYS].double().numpy()[:, None] - keys) ** 2).sum(-1)
    nearest = np.argsort(distances, 1)[:, :K]
    weights = np.exp(-((asked.double().numpy()[:, None] - others[nearest]) ** 2).sum(-1))
    hits = values[nearest] == scores.targets.numpy()[:, None]
    p_knn = (weights * hits).sum(1) / weights.sum(1)
    mixed = np.log(LMBDA * p_knn + (1 - LMBDA) * scores.log_probs.double().exp().numpy())
    assert callback.tally.loss.compute()["loss"].item() == pytest.approx(-mixed.mean(), rel=1e-6)


class Finds(BaseRetriever):
    """A retriever that finds what it is told."""

    metric = "l2"
    exact = False

    def __init__(self, datastore, rows: np.ndarray) -> None:
        self.datastore = datastore
        self.rows = rows

    def search(self, queries, k, ordered=True):
        return Neighbors(np.full(self.rows.shape, 3.0, np.float32), self.rows)

    def prepare(self):
        """Nothing to load."""


@pytest.mark.parametrize(("missing", "voters"), [("left_out", [5]), ("last_row", [5, N - 1])])
def test_missing_neighbours(world, missing, voters):
    store, _, values, scores = world
    one = parts_of(scores, 1)[0]
    one = one._replace(targets=torch.tensor([int(values[5])]))
    callback = knn_interpolation(
        store, Finds(store, np.array([[5, -1]])), 2, 1.0, distances="index", missing=missing
    )
    feed(callback, one, 1)
    expected = math.log(np.mean(values[voters] == values[5]))
    assert callback.tally.loss.compute()["loss"].item() == pytest.approx(-expected, abs=1e-6)


def test_errors_of_the_search_surface(world):
    store, _, _, scores = world
    callback = knn_interpolation(store, Finds(store, np.full((70, 1), N + 5)), 1, 0.5)
    with pytest.raises(IndexError):
        feed(callback, scores, 70)


class Waits(FlatRetriever):
    """A retriever that searches when it is told to."""

    told = threading.Event()

    def search(self, queries, k, ordered=True):
        assert self.told.wait(timeout=60)
        return super().search(queries, k, ordered)


def test_the_model_has_all_threads_while_nothing_is_searched_for(world):
    store, _, _, scores = world
    callback = knn_interpolation(store, Waits(store, "l2"), K, LMBDA, at_once=1)

    def threads() -> int:
        FakeModule.part(torch.zeros(1))
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        callback.setup(FakeTrainer, FakeModule, "test")
        callback.on_test_start(FakeTrainer, FakeModule)
        callback.on_test_epoch_start(None, FakeModule)
        assert threads() == 4
        callback.on_test_batch_end(None, FakeModule, scores, None, 0)
        assert threads() == 2
        Waits.told.set()
        callback.background.drain()
        assert threads() == 4
        callback.on_test_batch_end(None, FakeModule, scores, None, 1)
        callback.on_test_epoch_end(None, FakeModule)
        callback.on_test_end(None, FakeModule)
        assert torch.get_num_threads() == 4
        assert not FakeModule.part._forward_pre_hooks
        assert callback.tally.loss.compute()["tokens"] == 2 * Q
    finally:
        torch.set_num_threads(before)


def test_what_is_retrieved_can_be_mixed_again(world, tmp_path):
    """From the cache, at another lmbda and temperature, as by searching again."""
    store, _, _, scores = world
    builder = RetrievalCacheBuilder(tmp_path / "c", Q, K, 12, {})
    feed(knn_interpolation(store, FlatRetriever(store, "l2"), K, 0.0, cache=builder), scores, 7)
    again, mixer = Tally(), ConstantMixer((1 - LMBDA, LMBDA))
    for block in builder.finish():
        opinion = opinion_from_cache(block, TEMPERATURE, "l2")
        asked = Scored(block.positions, block.targets, block.lm_log_prob)
        mixed = mixer.mixed((asked.log_probs.double(), opinion.log_probs.double()))
        again.add(asked, {"knn": opinion}, mixed)
    searching = knn_interpolation(store, FlatRetriever(store, "l2"), K, LMBDA, TEMPERATURE)
    expected = feed(searching, scores, 70).tally
    assert again.loss.compute()["loss"] == pytest.approx(expected.loss.compute()["loss"])
    found, statistics = again.statistics(), expected.statistics()
    for name in ("knn.nearest_distance", "knn.kth_distance", "knn.has_target"):
        assert found[name] == pytest.approx(statistics[name])


def test_score_table_is_in_corpus_order():
    table = ScoreTable()
    table.add(position=np.array([4, 2]), x=np.array([0.4, 0.2]))
    table.add(position=np.array([0]), x=np.array([0.0]))
    assert table.gathered()["x"].tolist() == [0.0, 0.2, 0.4]


def scores_of_all_keys(queries, keys, metric):
    """float64 `[Q, N]`, larger is nearer."""
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    if metric == "l2":
        return -((queries[:, None] - keys) ** 2).sum(-1)
    if metric == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    return queries @ keys.T


def mixture(table, values, scores, lmbda, temperature):
    """The log-probabilities of targets, from the scores of all keys that take part."""
    weights = np.exp((table - table.max(1, keepdims=True)) / temperature)
    hits = values == scores.targets.numpy()[:, None]
    p_knn = (weights * hits).sum(1) / weights.sum(1)
    return np.log(lmbda * p_knn + (1 - lmbda) * np.exp(scores.log_probs.double().numpy()))


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_all_keys_vote(world, metric):
    """k of N and of more than N: what is missing beyond them has no part."""
    store, keys, values, scores = world
    expected = mixture(
        scores_of_all_keys(scores.keys[KEYS].numpy(), keys, metric), values, scores, 0.6, 0.7
    )
    for k in (N, N + 7):
        callback = knn_interpolation(store, FlatRetriever(store, metric), k, 0.6, 0.7)
        loss = feed(callback, scores, 16).tally.loss.compute()["loss"].item()
        assert loss == pytest.approx(-expected.mean(), rel=1e-6)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    ("distances", "similarity"), [("index", None), ("exact", None), ("exact", "cosine")]
)
def test_a_coarse_index_finds_and_the_settings_say_what_weighs(
    world, metric, distances, similarity
):
    """The four-bit index's own distances are far from the exact ones."""
    store, keys, values, scores = world
    IndexBuilding(store, "SQ4", metric).run()
    retriever = open_retriever(store, Search("SQ4", metric, 1))
    callback = knn_interpolation(
        store, retriever, K, LMBDA, TEMPERATURE, distances=distances, similarity=similarity
    )
    own, found, _ = retriever.search(scores.keys[KEYS].numpy(), K)
    if distances == "index":
        table = -own if metric == "l2" else own
    else:
        everything = scores_of_all_keys(scores.keys[KEYS].numpy(), keys, similarity or metric)
        table = np.take_along_axis(everything, found, axis=1)
    expected = mixture(table.astype(np.float64), values[found], scores, LMBDA, TEMPERATURE)
    loss = feed(callback, scores, 16).tally.loss.compute()["loss"].item()
    assert loss == pytest.approx(-expected.mean(), rel=1e-6)


def test_nothing_but_memory_that_does_not_know_is_infinitely_wrong(world):
    store, _, _, scores = world
    unknown = scores._replace(targets=torch.full((Q,), 13))
    callback = feed(knn_interpolation(store, FlatRetriever(store, "l2"), K, 1.0), unknown, 16)
    assert callback.tally.loss.compute()["loss"].item() == math.inf
    assert callback.tally.statistics()["knn.has_target"] == 0
    callback = feed(knn_interpolation(store, FlatRetriever(store, "l2"), K, 0.25), unknown, 16)
    expected = -scores.log_probs.double().mean().item() - math.log(0.75)
    assert callback.tally.loss.compute()["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_each_run_starts_its_sums_anew(world):
    store, _, _, scores = world
    few = parts_of(scores, 20)[0]
    used, fresh = (knn_interpolation(store, FlatRetriever(store, "l2"), K, LMBDA) for _ in "12")
    feed(used, scores, 16)
    for callback in (used, fresh):
        feed(callback, few, 16)
    used, fresh = used.tally, fresh.tally
    assert used.loss.compute() == fresh.loss.compute()
    assert used.statistics() == fresh.statistics()


def test_each_run_keeps_its_own_tokens(world):
    store, _, _, scores = world
    callback = knn_interpolation(store, FlatRetriever(store, "l2"), K, LMBDA, keep_scores=True)
    for _ in range(2):
        feed(callback, scores, 16)
    assert len(callback.tally.table.gathered()["position"]) == Q


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_statistics_are_of_the_nearest_and_the_farthest(world, metric):
    """In whatever order an index gives them, with gaps, and one token that finds nothing."""
    store, keys, _, scores = world
    rows = np.tile([7, 3, -1, 11, 5], (Q, 1))
    rows[13] = -1
    retriever = Finds(store, rows)
    retriever.metric = metric
    statistics = feed(knn_interpolation(store, retriever, 5, LMBDA), scores, Q).tally.statistics()
    table = scores_of_all_keys(scores.keys[KEYS].numpy(), keys[[7, 3, 11, 5]], metric)
    table = np.delete(table, 13, axis=0) * (-1 if metric == "l2" else 1)
    low, high = table.min(1).mean(), table.max(1).mean()
    nearest, farthest = (low, high) if metric == "l2" else (high, low)
    assert statistics["knn.nearest_distance"] == pytest.approx(nearest, rel=1e-5)
    assert statistics["knn.kth_distance"] == pytest.approx(farthest, rel=1e-5)
