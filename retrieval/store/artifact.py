"""The one way in which products lie on disk: datastores, indexes, neighbour tables, codes, caches.

A product is some files and a manifest in JSON, which says what they are, what they were made from,
whether they are complete, and the digests of the files and of the manifest itself, with which they
are compared when the product is opened (see `common.digests`; products of earlier versions have
none). One process makes it for all, under a lock. Files appear complete, see `publishing`, or are
filled row by row up to a mark, from which a killed run goes on. A product that was made from other
inputs than those at hand is refused in one sentence that names both.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from filelock import Timeout

from neighborlm.common.digests import (
    ALGORITHM,
    check_digests,
    digests_of,
    keep_stamps,
    stamps_of,
)
from neighborlm.common.errors import InputError
from neighborlm.common.files import Lock, write_whole
from neighborlm.common.names import named, names_in, recall
from neighborlm.retrieval.store.arrays import Layout, make_room, open_array

SYNC_SECONDS = 10.0
"""How often what was filled is brought to disk and marked as done."""


class Format(NamedTuple):
    """What all products of a kind have in common.

    Attributes:
        kind: what they are, e.g. "datastore".
        version: the newest that is understood, and the one that is written.
        required: fields that every manifest has.
        libraries: modules whose versions decide the content; manifests record them.
    """

    kind: str
    version: int = 1
    required: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """One product, whether it is there or not.

    Attributes:
        format: what kind it is.
        manifest: the JSON file; all else lies beside it.
        name: what messages call it.
    """

    format: Format
    manifest: Path
    name: Path

    @classmethod
    def folder(cls, format: Format, path: Path) -> "Artifact":
        """A product that is all of a folder."""
        return cls(format, path / "manifest.json", path)

    @classmethod
    def file(cls, format: Format, path: Path) -> "Artifact":
        """A product that is a file with a manifest beside it."""
        return cls(format, path.with_name(f"{path.name}.json"), path)

    # -- reading -------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether it was begun."""
        return self.manifest.is_file()

    def is_complete(self, expected: Mapping[str, Any] | None = None) -> bool:
        """Whether it is there.

        Args:
            expected: what it must have been made from.

        Raises:
            InputError: the manifest cannot be read, or it is made from something else.
        """
        if not self.exists():
            return False
        manifest = self.read()
        refuse_mismatch(self.name, manifest, expected or {})
        return _is_complete(manifest)

    def read(self) -> dict[str, Any]:
        """The manifest, of a product in any state.

        Raises:
            InputError: missing, not JSON, incomplete, of another kind or a newer version.
        """
        path, format = self.manifest, self.format
        expected = f"expected the manifest of a {format.kind}"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; {expected}") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise InputError(f"{path}: is not JSON; {expected}") from None
        if not isinstance(manifest, dict) or manifest.get("kind") != format.kind:
            found = manifest.get("kind") if isinstance(manifest, dict) else manifest
            raise InputError(f"{path}: describes {found!r}; {expected}")
        version = manifest.get("version")
        if not isinstance(version, int) or version > format.version:
            raise InputError(
                f"{path}: has format version {version}; this program reads up to {format.version}"
            )
        missing = [field for field in format.required if field not in manifest]
        if missing:
            raise InputError(f"{path}: lacks {', '.join(missing)}; {expected}")
        digest = manifest.pop("digest", None)
        if digest != _digest_of(manifest) and (digest is not None or "files" in manifest):
            raise InputError(f"{path}: is damaged, it is not what was written; {self.advice}")
        recall(manifest.get("names"))
        return manifest

    def open(self, expected: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The manifest of a complete product.

        Args:
            expected: what it must have been made from.

        Raises:
            InputError: as `read`, or it is unfinished, made from something else, or damaged.
        """
        manifest = self.read()
        refuse_mismatch(self.name, manifest, expected or {})
        if not _is_complete(manifest):
            raise InputError(f"{self.name}: is unfinished; repeat the command that was writing it")
        check_digests(self.manifest.parent, manifest.get("files", {}), self.stamps, self.advice)
        return manifest

    def says(self, fields: Mapping[str, Any]) -> bool:
        """Whether it was begun and its manifest holds all of these fields."""
        if not self.exists():
            return False
        return as_read(fields).items() <= self.read().items()

    def verify(self) -> None:
        """Reads all files of a complete product, whatever their stamps are.

        Raises:
            InputError: one is damaged, or it has no digests.
        """
        manifest = self.open()
        if "files" not in manifest:
            raise InputError(
                f"{self.name}: was made without checksums; expected those of its files"
            )
        folder = self.manifest.parent
        check_digests(folder, manifest["files"], self.stamps, self.advice, all_of_them=True)

    @property
    def stamps(self) -> Path:
        """Of files that have been compared with their digests, see `common.digests`."""
        return self.manifest.with_name(f".{self.manifest.stem}.stamps")

    @property
    def advice(self) -> str:
        """What can be done where it is damaged."""
        return f"bring back a copy, or remove {self.manifest} to have it made again"

    # -- making --------------------------------------------------------------------------------

    def lock(self) -> Lock:
        """To be held by whoever makes it."""
        return Lock(self.manifest.with_name(f".{self.manifest.stem}.lock"))

    def write(self, fields: Mapping[str, Any], complete: bool, files: Iterable[Path] = ()) -> None:
        """Writes the manifest: a reader sees the old one or the new one.

        Args:
            fields: what it says beside its kind, version, command and libraries, or in their place.
            complete: whether all that it describes is on disk.
            files: that get digests, which are read for them.
        """
        stamps = stamps_of(files)
        libraries = ("neighborlm", *self.format.libraries)
        manifest = {
            "kind": self.format.kind,
            "version": self.format.version,
            "command": sys.argv,
            "libraries": {name: _version_of(name) for name in libraries},
            "names": names_in(fields),
            **fields,
            "complete": complete,
        }
        digests = digests_of(self.manifest.parent, stamps)
        if digests:
            manifest["files"] = digests
        manifest["digest"] = _digest_of(as_read(manifest))
        write_whole(self.manifest, json.dumps(manifest, indent=1))
        expected = dict(zip(stamps, (said[ALGORITHM] for said in digests.values()), strict=True))
        keep_stamps(self.stamps, stamps, expected)

    def fill(
        self,
        fields: Mapping[str, Any],
        layouts: Mapping[str, Layout],
        step: int,
        compute: Callable[[int, int], tuple[np.ndarray, ...]],
        report: Callable[[int, int], None] = lambda *_: None,
        beside: Iterable[Path] = (),
    ) -> None:
        """Fills arrays from the first row to the last, and goes on where a killed run stopped.

        Rows up to the manifest's `done` are on disk. Blocks begin at multiples of `step` also in a
        run that goes on, so a result that depends on what is computed together stays the same.

        Args:
            fields: of the manifest, `rows` among them.
            layouts: of each array, by the name of its file beside the manifest.
            step: rows to compute at once.
            compute: from the first row and the one after the last to a block for each array.
            report: called with how many rows are done, and how many there are.
            beside: other files of the product, which are there.

        Raises:
            InputError: the disk has no room, or a file is not what it was begun as.
        """
        folder = self.manifest.parent
        if not self.exists():
            make_room(folder, layouts, self.format.kind, "make room or choose a smaller one")
            self.write({**fields, "done": 0}, complete=False)
        found = self.read()
        if _is_complete(found):
            return
        arrays = [open_array(folder / name, layout, "r+") for name, layout in layouts.items()]
        rows = fields["rows"]
        done = found["done"] // step * step
        last_sync = time.perf_counter()

        def sync() -> None:
            for array in arrays:
                array.flush()
            self.write({**fields, "done": done}, complete=False)

        report(done, rows)
        try:
            for first in range(done, rows, step):
                last = min(first + step, rows)
                for array, block in zip(arrays, compute(first, last), strict=True):
                    array[first:last] = block
                done = last
                report(done, rows)
                if time.perf_counter() - last_sync > SYNC_SECONDS:
                    sync()
                    last_sync = time.perf_counter()
        finally:
            sync()
        files = [*(folder / name for name in layouts), *beside]
        self.write({**fields, "done": rows}, complete=True, files=files)


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Some kinds had no such field up to version 0.1, and a manifest only once they were."""
    return manifest.get("complete", True)


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(manifest, sort_keys=True).encode())


