"""The numbers in a factory string are checked before faiss sees them: a zero in the wrong place
ends the process, and too large a number takes minutes, or all memory, before faiss says so."""

import re
import sys

import faiss

from neighborlm.common.errors import InputError

NUMBER = re.compile(r"([A-Za-z]*)(\d+)")
BOUNDS = {
    "x": (1, 16),  # bits of a code, each more doubles the centroids
    "HNSW": (2, 1024),
    "NSG": (16, 1024),
    "SQ": (4, 8),
    "IVF": (1, 2**31 - 1),
    "": (1, 2**16),
}
"""The least and the largest number behind each name; "" is for all other names."""
BITS_OF_SQ = (4, 6, 8)
REDUCTIONS = re.compile(r"PCAW?R?|ITQ|LSH")
"""Transforms that give at most as many dimensions as they get."""
KEYS_A_LIST = 10
"""Fewer keys in a list, on average, are said to be too few."""


def check_factory(factory: str, dim: int, named: str = "--knn.index") -> None:
    """Refuses numbers in a faiss factory string that faiss cannot work with.

    Args:
        dim: width of the keys.
        named: what names it, for the message.

    Raises:
        InputError: there is such a number.
    """
    for found in NUMBER.finditer(factory):
        name, number = found[1], int(found[2])
        least, most = BOUNDS.get(name, BOUNDS[""])
        if found.start() == 0 and REDUCTIONS.fullmatch(name):
            most = dim
        fits = least <= number <= most and (name != "SQ" or number in BITS_OF_SQ)
        if not fits:
            expected = f"{least} to {most}" if name != "SQ" else "4, 6 or 8"
            raise InputError(
                f"{named} {factory!r}: expected {expected} in the place of the {number} in "
                f"{found[0]}"
            )


def lists_of(factory: str) -> int:
    """Inverted lists of an index; 0 where it has none.

    >>> lists_of("OPQ16_64,IVF4096_HNSW32,PQ16"), lists_of("IMI2x8,PQ16"), lists_of("HNSW32")
    (4096, 65536, 0)
    """
    if found := re.search(r"(?:^|,)IVF(\d+)", factory):
        return int(found[1])
    if found := re.search(r"(?:^|,)IMI2x(\d+)", factory):
        return 4 ** int(found[1])
    return 0


def check_lists(factory: str, lists: int, n_keys: int) -> None:
    """Refuses more inverted lists than keys.

    Raises:
        InputError: there are more.
    """
    if lists > n_keys:
        raise InputError(
            f"--knn.index {factory} has {lists:,} lists but the datastore only {n_keys:,} keys; "
            "choose fewer lists"
        )


def warn_of_lists(factory: str, lists: int, n_keys: int) -> None:
    """Says, before they are trained, that most lists would hold next to nothing."""
    if lists * KEYS_A_LIST > n_keys:
        most = max(n_keys // KEYS_A_LIST, 1)
        print(
            f"warning: --knn.index {factory}: {lists:,} lists for {n_keys:,} keys leave "
            f"{n_keys / lists:.1f} to a list: training takes long, and a query finds few keys in "
            f"the --knn.nprobe lists that it visits; {most:,} lists or fewer are better, and auto "
            "chooses",
            file=sys.stderr,
        )


def hush_training(index: faiss.Index) -> None:
    """Has faiss not write on stderr, when it trains an index, that it would rather have 39 keys a
    centroid: `warn_of_lists` says where there are too few."""
    index = faiss.downcast_index(index)
    for owner in (index, *(getattr(index, name, None) for name in ("pq", "rq", "lsq"))):
        if hasattr(owner, "cp"):
            owner.cp.min_points_per_centroid = 1
    for name in ("index", "base_index", "refine_index", "quantizer", "storage"):
        if isinstance(part := getattr(index, name, None), faiss.Index):
            hush_training(part)
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            before = faiss.downcast_VectorTransform(index.chain.at(number))
            if isinstance(before, faiss.OPQMatrix):
                before.pq = faiss.ProductQuantizer(before.d_out, before.M, 8)  # as it would make
                before.pq.cp.min_points_per_centroid = 1
