"""Whether files are still what was written: digests, and stamps of files that have been compared
with theirs.

Small files are compared whenever a program opens them. Large ones take time to read: they are
compared when their stamp (size, times and inode) is not the one of the last comparison, as after
they were copied, moved or changed. Stamps lie in a hidden file beside the product or, where nobody
can write there, in the user's cache.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import xxhash

from neighborlm.common.errors import InputError
from neighborlm.common.files import digest_of, write_whole
from neighborlm.common.progress import progress_bars

ALGORITHM = "xxh3_64"
SMALL_BYTES = 1 << 20
"""Largest file that is read at every opening."""
SHOWN_BYTES = 1 << 30
"""Smallest amount whose reading shows a progress bar."""
BUFFER_BYTES = 1 << 20
Verify = Literal["always", "changed", "never"]
"""When files are compared with their digests: whenever a process first opens them; large ones only
where they have changed since the last time; or never, but for their sizes."""
Stamp = tuple[int, int, int, int]
"""Size, times of the last change of content and of status, and inode of a file."""

_verify: Verify = "changed"
_compared: set[tuple[str, str, Stamp, str]] = set()
"""Files that this process has compared: where their stamps are, which, and with what."""


def set_verification(verify: Verify) -> None:
    """Sets when this process compares files with their digests."""
    global _verify
    _verify = verify
    _compared.clear()


@contextmanager
def verification(verify: Verify) -> Iterator[None]:
    """`set_verification` while the body runs."""
    before = _verify
    set_verification(verify)
    try:
        yield
    finally:
        set_verification(before)


# -- digests -------------------------------------------------------------------------------------


def digest_of_file(path: Path, report: Callable[[int], None] = lambda _: None) -> str:
    """XXH3 of a file's bytes, in hexadecimal: several times as fast as disks.

    Args:
        report: called with how many more bytes are read.
    """
    digest, buffer = xxhash.xxh3_64(), memoryview(bytearray(BUFFER_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            report(count)
    return digest.hexdigest()


def digests_of(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What a description of a product says of its files: `bytes` and `xxh3_64` by the path from the
    folder, so that the folder can be moved."""
    return {
        path_from(folder, path): {
            "bytes": path.stat().st_size,
            ALGORITHM: digest_of_file(path),
        }
        for path in paths
    }


def check_digests(
    folder: Path,
    described: Mapping[str, Mapping[str, Any]],
    stamps: Path,
    advice: str,
    all_of_them: bool = False,
) -> None:
    """Refuses files that are not what was written; which of them are read, `compare_once` says.

    Args:
        folder: that the paths begin in.
        described: see `digests_of`.
        stamps, all_of_them: see `compare_once`.
        advice: what can be done about a damaged file.

    Raises:
        InputError: one is missing, or has another size or digest; names it.
    """
    files = {folder / name: expected for name, expected in described.items()}
    for path, expected in files.items():
        found = path.stat().st_size if path.is_file() else None
        if found != expected["bytes"]:
            has = "is missing" if found is None else f"has {found} bytes"
            raise InputError(f"{path}: {has}, but {expected['bytes']} were written; {advice}")

    def compare(changed: Sequence[Path]) -> None:
        total, done = sum(files[path]["bytes"] for path in changed), 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            report("verifying", done, total)

        bars = nullcontext(lambda *_: None)
        if total >= SHOWN_BYTES:
            bars = progress_bars(str(changed[0]), transient=True)
        with bars as report:
            for path in changed:
                found, expected = digest_of_file(path, count), files[path].get(ALGORITHM)
                if found != expected:
                    raise InputError(
                        f"{path}: is damaged: its checksum is {found}, but what was written had "
                        f"{expected}; {advice}"
                    )

    expected = {path: said.get(ALGORITHM, "") for path, said in files.items()}
    compare_once(stamps, expected, compare, all_of_them)


def path_from(folder: Path, path: Path) -> str:
    """How a description in a folder names a file, so that both can be moved together and the folder
    may be reached by a link."""
    return path.name if path.parent == folder else os.path.relpath(path.resolve(), folder.resolve())


# -- stamps --------------------------------------------------------------------------------------


def compare_once(
    stamps: Path,
    files: Mapping[Path, str],
    compare: Callable[[Sequence[Path]], None],
    all_of_them: bool = False,
    small_bytes: int = SMALL_BYTES,
) -> None:
    """Compares files with what was written, if `set_verification` and their stamps ask for it, and
    remembers that they were.

    Args:
        stamps: hidden file that keeps the stamps of the product.
        files: that exist, and what each is to be compared with, such as a digest.
        compare: gets those that must be read; raises where one is damaged.
        all_of_them: whatever `set_verification` says.
        small_bytes: largest file whose stamp is not kept.
    """
    if _verify == "never" and not all_of_them:
        return
    kept = _read_stamps(stamps) if _verify == "changed" else {}
    found = stamps_of(files)

    def is_known(path: Path, stamp: Stamp) -> bool:
        if all_of_them:
            return False
        if (str(stamps), str(path), stamp, files[path]) in _compared:
            return True
        last = kept.get(path_from(stamps.parent, path))
        return stamp[0] > small_bytes and last == [*stamp, files[path]]

    changed = [path for path, stamp in found.items() if not is_known(path, stamp)]
    if changed:
        compare(changed)
        keep_stamps(stamps, {path: found[path] for path in changed}, files, small_bytes)


def stamps_of(files: Iterable[Path]) -> dict[Path, Stamp]:
    """The stamps of some files, to be taken before these are read."""
    stats = {path: path.stat() for path in files}
    return {p: (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for p, s in stats.items()}


def keep_stamps(
    stamps: Path,
    found: Mapping[Path, Stamp],
    files: Mapping[Path, str],
    small_bytes: int = SMALL_BYTES,
) -> None:
    """Remembers that files with these stamps are what was written; where that cannot be kept, the
    next program that opens them reads them again. See `compare_once`."""
    _compared.update((str(stamps), str(path), stamp, files[path]) for path, stamp in found.items())
    large = {
        path_from(stamps.parent, path): [*stamp, files[path]]
        for path, stamp in found.items()
        if stamp[0] > small_bytes
    }
    if not large:
        return
    content = json.dumps({**_read_stamps(stamps), **large})
    for place in (stamps, _in_cache(stamps)):
        with suppress(OSError):
            if place != stamps:
                place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, content)
            return


def _read_stamps(stamps: Path) -> dict[str, list[int | str]]:
    found = {}
    for place in (_in_cache(stamps), stamps):
        with suppress(OSError, ValueError, TypeError):
            found.update(json.loads(place.read_bytes()))
    return found


def _in_cache(stamps: Path) -> Path:
    """Where stamps are kept that cannot lie beside their product."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "neighborlm" / "stamps" / f"{digest_of(os.path.abspath(stamps))}.json"
