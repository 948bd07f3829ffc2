"""Datastores, in one piece or in shards, and the one way in which a product lies on disk.

This room's doors are `Datastore.open` for reading, `new_datastore` for writing, and `Artifact` for
the manifest, lock and completion of any other product.
"""

from neighborlm.retrieval.store.artifact import Artifact, Format, Job, refuse_mismatch, share_out
from neighborlm.retrieval.store.datastore import Datastore, DatastoreBuilder
from neighborlm.retrieval.store.sharded_builder import ShardedBuilder, new_datastore
from neighborlm.retrieval.store.shards import Placement, ShardedArray

__all__ = [
    "Artifact",
    "Datastore",
    "DatastoreBuilder",
    "Format",
    "Job",
    "Placement",
    "ShardedArray",
    "ShardedBuilder",
    "new_datastore",
    "refuse_mismatch",
    "share_out",
]
