"""Feature codecs: the datastore's keys in a few bytes each, for the graph network of a GNN-LM (Meng
et al., ICLR 2022, section 2.3), which reads hundreds of them for every token.

`codes-<codec>.npy` [N, M] uint8 lies beside the keys, with the trained faiss codec as
`codes-<codec>.faiss` and `codes-<codec>.json` as the manifest. Of a datastore in shards each shard
has the codes of its own rows and a manifest, and the codec lies with one in the directory of the
whole. What decodes them without faiss is `Codes.decoder_arrays`.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from neighborlm.common.errors import InputError, raise_no_memory
from neighborlm.common.files import digest_of, publishing
from neighborlm.common.progress import Report
from neighborlm.retrieval.search.factory import check_factory, hush_training
from neighborlm.retrieval.search.index import write_index
from neighborlm.retrieval.search.index_check import check_file, is_sound
from neighborlm.retrieval.search.retriever import faiss_reason
from neighborlm.retrieval.store.arrays import Layout, open_array, open_raw
from neighborlm.retrieval.store.artifact import (
    Artifact,
    Format,
    Job,
    refuse_mismatch,
    share_out,
)
from neighborlm.retrieval.store.datastore import BLOCK_BYTES, Datastore, fingerprint_of
from neighborlm.retrieval.store.shards import ShardedArray

FIELDS = ("complete", "rows", "dim", "code_size", "datastore")
FORMAT = Format("set of feature codes", 1, FIELDS, ("faiss", "numpy"))
SAMPLE, HELD = 65536, 8192
"""Keys to train on, and to measure the error on; where there are fewer, in the same proportion."""
IMPORTED = "imported"
"""What `open_codes` calls the codes of the original program."""
DECODABLE = "PQ with 8 bits or SQ8, alone or behind orthonormal rotations and projections"


class FeatureCodec:
    """A trained faiss codec.

    Args:
        codec: an index that serves as a standalone codec; nothing is added to it.
    """

    def __init__(self, codec: faiss.Index) -> None:
        self.codec = codec
        self.dim: int = codec.d
        self.code_size: int = codec.sa_code_size()

    @classmethod
    def train(cls, factory: str, sample: np.ndarray) -> "FeatureCodec":
        """Trains what a factory string names.

        Args:
            factory: of faiss, e.g. `OPQ16_128,PQ16` or `SQ8`.
            sample: fp32 `[n, d]`.

        Raises:
            InputError: faiss cannot make it, train it on so many vectors, or use it as a codec.
        """
        size, dim = sample.shape
        check_factory(factory, dim, "codec")
        try:
            codec = faiss.index_factory(dim, factory)
            hush_training(codec)
            quantizer = _parts(codec)[1]
            if isinstance(quantizer, faiss.IndexPQ):
                # It would number the centroids anew for Hamming distances, seconds for each byte.
                quantizer.do_polysemous_training = False
            codec.train(sample)
            codec.sa_decode(codec.sa_encode(sample[:1]))
        except RuntimeError as error:
            raise InputError(
                f"codec {factory!r}: expected a faiss factory string of a codec that {size:,} keys "
                f"of width {dim} can train ({faiss_reason(error)})"
            ) from None
        return cls(codec)

    @classmethod
    def read(cls, path: Path) -> "FeatureCodec":
        """Opens a codec that was written.

        Raises:
            InputError: missing, or not a faiss codec.
        """
        check_file(path, "codec")
        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            raise_no_memory(error)
            raise InputError(f"{path}: cannot be read as a codec ({faiss_reason(error)})") from None

    def write(self, path: Path) -> None:
        """Writes it so that a reader sees all of it or nothing."""
        with publishing(path) as making:
            write_index(self.codec, making)
        is_sound(path)

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """fp32 `[n, d]` to uint8 `[n, code_size]`."""
        return self.codec.sa_encode(np.ascontiguousarray(vectors))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """uint8 `[n, code_size]` to fp32 `[n, d]`."""
        return self.codec.sa_decode(np.ascontiguousarray(codes))

    def relative_error(self, vectors: np.ndarray, codes: np.ndarray | None = None) -> float:
        """sum |x - x'|^2 / sum |x - mean|^2; 0 is perfect, and 1 no better than their mean.

        Args:
            vectors: fp32 `[n, d]`.
            codes: uint8 `[n, code_size]`; by default this codec's own.
        """
        decoded = self.decode(self.encode(vectors) if codes is None else codes)
        lost = np.square(vectors - decoded, dtype=np.float64).sum()
        return float(lost / np.square(vectors - vectors.mean(axis=0), dtype=np.float64).sum())

    def decoder_arrays(self) -> dict[str, np.ndarray]:
        """What decodes without faiss, all fp32.

        A code becomes y `[d_out]`, with PQ by `centroids` `[M, 256, d_out / M]`, of which code
        byte m chooses one for each m, and with SQ8 by `vmin` and `vdiff` `[d_out]`:
        y = vmin + vdiff (code + 0.5) / 255. Where the codec begins with linear transforms there
        are `A` `[d_out, d]` and `b` `[d_out]` too, and the vector is (y - b) A.

        Raises:
            InputError: another kind of codec, which faiss alone decodes.
        """
        transforms, quantizer = _parts(self.codec)
        arrays = _quantizer_arrays(quantizer)
        if not transforms:
            return arrays
        matrix, bias = np.eye(self.dim), np.zeros(self.dim)
        for transform in transforms:
            linear = isinstance(transform, faiss.LinearTransform)
            # A bias before a projection has a part that no bias after it can express.
            lost = transform.d_out < transform.d_in and bias.any()
            if not linear or not transform.is_orthonormal or lost:
                raise _not_decodable(transform)
            step = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
            matrix, bias = step @ matrix, step @ bias
            if transform.have_bias:
                bias += faiss.vector_to_array(transform.b)
        return {**arrays, "A": matrix.astype(np.float32), "b": bias.astype(np.float32)}


def _parts(codec: faiss.Index) -> tuple[list[faiss.VectorTransform], faiss.Index]:
    """Views of the transforms that a codec begins with and of the quantiser behind them."""
    codec = faiss.downcast_index(codec)
    if not isinstance(codec, faiss.IndexPreTransform):
        return [], codec
    chain = [faiss.downcast_VectorTransform(codec.chain.at(i)) for i in range(codec.chain.size())]
    return chain, faiss.downcast_index(codec.index)


def _quantizer_arrays(index: faiss.Index) -> dict[str, np.ndarray]:
    if isinstance(index, faiss.IndexPQ) and index.pq.nbits == 8:
        quantizer = index.pq
        centroids = faiss.vector_to_array(quantizer.centroids)
        return {"centroids": centroids.reshape(quantizer.M, quantizer.ksub, quantizer.dsub)}
    eight_bits = faiss.ScalarQuantizer.QT_8bit
    if isinstance(index, faiss.IndexScalarQuantizer) and index.sq.qtype == eight_bits:
        vmin, vdiff = faiss.vector_to_array(index.sq.trained).reshape(2, index.d)
        return {"vmin": vmin, "vdiff": vdiff}
    raise _not_decodable(index)


def check_codec(factory: str, dim: int) -> None:
    """Refuses, before anything is trained, what could not be decoded without faiss.

    Raises:
        InputError: not a factory string, or of another kind of codec.
    """
    check_factory(factory, dim, "codec")
    try:
        whole = faiss.index_factory(dim, factory)
    except RuntimeError as error:
        raise InputError(
            f"codec {factory!r}: expected a faiss factory string that suits dimension {dim} "
            f"({faiss_reason(error)})"
        ) from None
    codec = faiss.downcast_index(whole)
    if isinstance(codec, faiss.IndexPreTransform):
        codec = faiss.downcast_index(codec.index)
    product = isinstance(codec, faiss.IndexPQ) and codec.pq.nbits == 8
    scalar = isinstance(codec, faiss.IndexScalarQuantizer)
    if not product and not (scalar and codec.sq.qtype == faiss.ScalarQuantizer.QT_8bit):
        raise InputError(f"codec {factory!r}: expected {DECODABLE}")


def _not_decodable(part: faiss.Index | faiss.VectorTransform) -> InputError:
    bits = f" with {part.pq.nbits} bits" if isinstance(part, faiss.IndexPQ) else ""
    return InputError(f"the codec has a {type(part).__name__}{bits}; expected {DECODABLE}")


@dataclass(frozen=True)
class Codes:
    """The opened codes of a datastore.

    Attributes:
        path: their manifest, that of the whole where there are shards.
        manifest: what that says.
        codes: uint8 `[N, code_size]`, memory-mapped; zeros where the datastore has no key.
        codec: decodes them.
    """

    path: Path
    manifest: dict[str, Any]
    codes: np.ndarray | ShardedArray
    codec: FeatureCodec

    def decoder_arrays(self) -> dict[str, np.ndarray]:
        """See `FeatureCodec.decoder_arrays`."""
        return self.codec.decoder_arrays()


def codes_path(directory: Path, factory: str) -> Path:
    """Where the manifest of the codes of a factory string lies, in a datastore's directory."""
    return directory / f"codes-{re.sub(r'[^A-Za-z0-9.]+', '_', factory)}.json"


