"""Products of every kind are refused when they are damaged, in whatever way, and used wherever they
were copied, moved or linked to."""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import builder_of
from small import write_corpus

from neighborlm.common.errors import InputError
from neighborlm.datamodules.binarized import BinarizedCorpus, CorpusSettings
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.originals.raw_datastore import import_datastore
from neighborlm.programs.checkpoints import load_model
from neighborlm.programs.training import read_checkpoint
from neighborlm.programs.verification import products_at, verify_product
from neighborlm.retrieval.memories.cache import RetrievalCache
from neighborlm.retrieval.memories.cache_builder import RetrievalCacheBuilder
from neighborlm.retrieval.memories.suffix_array import SuffixArray
from neighborlm.retrieval.neighbors.codec import build_codes, open_codes
from neighborlm.retrieval.neighbors.tables import NeighborSearch, NeighborTable, TableSettings
from neighborlm.retrieval.search import Search, building, open_retriever
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.clusters import ensure_clusters
from neighborlm.retrieval.search.retriever import FlatRetriever
from neighborlm.retrieval.store import Datastore, datastore
from neighborlm.tools.datastore import main

ROWS = 300
QUERIES = np.random.default_rng(3).normal(size=(20, 8)).astype(np.float32)


def tokens_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, ROWS).astype(np.uint8)


