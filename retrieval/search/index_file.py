"""Opens index files of faiss, and tries them out.

Faiss believes the counts and numbers that it finds in a file: a damaged or malicious one ends the
process that reads it, or makes it read what is not there. So a file of unknown contents is tried
out first by a process of its own, `python index_file.py FILE`, which imports nothing but faiss.
"""

import contextlib
import os
import sys
from pathlib import Path

import faiss
import numpy as np

SPARE_BYTES = 4 << 30
"""Memory that a trial takes, at most, besides three times the size of the files."""


def list_file_of(path: Path) -> Path:
    """Where an index that was built in parts has its lists."""
    return path.with_name(f"{path.name}.lists")


def files_of(path: Path) -> list[Path]:
    """All files of an index, by the path of the first."""
    return [path, *filter(Path.is_file, [list_file_of(path)])]


def open_file(path: Path) -> faiss.Index:
    """Opens an index file, memory-mapped where its type allows.

    Lists in a file of their own are those that lie beside the index: the path that it holds may be
    where it was copied from. Only where there are none that path is followed.

    Raises:
        RuntimeError: not a faiss index.
    """
    beside = faiss.IO_FLAG_ONDISK_SAME_DIR
    flags = faiss.IO_FLAG_READ_ONLY
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | flags)
    lists = _on_disk(index)
    if lists is not None and lists.ptr is None:
        # Faiss maps lists in a file of their own without `IO_FLAG_MMAP`.
        name = lists.filename
        if list_file_of(path).is_file() or path.with_name(Path(name).name).is_file():
            flags |= beside
        elif Path(name).parent == Path() or not Path(name).is_file():
            raise RuntimeError(f"its lists are missing, {path.with_name(Path(name).name)}")
        index = faiss.read_index(str(path), flags)
        lists = _on_disk(index)
        found = Path(lists.filename).stat().st_size
        if found != lists.totsize:
            raise RuntimeError(
                f"{lists.filename} has {found} bytes, but {lists.totsize} were written"
            )
    return index


def _on_disk(index: faiss.Index) -> faiss.OnDiskInvertedLists | None:
    ivf = faiss.try_extract_index_ivf(index)
    lists = None if ivf is None else faiss.downcast_InvertedLists(ivf.invlists)
    return lists if isinstance(lists, faiss.OnDiskInvertedLists) else None


def try_out(path: Path) -> None:
    """Opens an index and uses it.

    Raises:
        ValueError: it has numbers that cannot be right.
    """
    size = sum(file.stat().st_size for file in files_of(path))
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        limit = 3 * size + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    index = open_file(path)
    lists = _on_disk(index)
    if lists is not None:
        size = max(size, lists.totsize)
    if not (0 <= index.ntotal <= size and 0 < index.d <= size):
        raise ValueError(f"says that it has {index.ntotal:,} keys of width {index.d}")
    one = np.linspace(-1, 1, index.d, dtype=np.float32)[None]
    ivf = faiss.try_extract_index_ivf(index)
    if index.ntotal == 0:
        if ivf is None:  # a codec
            index.sa_decode(index.sa_encode(one))
        return
    if ivf is not None:
        _check_lists(ivf)
    index.search(one, 1)


def _check_lists(ivf: faiss.IndexIVF) -> None:
    """Raises ValueError unless every number of a key stands in the lists once."""
    lists = ivf.invlists
    if lists.nlist != ivf.nlist or ivf.quantizer.ntotal != ivf.nlist:
        raise ValueError(f"says that it has {ivf.nlist} lists, but there are {lists.nlist}")
    sizes = [lists.list_size(number) for number in range(ivf.nlist)]
    if sum(sizes) != ivf.ntotal:
        raise ValueError(f"says that it has {ivf.ntotal:,} keys, but its lists {sum(sizes):,}")
    seen = np.zeros(ivf.ntotal, dtype=bool)
    for number in np.flatnonzero(sizes).tolist():
        pointer = lists.get_ids(number)
        ids = faiss.rev_swig_ptr(pointer, sizes[number])
        if ids.min() < 0 or ids.max() >= ivf.ntotal:
            raise ValueError(
                f"has keys of number {ids.min()} to {ids.max()}; expected 0 to {ivf.ntotal - 1}"
            )
        seen[ids] = True
        lists.release_ids(number, pointer)
    if not seen.all():
        raise ValueError(f"has no key of number {int(np.argmin(seen))}, and another one twice")


if __name__ == "__main__":
    try:
        try_out(Path(sys.argv[1]))
    except Exception as error:
        print(str(error).strip() or type(error).__name__, file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
