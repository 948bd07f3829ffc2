"""The neighbours as a memory, over a datastore whose entries were merged."""

import numpy as np
import pytest
import torch

from neighborlm.common.contracts import Scored
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.cache import RetrievalCacheBuilder
from neighborlm.retrieval.memories.knn_memory import KNNMemory
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
    ids, probs = memory.distribution(asked)
    of_targets = (probs * (ids == asked.targets[:, None])).sum(dim=1)
    np.testing.assert_allclose(of_targets, (shares * hits).sum(axis=1), atol=1e-6)
    np.testing.assert_allclose(probs.sum(dim=1), 1, rtol=1e-5)


def test_a_cache_does_not_lose_the_weights(merged, asked, tmp_path):
    store, keys, *_ = merged
    cache = RetrievalCacheBuilder(tmp_path / "cache", TOKENS, len(keys), 50, {})
    memory = KNNMemory(store, FlatRetriever(store, "l2"), len(keys), cache=cache)
    with pytest.raises(InputError, match="its entries were merged"):
        memory.say(asked)