@cache
def _version_of(module: str) -> str:
    return import_module(module).__version__


def as_read(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as a manifest gives them back: tuples are lists there."""
    return json.loads(json.dumps(fields))


def refuse_mismatch(
    name: Path | str,
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    advice: str = "use a matching one or another place",
) -> None:
    """Compares what a product was made from with what is at hand.

    Args:
        name: of the product.
        found: what its manifest says.
        expected: what is at hand; only these keys are compared.
        advice: what to do.

    Raises:
        InputError: one sentence that names the first difference and both sides of it.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise InputError(
                f"{name}: its {key.replace('_', ' ')} is {named(found.get(key))}, "
                f"but {named(value)} is expected here; {advice}"
            )


# -- work that several processes share -----------------------------------------------------------


class Job(NamedTuple):
    """Making one product.

    Attributes:
        lock: held while it is made.
        is_done: whether it is there. What is there needs no lock, so it may lie where nobody can
            write.
        work: makes it.
    """

    lock: Lock
    is_done: Callable[[], bool]
    work: Callable[[], None]


def share_out(jobs: Sequence[Job]) -> None:
    """Has each done by whichever process comes to it first, and returns when all are done."""
    for wait in (0, -1):  # for one that another process is at, once there is no other
        for job in jobs:
            if job.is_done():
                continue
            with suppress(Timeout), job.lock.acquire(timeout=wait):
                if not job.is_done():
                    job.work()
