"""Finds the nearest keys of a datastore, by exact search or by an index of faiss, and builds
indexes.

This room's door is `open_retriever`, which opens the retriever that a `Search` describes. A new
kind of index is a class that derives from `BaseRetriever`, and one entry in `INDEX_KINDS`.
"""

from neighborlm.retrieval.search.index import INDEX_KINDS, Search, open_retriever
from neighborlm.retrieval.search.retriever import BaseRetriever

__all__ = ["INDEX_KINDS", "BaseRetriever", "Search", "open_retriever"]
