"""What a GNN-LM reads of a datastore: who the neighbours of each token are, and their features in a
few bytes each."""

from neighborlm.retrieval.neighbors.codec import Codes, FeatureCodec, build_codes, open_codes
from neighborlm.retrieval.neighbors.tables import (
    NeighborSearch,
    NeighborTable,
    TableSettings,
    find_table,
)

__all__ = [
    "Codes",
    "FeatureCodec",
    "NeighborSearch",
    "NeighborTable",
    "TableSettings",
    "build_codes",
    "find_table",
    "open_codes",
]
