"""Finds the nearest keys of a datastore: exact search, indexes of faiss, shards; builds indexes.

`open_retriever` gives what a `Search` describes. Another kind of index is a class of one's own that
derives from `BaseRetriever`, and one entry in `INDEX_KINDS`.
"""

from neighborlm.retrieval.search.index import INDEX_KINDS, Search, open_retriever
from neighborlm.retrieval.search.retriever import BaseRetriever

__all__ = ["INDEX_KINDS", "BaseRetriever", "Search", "open_retriever"]
