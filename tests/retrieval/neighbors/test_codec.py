"""Feature codecs: decoded without faiss, resumed to the same bytes, compared, taken over,
refused."""

import json

import numpy as np
import pytest
from small import without_digests

from neighborlm.common.errors import InputError
from neighborlm.originals.codes import import_codes
from neighborlm.retrieval.neighbors import codec as codec_module
from neighborlm.retrieval.neighbors.codec import (
    FeatureCodec,
    build_codes,
    compare_codecs,
    has_codes,
    open_codes,
)
from neighborlm.tools.codec import main

MASKED = [0, 5, 399]


@pytest.fixture
def store(make_store):
    """400 keys of width 8, three of them masked."""
    return make_store(rows=400, masked=MASKED)[0]


def decoded(arrays, codes):
    """What the docstring of `decoder_arrays` says."""
    if "centroids" in arrays:
        chosen = [arrays["centroids"][m, codes[:, m]] for m in range(codes.shape[1])]
        vectors = np.concatenate(chosen, axis=1)
    else:
        vectors = arrays["vmin"] + arrays["vdiff"] * (codes + 0.5) / 255
    return (vectors - arrays["b"]) @ arrays["A"] if "A" in arrays else vectors


FACTORIES = ["PQ4", "SQ8", "OPQ4,PQ4", "OPQ2_4,PQ2", "PCA4,SQ8", "PCA4,OPQ2,PQ2", "RR8,SQ8"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factory", FACTORIES)
def test_arrays_decode_as_faiss_does(store, factory):
    codes = build_codes(store, factory)
    expected = codes.codec.decode(codes.codes)
    np.testing.assert_allclose(decoded(codes.decoder_arrays(), codes.codes), expected, atol=2e-6)
    assert all(array.dtype == np.float32 for array in codes.decoder_arrays().values())


def test_codes_are_of_every_row_with_a_key(store):
    codes = build_codes(store, "SQ8")
    assert codes.codes.shape == (400, 8)
    assert codes.codes.dtype == np.uint8
    assert (codes.codes[MASKED] == 0).all()
    stored = np.setdiff1d(np.arange(400), MASKED)
    expected = codes.codec.encode(store.keys[stored])
    np.testing.assert_array_equal(codes.codes[stored], expected)


def test_measured_error(store):
    """On held keys; against the definition."""
    manifest = build_codes(store, "SQ4").manifest
    assert 0.001 < manifest["relative_error"] < 0.05
    assert manifest["train_seconds"] > 0
    keys = store.read(np.arange(10, 90))
    codec = FeatureCodec.train("SQ4", keys)
    lost = np.square(keys - codec.decode(codec.encode(keys))).sum()
    expected = lost / np.square(keys - keys.mean(0)).sum()
    assert codec.relative_error(keys) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("factory", ["SQ8", "OPQ4,PQ4"])
def test_resumed_codes_have_the_same_bytes(make_store, monkeypatch, factory):
    monkeypatch.setattr(codec_module, "BLOCK_BYTES", 4 * 8 * 60)
    whole = build_codes(make_store(rows=400, masked=MASKED, name="whole")[0], factory)
    store, _, _ = make_store(rows=400, masked=MASKED, name="cut")
    real = FeatureCodec.encode
    blocks = []

    def interrupted(codec, vectors):
        if len(vectors) < 65:
            blocks.append(vectors)
        if len(blocks) == 4:
            raise KeyboardInterrupt
        return real(codec, vectors)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureCodec, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_codes(store, factory)
    with pytest.raises(InputError, match="unfinished"):
        open_codes(store, factory)
    assert not has_codes(store, factory)
    stages = []
    parts = build_codes(store, factory, report=lambda *stage: stages.append(stage))
    assert stages[0][0] == "encoding"  # not trained again
    assert 0 < stages[0][1] < 400
    for suffix in (".npy", ".faiss"):
        made, expected = (codes.path.with_suffix(suffix) for codes in (parts, whole))
        assert made.read_bytes() == expected.read_bytes()
    assert parts.manifest["relative_error"] == whole.manifest["relative_error"]
    assert has_codes(store, factory)
    before = parts.path.stat().st_mtime_ns
    build_codes(store, factory)
    assert parts.path.stat().st_mtime_ns == before


def test_compared_on_the_command_line(store, tmp_path, capsys):
    factories = ["SQ8", "SQfp16", "RaBitQ"]
    output = tmp_path / "codecs.json"
    arguments = ["compare", "--datastore", str(store.path), "--output", str(output)]
    main([*arguments, "--codecs", json.dumps(list(factories))])
    results = json.loads(output.read_text())
    assert list(results) == factories
    assert [results[name]["code_size"] for name in factories[:2]] == [8, 16]
    errors = [results[name]["relative_error"] for name in factories]
    assert errors[1] < errors[0] < errors[2] < 1
    assert "SQfp16" in capsys.readouterr().out
    assert compare_codecs(store, ["SQ8"])["SQ8"].relative_error == errors[0]  # the same sample
    assert not list(store.path.glob("codes*"))
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--codecs", '["nonsense"]'])
    assert stopped.value.code == 2
    assert "codec 'nonsense'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("factory", "part"),
    [
        ("PQ4x4", "IndexPQ with 4 bits"),
        ("SQfp16", "IndexScalarQuantizer"),
        ("RR8,RaBitQ", "IndexRaBitQ"),
        ("RQ2x4", "IndexResidualQuantizer"),
        ("L2norm,SQ8", "NormalizationTransform"),
    ],
)
def test_what_only_faiss_decodes(store, factory, part):
    codes = build_codes(store, factory)
    assert codes.codec.decode(codes.codes[:3]).shape == (3, 8)
    with pytest.raises(InputError, match=f"the codec has a {part}; expected PQ with 8 bits or SQ8"):
        codes.decoder_arrays()


