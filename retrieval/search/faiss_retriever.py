"""Searches a faiss index: by the engine where many queries share inverted lists, otherwise by
faiss."""

from collections.abc import Callable

import faiss
import numpy as np

from neighborlm.common.contracts import Metric, Neighbors, NProbe, Votes
from neighborlm.retrieval.engine import ListSearch, Probing, stores_halves
from neighborlm.retrieval.search.retriever import BaseRetriever, missing_distance, normalized
from neighborlm.retrieval.store.datastore import Datastore


class FaissRetriever(BaseRetriever):
    """Searches with a complete index.

    Args:
        index: trained and filled; its ids count the datastore's keys.
        datastore: the datastore that it was built from.
        metric: the metric that it was built with.
        nprobe: number of inverted lists to visit, where the index has any. Where something other
            than transforms of the queries comes before the lists, `auto` visits its largest number
            for every query.
        name: of the index, for messages.
    """

    def __init__(
        self,
        index: faiss.Index,
        datastore: Datastore,
        metric: Metric,
        nprobe: NProbe,
        name: str = "index",
    ) -> None:
        self.index = index
        self.datastore = datastore
        self.metric = metric
        self.name = name
        self.probing: Probing | None = None
        self.lists: ListSearch | None = None
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is not None:
            ivf = faiss.downcast_index(ivf)
            probing = Probing(ivf, nprobe)
            if isinstance(index, faiss.IndexPreTransform) or index.this == ivf.this:
                self.probing = probing
                if ListSearch.serves(ivf):
                    self.lists = ListSearch(ivf, probing)

        # The ids of the original program's indexes count rows, with those of zeros at the end.
        self.counts_rows = index.ntotal != datastore.n_keys
        self.finds_masked = self.counts_rows and len(datastore.masked) > 0
        halves = datastore.keys.dtype == np.float16 and metric != "cosine"
        as_they_are = stores_halves(index) and halves and not index.by_residual
        flat = isinstance(index, faiss.IndexFlat) and metric != "l2"  # see FlatRetriever
        self.exact = as_they_are or flat or isinstance(index, faiss.IndexIVFFlat)

    def search(self, queries: np.ndarray, k: int, ordered: bool = True) -> Neighbors:
        """See `contracts.Retriever.search`."""
        queries = normalized(queries, self.metric)
        shared = self._shared(queries)
        if shared is not None:
            distances, ids, _ = self.lists.search(shared, k, ordered)
        elif self.lists is not None and self.lists.reads_halves:
            distances, ids, _ = self.lists.search_each(self.transformed(queries), k, ordered)
        else:
            distances, ids = self._by_faiss(queries, k)
        found = Neighbors(distances, self.rows_of(ids))
        if not ordered:
            return found
        return self.checked(self._missing_last(found))

    def vote(self, queries: np.ndarray, k: int, targets: np.ndarray, temperature: float) -> Votes:
        """See `contracts.Retriever.vote`."""
        # Masked rows that the index finds are among the k, but have no vote.
        shared = None if self.finds_masked else self._shared(normalized(queries, self.metric))
        if shared is None:
            return super().vote(queries, k, targets, temperature)
        values = ByIds(self, self.datastore.values_of)
        counts = None if self.merged_counts is None else ByIds(self, self.merged_counts.__getitem__)
        return self.lists.vote(shared, k, values, targets, temperature, counts)

    def prepare(self) -> None:
        """See `contracts.Retriever.prepare`."""
        super().prepare()
        if self.lists is not None:
            one = np.zeros((1, self.lists.ivf.d), dtype=np.float32)
            self.lists.search(one, 1)
            if self.lists.reads_halves:
                self.lists.search_each(one, 1)
            nothing = np.broadcast_to(np.int32(0), self.index.ntotal)
            self.lists.vote(one, 1, nothing, np.zeros(1, dtype=np.int64), 1.0)

    def _shared(self, queries: np.ndarray) -> np.ndarray | None:
        """The queries as the lists see them; None where they are too few to share lists."""
        if self.lists is None or not self.lists.pays(len(queries)):
            return None
        return self.transformed(queries)

    def transformed(self, queries: np.ndarray) -> np.ndarray:
        """Queries, or keys, as the inverted lists see them."""
        if isinstance(self.index, faiss.IndexPreTransform):
            for number in range(self.index.chain.size()):
                queries = self.index.chain.at(number).apply(queries)
        return queries

    def _by_faiss(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self.probing is None or self.probing.slack == np.inf:
            return self.index.search(queries, k)
        queries = self.transformed(queries)
        distances, lists = self.probing.nearest(queries, faiss.omp_get_max_threads())
        return self.probing.ivf.search_preassigned(queries, k, lists, distances)

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Rows of the datastore by the index's ids; -1 where there is no key."""
        if not self.counts_rows:
            return self.datastore.rows_of(ids)
        if self.finds_masked:
            return np.where(np.isin(ids, self.datastore.masked), -1, ids)
        return ids

    def _missing_last(self, found: Neighbors) -> Neighbors:
        """Moves masked rows to the end, as missing."""
        if not self.finds_masked:
            return found
        order = np.argsort(found.rows < 0, axis=1, kind="stable")
        distances, rows = (np.take_along_axis(column, order, axis=1) for column in found[:2])
        return Neighbors(np.where(rows < 0, missing_distance(self.metric), distances), rows)


class ByIds:
    """A column of a datastore, which a function gives for arrays of rows, indexed by arrays of an
    index's ids."""

    def __init__(
        self, retriever: FaissRetriever, of_rows: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self.retriever = retriever
        self.of_rows = of_rows

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        return self.of_rows(self.retriever.rows_of(ids))
