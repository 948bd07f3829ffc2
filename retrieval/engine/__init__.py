"""Searches the inverted lists of a faiss index on a CPU for many queries at a time, counts the
votes of neighbours, and looks phrases up in a suffix array (`suffix_loops`): arrays in, arrays out.

This file is the room's door: `search` and `memories` import the names below, and no other room
imports anything. The engine knows no datastore and no model.
"""

from neighborlm.retrieval.engine import suffix_loops
from neighborlm.retrieval.engine.inverted_lists import stores_halves
from neighborlm.retrieval.engine.limits import Limits
from neighborlm.retrieval.engine.list_search import ListSearch
from neighborlm.retrieval.engine.loops import LIGHTEST, SMALL, distances_of_pairs
from neighborlm.retrieval.engine.parallel import in_parallel
from neighborlm.retrieval.engine.probing import Probing
from neighborlm.retrieval.engine.selection import first_out_of_order, k_smallest, sort_rows
from neighborlm.retrieval.engine.votes import count_votes

__all__ = [
    "LIGHTEST",
    "SMALL",
    "Limits",
    "ListSearch",
    "Probing",
    "count_votes",
    "distances_of_pairs",
    "first_out_of_order",
    "in_parallel",
    "k_smallest",
    "sort_rows",
    "stores_halves",
    "suffix_loops",
]