def make(folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One product of every kind; those of another seed differ, but not in size."""
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(ROWS, 8)).astype(np.float32), rng.integers(0, 50, ROWS)
    builder = builder_of(folder / "store", masked=[5 + seed, 6 + seed])
    builder.write(np.arange(ROWS), keys, values)
    builder.sync()
    store = builder.finish()
    IndexBuilding(store, "IVF7,SQ8", "l2").run()
    with monkeypatch.context() as patch:
        patch.setattr(building, "PART_BYTES", 1)
        patch.setattr(datastore, "BLOCK_BYTES", 4 * 8 * 100)
        IndexBuilding(store, "IVF7,SQfp16", "l2").run()
    settings = TableSettings("l2", "flat", 1, 3)
    NeighborSearch(store, store, FlatRetriever(store, "l2"), settings).run()
    build_codes(store, "SQ8")
    ensure_clusters(store, 4)
    cache = RetrievalCacheBuilder(folder / "cache", ROWS, 3, 50, {"model": "m"})
    scores = -np.sort(rng.random((ROWS, 3)), axis=1).astype(np.float32)
    found = (values, -rng.random(ROWS), scores, rng.integers(0, 50, (ROWS, 3)))
    cache.write(np.arange(ROWS), *found)
    cache.sync()
    cache.finish({"ppl": 100.0 + seed})
    SuffixArray.ensure(folder / "suffixes", tokens_of(seed), 50, {"corpus": str(seed)})
    write_corpus(folder / "words", seed=seed)
    OPEN["corpus"](folder)
    torch.manual_seed(seed)
    model = TransformerLM(16, width=8, ffn_width=12, layers=1, heads=2)
    saved = {"hyper_parameters": dict(model.hparams), "state_dict": model.state_dict()}
    (folder / "run").mkdir()
    torch.save({**saved, "optimizer_states": [], "loops": {}}, folder / "run/best.ckpt")
    keys.tofile(folder / "raw_keys.npy")
    values.tofile(folder / "raw_vals.npy")
    import_datastore(folder / "raw", folder / "imported", ROWS, 8)
    return folder


def store_in(folder: Path) -> Datastore:
    return Datastore.open(folder / "store")


def search_in(folder: Path, factory: str) -> np.ndarray:
    return open_retriever(store_in(folder), Search(factory, "l2", 7)).search(QUERIES, 5).rows


def corpus_in(folder: Path) -> list[np.ndarray]:
    corpus = BinarizedCorpus(CorpusSettings(str(folder / "words"), cache_dir=folder / ".cache"))
    corpus.dictionary  # noqa: B018
    stream = corpus.stream("train")
    return [stream.tokens, stream.line_starts]


OPEN: dict[str, Callable[[Path], object]] = {
    "datastore": lambda folder: store_in(folder).keys,
    "index": lambda folder: search_in(folder, "IVF7,SQ8"),
    "index in parts": lambda folder: search_in(folder, "IVF7,SQfp16"),
    "table": lambda folder: NeighborTable.open(folder / "store/neighbors-k3.npy").rows,
    "codes": lambda folder: open_codes(store_in(folder), "SQ8").codes,
    "clusters": lambda folder: ensure_clusters(store_in(folder), 4).labels,
    "cache": lambda folder: RetrievalCache.open(folder / "cache").scores,
    "suffixes": lambda folder: (
        SuffixArray.open(folder / "suffixes", tokens_of(0), 50, {"corpus": "0"}).suffixes
    ),
    "corpus": corpus_in,
    "checkpoint": lambda folder: load_model(folder / "run/best.ckpt"),
    "training": lambda folder: read_checkpoint(folder / "run/best.ckpt"),
    "raw": lambda folder: Datastore.open(folder / "imported").keys,
}
"""Uses each kind of product."""
FILES = [
    *(("datastore", f"store/{name}") for name in ("keys.npy", "values.npy", "masked.npy")),
    *(("datastore", f"store/{name}") for name in ("checksums.npy", "manifest.json")),
    *(("index", f"store/IVF7_SQ8-l2.faiss{end}") for end in ("", ".json")),
    *(("index in parts", f"store/IVF7_SQfp16-l2.faiss{end}") for end in ("", ".lists")),
    *(("table", f"store/neighbors-k3.{end}") for end in ("npy", "json")),
    *(("codes", f"store/codes-SQ8.{end}") for end in ("npy", "faiss", "json")),
    *(("clusters", f"store/clusters-4{end}") for end in (".npy", "-centroids.npy", ".json")),
    *(("cache", f"cache/{name}.npy") for name in ("scores", "values", "targets", "lm_log_prob")),
    ("cache", "cache/manifest.json"),
    *(("suffixes", f"suffixes/{name}") for name in ("suffixes.npy", "manifest.json")),
    *(("corpus", f".cache/words-*/train/{name}.npy") for name in ("tokens", "line_starts")),
    *(("corpus", f".cache/words-*/{name}") for name in ("meta.json", "dict.txt")),
    *((kind, "run/best.ckpt") for kind in ("checkpoint", "training")),
    ("raw", "raw_keys.npy"),
    ("raw", "raw_vals.npy"),
]
DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "a flipped bit": lambda data, _: (
        data[: len(data) * 2 // 3]
        + bytes([data[len(data) * 2 // 3] ^ 1])
        + data[len(data) * 2 // 3 + 1 :]
    ),
    "zeros": lambda data, _: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "cut off": lambda data, _: data[:-9],
    "reversed": lambda data, _: data[:128] + data[:127:-1],
    "another's": lambda _, other: other,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of products."""
    place = tmp_path_factory.mktemp("products")
    with pytest.MonkeyPatch.context() as patch:
        return [make(place / name, seed, patch) for seed, name in enumerate(("own", "other"))]


def damages_in(folder: Path) -> list[str]:
    """What verifying everything finds."""
    found = []
    for product in products_at(folder):
        try:
            assert verify_product(product, lambda *_: None) == "whole"
        except InputError as damage:
            found.append(str(damage))
    return found


def test_nothing_is_damaged(folders, capsys):
    for folder in folders:
        main(["verify", "--path", str(folder)])
        lines = capsys.readouterr().out.split("\n")
        assert sum(line.endswith(": is as it was written") for line in lines) == 11


CASES = [
    pytest.param(kind, name, how, id=f"{kind}-{name}-{how}")
    for kind, name in FILES
    for how in DAMAGES
    # Another checkpoint is a checkpoint; of a bit in one see below.
    if not (name == "run/best.ckpt" and how in ("another's", "a flipped bit"))
]


@pytest.mark.parametrize(("kind", "name", "how"), CASES)
def test_what_is_damaged_is_refused(folders, kind, name, how):
    (path,), (other,) = (list(folder.glob(name)) for folder in folders)
    data = path.read_bytes()
    damaged = DAMAGES[how](data, other.read_bytes())
    assert damaged != data
    path.write_bytes(damaged)
    try:
        with pytest.raises(InputError) as error:
            OPEN[kind](folders[0])
        assert "\n" not in str(error.value)
        if how == "a flipped bit":
            assert damages_in(folders[0]) != []
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("way", ["moved", "linked"])
def test_what_was_copied_and_moved_or_linked_to_is_used(folders, tmp_path, way):
    """And of a copy nothing but the copy."""
    own, place = folders[0], tmp_path / "deep" / "elsewhere"
    expected = {kind: use(own) for kind, use in OPEN.items()}
    place.parent.mkdir()
    if way == "linked":
        place.symlink_to(own, target_is_directory=True)
    else:
        shutil.copytree(own, tmp_path / "copy")
        os.rename(tmp_path / "copy", place)
        os.rename(own, own.with_name("hidden"))
    try:
        for kind, use in OPEN.items():
            found = use(place)
            if isinstance(found, np.ndarray):
                np.testing.assert_array_equal(found, expected[kind])
        assert damages_in(place) == []
    finally:
        if way == "moved":
            os.rename(own.with_name("hidden"), own)


def test_a_bit_in_the_weights_of_a_checkpoint(folders):
    """Wherever it is."""
    path = folders[0] / "run/best.ckpt"
    data = path.read_bytes()
    weights = torch.load(path, weights_only=True)["state_dict"]
    largest = max(weights.values(), key=torch.numel).numpy().tobytes()
    begin = data.index(largest)
    try:
        for place in np.linspace(begin, begin + len(largest) - 1, 7).astype(int).tolist():
            path.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
            with pytest.raises(InputError, match=r"best.ckpt: is damaged, it is not what was wr"):
                load_model(path)
    finally:
        path.write_bytes(data)


def test_one_damaged_product_does_not_hide_another(folders, capsys):
    paths = [folders[0] / "store" / name for name in ("codes-SQ8.npy", "neighbors-k3.npy")]
    before = [path.read_bytes() for path in paths]
    for path, data in zip(paths, before, strict=True):
        path.write_bytes(data[:-1] + b"x")
    try:
        with pytest.raises(SystemExit):
            main(["verify", "--path", str(folders[0] / "store")])
        said = capsys.readouterr()
        assert f"{paths[0]}: is damaged" in said.err
        assert f"{paths[1]}: is damaged" in said.out
        main(["verify", "--path", str(folders[0] / "store" / "IVF7_SQ8-l2.faiss")])
        assert "IVF7_SQ8-l2.faiss: is as it was written" in capsys.readouterr().out
    finally:
        for path, data in zip(paths, before, strict=True):
            path.write_bytes(data)


def test_what_is_no_product(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    for path in (tmp_path, tmp_path / "results.json", tmp_path / "nowhere"):
        with pytest.raises(SystemExit):
            main(["verify", "--path", str(path)])
        assert f"{path}: is no product and holds none" in capsys.readouterr().err


def test_all_products_are_listed(folders, capsys):
    main(["list", "--path", str(folders[0])])
    lines = capsys.readouterr().out.splitlines()
    kinds = [line.split(": ")[1].split(",")[0] for line in lines]
    others = {"neighbour table": 1, "set of feature codes": 1, "retrieval": 1}
    assert Counter(kinds) == {
        "300 rows x 8 fp32": 2,
        "index": 2,
        "suffix array": 1,
        "set of clusters": 1,
        **others,
    }
    assert all(", complete" in line for line in lines)
