"""How many of the nearest keys an index finds, measured while it is built and kept in its manifest.

Queries are a fixed sample of the stored keys, and their k nearest other keys by exact search, which
looks at each block of keys while it is in memory to be added, are what the index should find. A key
lies where the index was trained; a query of another text is somewhat farther from all keys and
finds a little less: `neighborlm recall` measures that with such queries. Of keys at the same
distance, which exact search too has to choose from, another choice counts as a loss.
"""

from typing import Any

import faiss
import numpy as np

from neighborlm.common.contracts import Metric
from neighborlm.retrieval.search.retriever import FAISS_METRICS, normalized
from neighborlm.retrieval.store.datastore import Datastore

QUERIES, K, SEED = 64, 100, 1
"""Enough for a recall that is right to about 0.02, at a few per cent of the time of building."""
NPROBES = (8, 32)
"""Inverted lists that are visited: the fewest and the most that `--knn.nprobe auto` does."""


class RecallSample:
    """Queries, and their nearest keys among those that have been shown so far.

    Args:
        datastore: whose keys are indexed.
        metric: how they are compared.
    """

    def __init__(self, datastore: Datastore, metric: Metric) -> None:
        n_keys = datastore.n_keys
        rng = np.random.default_rng(SEED)
        chosen = rng.choice(n_keys, min(QUERIES, n_keys), replace=False, shuffle=False)
        self.metric: Metric = metric
        self.own = np.sort(chosen)
        self.queries = normalized(datastore.read(datastore.rows_of(self.own)), metric)
        self.k = min(K, n_keys - 1)
        self.n_shown = 0
        self.nearest = faiss.ResultHeap(len(self.own), self.k + 1, keep_max=metric != "l2")

    def show(self, keys: np.ndarray) -> None:
        """The next keys in order, fp32 `[n, d]`, normalised where the metric needs it."""
        k, metric = min(self.k + 1, len(keys)), FAISS_METRICS[self.metric]
        distances, numbers = faiss.knn(self.queries, keys, k, metric=metric)
        self.nearest.add_result(distances, numbers + self.n_shown)
        self.n_shown += len(keys)

    def measure(self, index: faiss.Index) -> dict[str, Any]:
        """What the manifest of an index of all these keys says of its recall: the number of
        queries, k, and under `of` for each nprobe (None for an index without lists) the share of
        the exact k nearest among the k that the index finds."""
        self.nearest.finalize()
        exact = self._others(self.nearest.I)
        ivf, found = faiss.try_extract_index_ivf(index), []
        nprobes = [None] if ivf is None else sorted({min(n, ivf.nlist) for n in NPROBES})
        for nprobe in nprobes if self.k else []:
            if nprobe is not None:
                ivf.nprobe = nprobe
            numbers = self._others(index.search(self.queries, self.k + 1)[1])
            found.append({"nprobe": nprobe, "recall": _overlap(numbers, exact)})
        return {"queries": len(self.own), "k": self.k, "of": found}

    def _others(self, numbers: np.ndarray) -> np.ndarray:
        """Without the query itself, or else the farthest, of numbers int64 `[Q, k + 1]`."""
        leave = numbers == self.own[:, None]
        leave[:, -1] |= ~leave.any(axis=1)
        return numbers[~leave].reshape(len(numbers), self.k)


def _overlap(numbers: np.ndarray, exact: np.ndarray) -> float:
    """Share of `exact` `[Q, k]`, none of them missing, that is in the same row of `numbers`."""
    step = max(numbers.max(initial=0), exact.max(initial=0)) + 2  # room for -1, missing
    rows = np.arange(len(exact))[:, None] * step
    return round(float(np.isin(exact + rows, numbers + rows).mean()), 4)


def as_sentence(recall: dict[str, Any]) -> str:
    """What `RecallSample.measure` found, for the one who built the index.

    >>> of = [{"nprobe": 8, "recall": 0.71}, {"nprobe": 32, "recall": 0.9}]
    >>> as_sentence({"queries": 64, "k": 100, "of": of})
    'finds 0.710 (nprobe 8), 0.900 (nprobe 32) of the 100 nearest of 64 stored keys'
    """
    if not recall["of"]:
        return "holds a single key"
    shares = (
        f"{found['recall']:.3f}" + (f" (nprobe {found['nprobe']})" if found["nprobe"] else "")
        for found in recall["of"]
    )
    whose = f"the {recall['k']} nearest of {recall['queries']} stored keys"
    return f"finds {', '.join(shares)} of {whose}"
