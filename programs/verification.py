"""Compares products of every kind with the checksums that they were written with: datastores,
indexes, neighbour tables, codes, caches, suffix arrays, clusters, binarised corpora, checkpoints.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from neighborlm.common.digests import verification
from neighborlm.common.errors import InputError
from neighborlm.common.progress import Report
from neighborlm.datamodules.binarized import verify_folder
from neighborlm.programs.checkpoints import verify_checkpoint
from neighborlm.retrieval.memories import cache, suffix_array
from neighborlm.retrieval.neighbors import codec, tables
from neighborlm.retrieval.search import building, clusters, index
from neighborlm.retrieval.store import datastore
from neighborlm.retrieval.store.artifact import Artifact
from neighborlm.retrieval.store.datastore import Datastore, shard_paths
from neighborlm.retrieval.store.maintenance import verify_datastore

PRODUCTS = (datastore, index, tables, codec, cache, suffix_array, clusters)
FORMATS = {of.kind: of for of in (*(room.FORMAT for room in PRODUCTS), building.TRAINED)}
"""By what a manifest says that it is of."""


class Found(NamedTuple):
    """A product on disk.

    Attributes:
        path: of its manifest; of a checkpoint itself.
        kind: one of `FORMATS`, `corpus` or `checkpoint`; None where the manifest cannot be read.
    """

    path: Path
    kind: str | None

    @property
    def name(self) -> Path:
        """What a person calls it."""
        if self.path.name in ("manifest.json", "meta.json"):
            return self.path.parent
        return self.path if self.kind == "checkpoint" else self.path.with_suffix("")


def products_at(path: Path) -> list[Found]:
    """The products below a folder, a shard as part of its datastore where that is below it too; or
    the one that a file belongs to.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        beside = (path.with_name(f"{path.name}.json"), path.with_suffix(".json"), path)
        places = list(filter(Path.is_file, beside))
    else:
        places = sorted([*path.rglob("*.json"), *path.rglob("*.ckpt")])
    found = [Found(place, kind) for place in places for kind in _kinds(place)]
    if not found:
        raise InputError(
            f"{path}: is no product and holds none; expected a datastore, an index or another one, "
            "or a folder of such"
        )
    shards = set()
    for product in found:
        if product.kind == datastore.FORMAT.kind:
            with suppress(InputError):  # which is said when it is verified
                manifest = datastore.artifact_of(product.name).read()
                shards |= {shard.resolve() for shard in shard_paths(product.name, manifest)}
    found = [product for product in found if product.name.resolve() not in shards]
    return found[:1] if path.is_file() else found


def _kinds(path: Path) -> Iterator[str | None]:
    """What product a file describes: none or one."""
    if path.suffix == ".ckpt":
        yield "checkpoint"
    if path.suffix != ".json":
        return
    try:
        said: Any = json.loads(path.read_bytes())
    except ValueError:
        described = (path.with_suffix(""), path.with_suffix(".npy"))
        if path.name == "manifest.json" or any(map(Path.is_file, described)):
            yield None
        return
    if isinstance(said, dict) and said.get("kind") in FORMATS:
        yield said["kind"]
    elif path.name == "meta.json" and isinstance(said, dict) and "fingerprints" in said:
        yield "corpus"


def verify_product(product: Found, report: Report) -> Literal["whole", "unfinished", "unknown"]:
    """Reads all of a product and compares it with its checksums.

    Args:
        report: called with a stage, how much of it is done, and how much there is.

    Returns:
        `unknown` of a product of an earlier version, which has no checksums.

    Raises:
        InputError: it is damaged; or it is a datastore without checksums.
    """
    with verification("never"):  # but for what is read here
        if product.kind == "checkpoint":
            verify_checkpoint(product.path)
            return "whole"
        if product.kind == "corpus":
            verify_folder(product.name)
            return "whole"
        if product.kind is None:
            raise InputError(f"{product.path}: is damaged, it is not JSON")
        artifact = Artifact(FORMATS[product.kind], product.path, product.name)
        if product.kind == datastore.FORMAT.kind:
            if not Datastore.is_complete(product.name):
                return "unfinished"
            opened = Datastore.open(product.name)
            verify_datastore(opened, partial(report, "verifying"))
            return "whole"
        if not artifact.is_complete():
            return "unfinished"
        if "files" not in artifact.open():
            return "unknown"
        artifact.verify()
        return "whole"
