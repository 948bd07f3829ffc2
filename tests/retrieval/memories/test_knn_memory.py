"""The neighbours as a memory, over a datastore whose entries were merged."""

import numpy as np
import pytest
import torch

from neighborlm.common.contracts import Scored
from neighborlm.retrieval.memories.cache import Extent
from neighborlm.retrieval.memories.cache_builder import RetrievalCacheBuilder
from neighborlm.retrieval.memories.knn_memory import KNNMemory, opinion_from_cache
from neighborlm.retrieval.memories.tuning import log_probs_of
from neighborlm.retrieval.search.retriever import FlatRetriever
from neighborlm.retrieval.store.thinning import write_thinned

TOKENS, TEMPERATURE, KEY = 40, 2.0, "last_ffn_input"


@pytest.fixture
def merged(make_store, tmp_path):
    """Every third row of a datastore, with weights."""
    store, keys, values = make_store(rows=90, dim=8)
    rows = np.arange(0, 90, 3)
    weights = np.random.default_rng(1).integers(1, 6, len(rows)).astype(np.uint32)
    made = write_thinned(store, tmp_path / "merged", rows, {"by": "a test"}, weights)
    return made, keys[rows], values[rows], weights


@pytest.fixture
def asked() -> Scored:
    rng = np.random.default_rng(2)
    return Scored(
        torch.arange(TOKENS),
        torch.from_numpy(rng.integers(0, 50, TOKENS)),
        torch.zeros(TOKENS),
        {KEY: torch.from_numpy(rng.normal(size=(TOKENS, 8)).astype(np.float32))},
    )


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_an_entry_votes_as_often_as_it_stands_for_others(merged, asked, metric):
    store, keys, values, weights = merged
    memory = KNNMemory(store, FlatRetriever(store, metric), len(keys), TEMPERATURE)
    queries = asked.keys[KEY].double().numpy()
    products = queries @ keys.T.astype(np.float64)
    scores = products if metric == "ip" else -((queries[:, None] - keys) ** 2).sum(axis=2)
    shares = weights * np.exp(scores / TEMPERATURE)
    shares /= shares.sum(axis=1, keepdims=True)
    hits = values == asked.targets.numpy()[:, None]
    opinion = memory.say(asked)
    np.testing.assert_allclose(opinion.log_probs.exp(), (shares * hits).sum(axis=1), atol=1e-6)
    nearest = scores.max(axis=1) * (1 if metric == "ip" else -1)
    np.testing.assert_allclose(opinion.features["nearest_distance"], nearest, rtol=1e-4)
    ids, probs = memory.distribution(asked)[:2]
    of_targets = (probs * (ids == asked.targets[:, None])).sum(dim=1)
    np.testing.assert_allclose(of_targets, (shares * hits).sum(axis=1), atol=1e-6)
    np.testing.assert_allclose(probs.sum(dim=1), 1, rtol=1e-5)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_a_cache_keeps_all_that_was_retrieved(merged, asked, tmp_path, metric):
    """Weights of merged entries included: votes at any temperature, the rows, and the model."""
    store, keys, values, weights = merged
    extent = Extent(len(store), top=3, weighted=True, on_lm=True)
    builder = RetrievalCacheBuilder(tmp_path / "cache", TOKENS, len(keys), 50, {}, extent)
    memory = KNNMemory(store, FlatRetriever(store, metric), len(keys), cache=builder)
    assert (memory.want.entropy, memory.want.top) == (True, 3)
    top = torch.arange(3 * TOKENS).reshape(TOKENS, 3)
    of_model = {"top_ids": top % 50, "top_log_probs": -top.float(), "entropy": top[:, 0] / 7}
    asked = asked._replace(**of_model, lm_log_probs=torch.full((TOKENS,), -2.0))
    memory.say(asked)
    memory.end_pass()
    cache = builder.finish()
    (block,) = cache
    for temperature in (0.5, TEMPERATURE, 30.0):
        searching = KNNMemory(store, FlatRetriever(store, metric), len(keys), temperature)
        expected = searching.say(asked)
        found = opinion_from_cache(block, temperature, metric)
        torch.testing.assert_close(found.log_probs, expected.log_probs)
        torch.testing.assert_close(found.features, expected.features)
        of_grid = log_probs_of(block, [1, len(keys)], [7.0, temperature])[:, 1, 1]
        torch.testing.assert_close(of_grid, expected.log_probs)
    np.testing.assert_array_equal(np.sort(cache.rows, axis=1)[0], np.arange(len(keys)))
    np.testing.assert_array_equal(cache.values, values[cache.rows])
    np.testing.assert_array_equal(cache.weights, weights[cache.rows])
    for name, column in cache.scored()._asdict().items():
        if name != "keys":
            torch.testing.assert_close(column, getattr(asked, name), check_dtype=False)
