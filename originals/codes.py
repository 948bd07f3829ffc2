"""Quantised features of the original GNN-LM, used in place: raw codes and the faiss codec that made
them."""

import math
import os
from pathlib import Path

import numpy as np

from neighborlm.common.errors import InputError
from neighborlm.retrieval.neighbors.codec import (
    HELD,
    IMPORTED,
    KIND,
    VERSION,
    Codes,
    FeatureCodec,
    codes_path,
    open_codes,
    source_of,
)
from neighborlm.retrieval.store.arrays import data_offset
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.manifest import refuse_mismatch, write_manifest


def import_codes(datastore: Datastore, source: Path, quantizer: Path) -> Codes:
    """Takes over codes of the original program, in place; `open_codes` then finds them under
    `imported`.

    Args:
        datastore: whose keys were encoded; the manifest is written there.
        source: uint8 `[N, M]`, a raw map or a `.npy` file.
        quantizer: the faiss codec that made them.

    Raises:
        InputError: a file is missing, sizes differ from the datastore's or the codec's, or faiss
            alone could decode them.
    """
    codec = FeatureCodec.read(quantizer)
    refuse_mismatch(quantizer, {"dim": codec.dim}, {"dim": datastore.dim})
    try:
        codec.decoder_arrays()
    except InputError as error:
        raise InputError(f"{quantizer}: {error}") from None
    if not source.is_file():
        raise InputError(f"{source}: no such file; expected the original program's codes")
    shape = (len(datastore), codec.code_size)
    offset = data_offset(source, math.prod(shape), f"uint8 {list(shape)}")
    rows, keys = datastore.sample(HELD, seed=1)
    codes = np.memmap(source, np.uint8, "r", offset, shape)
    path = codes_path(datastore.path, IMPORTED)
    fields = {
        "factory": IMPORTED,
        **source_of(datastore.manifest),
        "code_size": codec.code_size,
        "relative_error": codec.relative_error(keys, codes[rows]),
        "raw": {
            "codes": {"path": os.path.relpath(source, path.parent), "offset": offset},
            "codec": {"path": os.path.relpath(quantizer, path.parent)},
        },
        "complete": True,
    }
    write_manifest(path, KIND, VERSION, fields)
    return open_codes(datastore, IMPORTED)