def artifact_of(directory: Path, factory: str) -> Artifact:
    """The codes of a factory string, in a datastore's directory, as a product."""
    path = codes_path(directory, factory)
    return Artifact(FORMAT, path, path)


def codec_files(datastore: Datastore, factory: str) -> tuple[Path, Path]:
    """The codec and its manifest, those of the whole where the datastore is a shard."""
    path = codes_path(_directory(datastore), factory)
    return path.with_suffix(".faiss"), path


def _directory(datastore: Datastore) -> Path:
    """Of the whole where the datastore is a shard."""
    return datastore.path if datastore.part is None else datastore.part.path


def _shards(datastore: Datastore) -> list[Datastore]:
    """Those whose codes are at hand; none where the datastore has none and is none."""
    return [datastore] if datastore.part is not None else datastore.shards()


def has_codes(datastore: Datastore, factory: str) -> bool:
    """Whether complete codes of a factory string are there, of all shards where there are any."""
    directories = [_directory(datastore), *(shard.path for shard in _shards(datastore))]
    return all(artifact_of(directory, factory).is_complete() for directory in directories)


def open_codes(datastore: Datastore, factory: str) -> Codes:
    """Opens the complete codes of a datastore.

    Args:
        datastore: whose keys were encoded.
        factory: of the codec, or `imported`.

    Raises:
        InputError: missing, unfinished, another datastore's, or the files are not what the
            manifest says.
    """
    codec_path, path = codec_files(datastore, factory)
    artifact = artifact_of(_directory(datastore), factory)
    manifest = artifact.open({"factory": factory, **source_of(datastore.whole)})
    layout = _layout(manifest["rows"], manifest["code_size"])
    shards = _shards(datastore)
    if "raw" in manifest:
        codes = open_raw(path, manifest["raw"]["codes"], layout)
        codec_path = path.parent / manifest["raw"]["codec"]["path"]
    elif shards:
        parts = [_open_part(shard, factory, manifest) for shard in shards]
        codes = parts[0]
        if datastore.part is None:
            codes = ShardedArray(parts, shards[0].part.placement)
    else:
        codes = open_array(path.with_suffix(".npy"), layout)
    codec = FeatureCodec.read(codec_path)
    found = {"dim": codec.dim, "code_size": codec.code_size}
    refuse_mismatch(codec_path, found, {key: manifest[key] for key in found})
    return Codes(path, manifest, codes, codec)


