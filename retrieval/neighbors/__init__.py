"""What a GNN-LM reads of a datastore: a table of every token's neighbours, and codes of a few bytes
for their features.

This room's doors are `NeighborSearch`, which makes a table, and `find_table`; `build_codes`, which
makes codes, and `open_codes`.
"""

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