def test_what_does_not_fit_is_refused(store, make_store):
    with pytest.raises(InputError, match="no such file; expected the manifest of a set of feature"):
        open_codes(store, "SQ8")
    with pytest.raises(InputError, match=r"codec 'HNSW8': expected .* 353 keys of width 8"):
        build_codes(store, "HNSW8")
    with pytest.raises(InputError, match="codec 'PQ3': expected"):
        build_codes(store, "PQ3")
    with pytest.raises(InputError, match="codec 'PCAW4,SQ8': expected"):
        build_codes(store, "PCAW4,SQ8")
    assert not list(store.path.glob("codes*"))

    codes = build_codes(store, "SQ8", seed=1)
    with pytest.raises(InputError, match="its seed is 1, but 2 is expected"):
        build_codes(store, "SQ8", seed=2)
    other, _, _ = make_store(rows=400, name="other")
    for suffix in (".json", ".npy", ".faiss"):
        name = codes.path.with_suffix(suffix).name
        (other.path / name).write_bytes((store.path / name).read_bytes())
    with pytest.raises(InputError, match="its datastore is"):
        open_codes(other, "SQ8")
    codes.path.with_suffix(".faiss").write_bytes(b"noise")
    with pytest.raises(InputError, match=r"SQ8.faiss: has 5 bytes, but \d+ were written"):
        open_codes(store, "SQ8")
    without_digests(codes.path)
    FeatureCodec.train("SQ4", store.read(np.arange(50))).write(codes.path.with_suffix(".faiss"))
    with pytest.raises(InputError, match=r"SQ8.faiss: its code size is 4, but 8 is expected"):
        open_codes(store, "SQ8")
    codes.path.with_suffix(".faiss").write_bytes(b"noise")
    with pytest.raises(InputError, match=r"SQ8.faiss: cannot be read as a codec"):
        open_codes(store, "SQ8")


@pytest.mark.parametrize("header", [False, True])
def test_codes_of_the_original_in_place(store, tmp_path, header):
    quantizer, source = tmp_path / "quantizer.faiss", tmp_path / "quantized-keys.npy"
    codec = FeatureCodec.train("OPQ4,PQ4", store.read(np.arange(1, 399)))
    codec.write(quantizer)
    raw = codec.encode(store.read(np.arange(400)))
    np.save(source, raw) if header else raw.tofile(source)

    codes = import_codes(store, source, quantizer)
    np.testing.assert_array_equal(codes.codes, raw)
    np.testing.assert_array_equal(open_codes(store, "imported").codes, raw)
    assert sorted(p.name for p in store.path.glob("codes*")) == ["codes-imported.json"]
    assert codes.manifest["relative_error"] < 0.5
    vectors = decoded(codes.decoder_arrays(), raw)
    np.testing.assert_allclose(vectors, codec.decode(raw), atol=2e-6)

    with pytest.raises(InputError, match="no such file"):
        import_codes(store, tmp_path / "nowhere.npy", quantizer)
    FeatureCodec.train("SQ4", store.read(np.arange(1, 399))).write(tmp_path / "sq4.faiss")
    with pytest.raises(InputError, match=r"sq4.faiss: the codec has a IndexScalarQuantizer"):
        import_codes(store, source, tmp_path / "sq4.faiss")
    with pytest.raises(InputError, match="cannot be read as a codec"):
        import_codes(store, source, source)
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"has 1599 bytes of data, expected 1600 for uint8"):
        import_codes(store, source, quantizer)
    with pytest.raises(InputError, match=r"quantized-keys.npy: has .* bytes, but \d+ were written"):
        open_codes(store, "imported")