def _open_part(shard: Datastore, factory: str, whole: Mapping[str, Any]) -> np.ndarray:
    """The codes of one shard, which must be by the codec of the whole."""
    artifact_of(shard.path, factory).open(_identity_of_part(shard, whole))
    path = codes_path(shard.path, factory).with_suffix(".npy")
    return open_array(path, _layout(len(shard), whole["code_size"]))


def _layout(rows: int, code_size: int) -> Layout:
    return Layout(np.dtype(np.uint8), (rows, code_size))


def _identity(datastore: Datastore, factory: str, seed: int) -> dict[str, Any]:
    """What determines codes, and the codec of the whole where the datastore is a shard."""
    return {"factory": factory, "seed": seed, **source_of(datastore.whole)}


def _identity_of_part(shard: Datastore, whole: Mapping[str, Any]) -> dict[str, Any]:
    common = {name: whole.get(name) for name in ("factory", "seed", "codec", "code_size")}
    return {**common, **source_of(shard.manifest)}


def build_codes(
    datastore: Datastore,
    factory: str,
    seed: int = 1,
    report: Report = lambda *_: None,
) -> Codes:
    """Trains a codec on a sample of the keys and encodes them all; goes on where a killed run
    stopped, and only opens what is complete. Of several processes one encodes and the others wait
    for it; a datastore in shards is encoded shard by shard, each by whichever process comes to it
    first.

    Args:
        datastore: whose keys to encode; of a shard alone the codec is that of the whole.
        factory: faiss factory string, e.g. `OPQ16_128,PQ16`.
        seed: of the sample.
        report: called with a stage, how much of it is done, and how much there is.

    Raises:
        InputError: faiss cannot make the codec, codes of this name are there but made from
            something else, or the disk has no room.
    """
    shards = _shards(datastore)
    whole = artifact_of(_directory(datastore), factory)
    identity = _identity(datastore, factory, seed)

    def make_whole() -> None:
        fields, codec = build_codec(datastore, factory, seed, report)
        if not shards:
            _encode(datastore, whole, factory, fields, codec, partial(report, "encoding"))

    def job_of(number: int, fields: Mapping[str, Any], codec: FeatureCodec) -> Job:
        shard, told = shards[number], partial(report, f"encoding, shard {number}")
        part = artifact_of(shard.path, factory)
        fields = _identity_of_part(shard, fields)
        return Job(
            part.lock(),
            lambda: part.is_complete(fields),
            lambda: _encode(shard, part, factory, fields, codec, told),
        )

    share_out([Job(whole.lock(), lambda: whole.is_complete(identity), make_whole)])
    if shards:
        made = build_codec(datastore, factory, seed)
        share_out([job_of(number, *made) for number in range(len(shards))])
    return open_codes(datastore, factory)


