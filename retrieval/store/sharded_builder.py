"""Writing a datastore that lies in shards: all of them at once, or one of them on a host that
reaches no other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from neighborlm.common.errors import InputError
from neighborlm.retrieval.store.arrays import bytes_of, check_room
from neighborlm.retrieval.store.artifact import refuse_mismatch
from neighborlm.retrieval.store.datastore import (
    ADVICE,
    FORMAT,
    Datastore,
    DatastoreBuilder,
    artifact_of,
    check_shard,
    layouts_while_written,
    shard_paths,
)
from neighborlm.retrieval.store.shards import BLOCK_ROWS, Kind, Placement, shard_name


class ShardedBuilder:
    """Writes the shards of a datastore as `DatastoreBuilder` writes one, rows counted as in the
    whole; any rows in any order, by any number of processes, and goes on where a killed run
    stopped.

    The directory of a shard may be a link to another disk, made before.

    Args:
        path: the directory of the whole, with its manifest and, where nothing else is told, the
            directories of the shards.
        placement: which shard holds which rows.
        dim: width of the keys d.
        dtype: fp16 or fp32.
        vocab_size: values are below it.
        made_from: JSON-able settings that determine the content.
        masked: ascending numbers of the rows of the whole that get no key.
        only: write this shard alone; rows of the others are passed over.

    Raises:
        InputError: a directory holds something else, or a disk has no room.
    """

    def __init__(
        self,
        path: Path | str,
        placement: Placement,
        dim: int,
        dtype: str,
        vocab_size: int,
        made_from: dict[str, Any],
        masked: np.ndarray,
        only: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.artifact = artifact_of(self.path)
        self.placement = placement
        self.only = only
        self.fields = {
            "rows": placement.rows,
            "dim": dim,
            "dtype": dtype,
            "value_dtype": np.min_scalar_type(vocab_size - 1).name,
            "vocab_size": vocab_size,
            "masked": len(masked),
            "made_from": made_from,
            "placement": placement.kind,
            "block_rows": placement.block_rows,
        }
        numbers, local = placement.locate(masked)
        mine = range(placement.shards) if only is None else (only,)
        self.masked = masked if only is None else masked[numbers == only]
        self.path.mkdir(parents=True, exist_ok=True)
        with self.artifact.lock():
            self.paths = self._open_manifest()
            missing = {n: self.paths[n] for n in mine if not self._is_complete(n)}
            self._check_room(missing)
            self.builders = {
                number: DatastoreBuilder(
                    place,
                    placement.size(number),
                    dim,
                    dtype,
                    vocab_size,
                    made_from,
                    local[numbers == number],
                    placement.described(number),
                )
                for number, place in missing.items()
            }
        self.n_rows = sum(placement.size(number) for number in mine)
        """Rows to write, masked ones included."""
        self.n_complete = self.n_rows - sum(map(placement.size, missing))
        """Those in shards that were complete before."""

    def _open_manifest(self) -> list[Path]:
        """Where the shards are; writes the manifest if it is missing."""
        if not self.artifact.exists():
            count = self.placement.shards
            shards = [{"path": shard_name(number, count)} for number in range(count)]
            self.artifact.write({**self.fields, "shards": shards}, complete=False)
        found = self.artifact.read()
        if found["complete"]:
            raise InputError(f"{self.path}: already holds a complete datastore; expected none")
        count = len(found.get("shards", [1]))
        refuse_mismatch(self.path, {"shards": count}, {"shards": self.placement.shards})
        refuse_mismatch(self.path, found["made_from"], self.fields["made_from"])
        refuse_mismatch(self.path, found, self.fields)
        self.shards = found["shards"]
        return shard_paths(self.path, found)

    def _is_complete(self, number: int) -> bool:
        """Whether a shard is there already.

        Raises:
            InputError: it is another one than this command would write.
        """
        if not Datastore.is_complete(self.paths[number]):
            return False
        found = Datastore.open(self.paths[number])
        check_shard(found.path, found.manifest, self.fields, self.placement.described(number))
        return True

    def _check_room(self, shards: dict[int, Path]) -> None:
        """Before any shard takes its room: several may lie on one disk."""
        needed = {}
        for number, place in shards.items():
            place.mkdir(parents=True, exist_ok=True)
            if not artifact_of(place).exists():
                fields = {**self.fields, "rows": self.placement.size(number)}
                needed[place] = bytes_of(layouts_while_written(fields).values())
        check_room(needed, FORMAT.kind, ADVICE)

    @property
    def n_written(self) -> int:
        """Rows that are safely on disk, masked ones included."""
        return self.n_complete + sum(builder.n_written for builder in self.builders.values())

    def is_written(self, rows: np.ndarray) -> bool:
        """Whether all of these rows that are to be written are on disk already."""
        return all(
            self.builders[number].is_written(local) for number, local, _ in self._by_shard(rows)
        )

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Rows of the whole that are to be written: the number of a shard, the rows in it, and
        which of those given they are, bool."""
        numbers, local = self.placement.locate(rows)
        for number in np.unique(numbers).tolist():
            if number in self.builders:
                here = numbers == number
                yield number, local[here], here

    def is_wanted(self) -> np.ndarray:
        """Which rows of the whole are to be written, bool `[N]`."""
        placement = self.placement
        blocks = np.arange(-(-placement.rows // placement.block_rows))
        mine = np.isin(blocks % placement.shards, list(self.builders))
        return np.repeat(mine, placement.block_rows)[: placement.rows]

    def write(self, rows: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """Stores keys `[n, d]` and values `[n]` at rows int64 `[n]` of the whole; see
        `DatastoreBuilder.write`."""
        for number, local, here in self._by_shard(rows):
            self.builders[number].write(local, keys[here], values[here])

    def sync(self) -> None:
        """Brings to disk what was written, then marks it as written."""
        for builder in self.builders.values():
            builder.sync()

    def finish(self) -> Datastore:
        """Marks the shards complete, once, after every process has called `sync`; and the whole,
        once all its shards are.

        Returns:
            the whole; the shard alone if only one was to be written.
        """
        for builder in self.builders.values():
            builder.finish()
        with self.artifact.lock():
            if Datastore.is_complete(self.path):
                self.artifact.write({**self.fields, "shards": self.shards}, complete=True)
        return Datastore.open(self.path if self.only is None else self.paths[self.only])


def new_datastore(
    path: Path | str,
    rows: int,
    dim: int,
    dtype: str,
    vocab_size: int,
    made_from: dict[str, Any],
    masked: np.ndarray,
    shards: int = 1,
    kind: Kind = "contiguous",
    only: int | None = None,
    block_rows: int = BLOCK_ROWS,
) -> DatastoreBuilder | ShardedBuilder:
    """What writes a datastore of some number of shards; one is an ordinary datastore.

    Args:
        path, rows, dim, dtype, vocab_size, made_from, masked: see `DatastoreBuilder`.
        shards, kind, block_rows: see `Placement.deal`.
        only: write this shard alone.
    """
    if shards == 1 and only is None:
        return DatastoreBuilder(path, rows, dim, dtype, vocab_size, made_from, masked)
    placement = Placement.deal(rows, shards, kind, block_rows)
    return ShardedBuilder(path, placement, dim, dtype, vocab_size, made_from, masked, only)
