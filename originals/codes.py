"""Quantised features of the original GNN-LM, read in place: raw codes and the faiss codec that
encoded them."""

from pathlib import Path

import numpy as np

from neighborlm.common.digests import path_from
from neighborlm.common.errors import InputError
from neighborlm.retrieval.neighbors.codec import (
    HELD,
    IMPORTED,
    Codes,
    FeatureCodec,
    artifact_of,
    open_codes,
    source_of,
)
from neighborlm.retrieval.store.arrays import Layout, map_raw
from neighborlm.retrieval.store.artifact import refuse_mismatch
from neighborlm.retrieval.store.datastore import Datastore


def import_codes(datastore: Datastore, source: Path, quantizer: Path) -> Codes:
    """Registers codes of the original program, in place, so that `open_codes` finds them as
    `imported`.

    Args:
        datastore: the one whose keys were encoded; the manifest is written there.
        source: uint8 `[N, M]`, a raw map or a `.npy` file.
        quantizer: the faiss codec that encoded them.

    Raises:
        InputError: a file is missing, its size does not fit the datastore or the codec, or the
            codec is of a kind that only faiss can decode.
    """
    codec = FeatureCodec.read(quantizer)
    refuse_mismatch(quantizer, {"dim": codec.dim}, {"dim": datastore.dim})
    try:
        codec.decoder_arrays()
    except InputError as error:
        raise InputError(f"{quantizer}: {error}") from None
    if not source.is_file():
        raise InputError(f"{source}: no such file; expected codes of the original program")
    codes, offset = map_raw(source, Layout(np.dtype(np.uint8), (len(datastore), codec.code_size)))
    rows, keys = datastore.sample(HELD, seed=1)
    artifact = artifact_of(datastore.path, IMPORTED)
    fields = {
        "factory": IMPORTED,
        **source_of(datastore.manifest),
        "code_size": codec.code_size,
        "relative_error": codec.relative_error(keys, codes[rows]),
        "raw": {
            "codes": {"path": path_from(datastore.path, source), "offset": offset},
            "codec": {"path": path_from(datastore.path, quantizer)},
        },
    }
    with artifact.lock():
        artifact.write(fields, complete=True, files=[source, quantizer])
    return open_codes(datastore, IMPORTED)