def build_codec(
    datastore: Datastore, factory: str, seed: int = 1, report: Report = lambda *_: None
) -> tuple[dict[str, Any], FeatureCodec]:
    """Fields of the manifest, and the codec; trained unless it is there already, for a shard on a
    sample of its own keys. See `build_codes`."""
    codec_path, _ = codec_files(datastore, factory)
    artifact = artifact_of(_directory(datastore), factory)
    identity = _identity(datastore, factory, seed)
    if artifact.exists():
        fields = artifact.read()
        refuse_mismatch(artifact.name, fields, identity)
        return fields, FeatureCodec.read(codec_path)
    report("training", 0, 1)
    codec, quality = _trained(datastore, factory, seed)
    report("training", 1, 1)
    codec.write(codec_path)
    fields = {**identity, **asdict(quality), "codec": digest_of(codec_path)}
    if _shards(datastore):  # which have what else there is to complete
        artifact.write(fields, complete=True, files=[codec_path])
    return fields, codec


def _encode(
    datastore: Datastore,
    artifact: Artifact,
    factory: str,
    fields: Mapping[str, Any],
    codec: FeatureCodec,
    report: Callable[[int, int], None],
) -> None:
    """Encodes the keys of a datastore, or of a shard; `fields` are those of the manifest."""

    def encode(first: int, last: int) -> tuple[np.ndarray]:
        rows = np.arange(first, last)
        rows = rows[~np.isin(rows, datastore.masked)]
        codes = np.zeros((last - first, codec.code_size), dtype=np.uint8)
        if len(rows):
            codes[rows - first] = codec.encode(datastore.read(datastore.in_whole(rows)))
        return (codes,)

    file = artifact.manifest.with_suffix(".npy").name
    layouts = {file: _layout(len(datastore), codec.code_size)}
    step = max(BLOCK_BYTES // (4 * datastore.dim), 1)
    beside = [codec_files(datastore, factory)[0]] if datastore.part is None else []
    artifact.fill(fields, layouts, step, encode, report, beside)


@dataclass(frozen=True)
class CodecQuality:
    """What a codec costs and loses on a datastore.

    Attributes:
        code_size: bytes a row.
        relative_error: see `FeatureCodec.relative_error`, on keys it was not trained on.
        train_seconds: to train it.
    """

    code_size: int
    relative_error: float
    train_seconds: float


def compare_codecs(
    datastore: Datastore, factories: Sequence[str], seed: int = 1
) -> dict[str, CodecQuality]:
    """Trains each codec on the same sample and measures it; writes nothing.

    Raises:
        InputError: faiss cannot make one of them.
    """
    return {factory: _trained(datastore, factory, seed)[1] for factory in factories}


def _trained(datastore: Datastore, factory: str, seed: int) -> tuple[FeatureCodec, CodecQuality]:
    rows, keys = datastore.sample(SAMPLE + HELD, seed)
    is_held = np.zeros(len(rows), dtype=bool)
    count = max(len(rows) * HELD // (SAMPLE + HELD), 1)
    is_held[np.random.default_rng(seed).permutation(len(rows))[:count]] = True
    start = time.perf_counter()
    codec = FeatureCodec.train(factory, keys[~is_held])
    seconds = time.perf_counter() - start
    return codec, CodecQuality(codec.code_size, codec.relative_error(keys[is_held]), seconds)


def source_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What codes and the datastore of a manifest must have in common."""
    fingerprint = fingerprint_of(manifest)
    return {"rows": manifest["rows"], "dim": manifest["dim"], "datastore": fingerprint}
