"""Searching: exact search against brute force, indexes built, resumed, refused."""

import json
import math
import os
import shutil
import signal
from functools import partial
from itertools import combinations

import faiss
import numpy as np
import pytest
from small import without_digests

from neighborlm.common.errors import InputError
from neighborlm.originals.raw_datastore import import_datastore
from neighborlm.retrieval.search import Search
from neighborlm.retrieval.search import building as building_module
from neighborlm.retrieval.search import index as index_module
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import (
    auto_factory,
    is_path,
    make_index,
    open_retriever,
    resolve,
)
from neighborlm.retrieval.search.rescoring import exact_distances
from neighborlm.retrieval.search.retriever import FlatRetriever, normalized
from neighborlm.retrieval.store import datastore as datastore_module
from neighborlm.retrieval.store.datastore import Datastore


def brute_force(queries, keys, metric, k):
    """Distances and rows of the k nearest, nearest first."""
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    if metric == "l2":
        table = ((queries[:, None] - keys) ** 2).sum(-1)
        order = np.argsort(table, axis=1)[:, :k]
    else:
        if metric == "cosine":
            queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
            keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        table = queries @ keys.T
        order = np.argsort(-table, axis=1)[:, :k]
    return np.take_along_axis(table, order, 1), order


@pytest.fixture
def queries():
    return np.random.default_rng(5).normal(size=(23, 8)).astype(np.float32)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_flat_equals_brute_force(make_store, queries, metric, dtype, monkeypatch):
    monkeypatch.setattr(datastore_module, "BLOCK_BYTES", 4 * 8 * 40)  # eight blocks of 40 keys
    store, keys, _ = make_store(dtype=dtype)
    distances, rows, _ = FlatRetriever(store, metric).search(queries, 50)
    expected, order = brute_force(queries, keys, metric, 50)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-5)


def test_flat_leaves_out_masked_rows(make_store, queries):
    masked = np.arange(0, 300, 3)
    store, keys, _ = make_store(masked=masked)
    _, rows, _ = FlatRetriever(store, "l2").search(queries, 250)
    kept = np.setdiff1d(np.arange(300), masked)
    _, order = brute_force(queries, keys[kept], "l2", 200)
    np.testing.assert_array_equal(rows[:, :200], kept[order])
    assert (rows[:, 200:] == -1).all()


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("masked", [(), (3, 4, 250)])
def test_visiting_every_list_is_exact(make_store, queries, metric, masked):
    store, keys, _ = make_store(masked=masked)
    IndexBuilding(store, "IVF7,Flat", metric).run()
    _, rows, _ = open_retriever(store, Search("IVF7,Flat", metric, nprobe=99)).search(queries, 20)
    kept = np.setdiff1d(np.arange(300), masked)
    _, order = brute_force(queries, keys[kept], metric, 20)
    np.testing.assert_array_equal(rows, kept[order])


@pytest.mark.parametrize(
    "factory", ["IVF7,SQ8", "IVF7,SQfp16", "IVF7,PQ4x4", "RR8,IVF7,RaBitQfs", "OPQ4,IVF7,PQ4x4"]
)
def test_compressed_types_find_most(make_store, queries, factory):
    """Of the 50 nearest of 400; whoever finds at random finds one in eight."""
    store, keys, _ = make_store(rows=400)
    IndexBuilding(store, factory, "l2").run()
    _, found, _ = open_retriever(store, Search(factory, "l2", nprobe=7)).search(queries, 50)
    _, order = brute_force(queries, keys, "l2", 50)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(order, found, strict=True)])
    assert recall > 0.4


def test_interrupted_adding_goes_on(make_store, queries, monkeypatch):
    store, _, _ = make_store()
    IndexBuilding(store, "IVF7,SQ8", "l2").run()
    whole = open_retriever(store, Search("IVF7,SQ8", "l2", 7)).search(queries, 20)
    path = IndexBuilding(store, "IVF7,SQ8", "l2").path
    path.unlink()

    monkeypatch.setattr(datastore_module, "BLOCK_BYTES", 4 * 8 * 50)
    stages = []

    def interrupt(stage, done, total):
        stages.append((stage, done))
        if done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        IndexBuilding(store, "IVF7,SQ8", "l2").run(interrupt)
    assert not path.exists()
    stages.clear()
    again = IndexBuilding(store, "IVF7,SQ8", "l2")
    again.run(lambda stage, done, total: stages.append((stage, done)))
    assert stages[0] == ("adding", 100)
    assert again.is_complete()
    assert not again.partial.exists()
    parts = open_retriever(store, Search("IVF7,SQ8", "l2", 7)).search(queries, 20)
    for a, b in zip(whole[:2], parts[:2], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("factory", ["IVF7,SQ8", "RR8,IVF7,SQfp16", "IVF7,PQ8x4fs"])
@pytest.mark.parametrize("stop_at", [None, 250])
def test_built_in_parts_it_finds_the_same(make_store, queries, monkeypatch, factory, stop_at):
    """Also when it is interrupted between two parts; types that do not merge are built whole. The
    last part is smaller than the others."""
    store, _, _ = make_store(rows=330)
    IndexBuilding(store, factory, "l2").run()
    whole = open_retriever(store, Search(factory, "l2", 7)).search(queries, 20)
    IndexBuilding(store, factory, "l2").path.unlink()

    monkeypatch.setattr(datastore_module, "BLOCK_BYTES", 4 * 8 * 50)
    monkeypatch.setattr(building_module, "PART_BYTES", 90 * 16)
    merged = []

    def stop(stage, done, total):
        merged.append(stage == "merging")
        if done == stop_at:
            raise KeyboardInterrupt

    if stop_at:
        with pytest.raises(KeyboardInterrupt):
            IndexBuilding(store, factory, "l2").run(stop)
    building = IndexBuilding(store, factory, "l2")
    building.run(stop if stop_at is None else lambda *_: None)
    in_parts = open_retriever(store, Search(factory, "l2", 7)).search(queries, 20)
    for a, b in zip(whole[:2], in_parts[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert (building.parts != []) == ("fs" not in factory)
    assert not list(store.path.glob("*.part*"))
    if building.parts:
        manifest = building.path.with_name(f"{building.path.name}.json")
        without_digests(manifest, version=1)
        for use in (building.is_complete, lambda: open_retriever(store, Search(factory, "l2", 7))):
            with pytest.raises(InputError, match="merged by an earlier version"):
                use()


def test_what_does_not_fit_is_refused(make_store, tmp_path):
    store, _, _ = make_store()
    path = IndexBuilding(store, "IVF7,SQ8", "l2").run()
    other, _, _ = make_store(rows=200, name="other")
    with pytest.raises(InputError, match="its metric is l2, but ip is expected"):
        open_retriever(store, Search(str(path), "ip", 1))
    with pytest.raises(InputError, match="its keys is 300, but 200 is expected"):
        open_retriever(other, Search(str(path), "l2", 1))
    path.with_name(f"{path.name}.json").unlink()  # an index from elsewhere
    with pytest.raises(InputError, match="number of keys is 300, but 200 is expected"):
        open_retriever(other, Search(str(path), "l2", 1))
    (tmp_path / "noise.faiss").write_bytes(b"noise")
    with pytest.raises(InputError, match=r"noise.faiss: cannot be read"):
        open_retriever(store, Search(str(tmp_path / "noise.faiss"), "l2", 1))
    with pytest.raises(InputError, match="no such index"):
        open_retriever(store, Search("IVF9,SQ8", "l2", 1))
    with pytest.raises(InputError, match="could not parse"):
        IndexBuilding(store, "IVFX", "l2").run()
    with pytest.raises(InputError, match="has 301 lists but the datastore only 300 keys"):
        IndexBuilding(store, "IVF301,Flat", "l2").run()


def test_an_index_of_another_seed_is_another_index(make_store):
    store, _, _ = make_store()
    path = IndexBuilding(store, "IVF7,SQ8", "l2", seed=1).run()
    assert json.loads(path.with_name(f"{path.name}.json").read_text())["seed"] == 1
    with pytest.raises(InputError, match="its seed is 1, but 2 is expected"):
        IndexBuilding(store, "IVF7,SQ8", "l2", seed=2).is_complete()


def test_auto_goes_by_size_and_memory():
    gib = 1 << 30
    assert auto_factory(10_000, 128, gib) == "flat"
    assert auto_factory(217_000, 128, gib) == "IVF1024,SQfp16"
    assert auto_factory(5_000_000, 128, gib) == "IVF4096,SQ8"
    assert auto_factory(103_000_000, 1024, 64 * gib) == "RR1024,IVF16384,RaBitQfs"


def test_keys_beyond_half_precision(new_builder, tmp_path, monkeypatch):
    """`auto` sees them in its sample; those that it misses are refused when they are added."""
    many = partial(auto_factory, 1 << 20, 8, 1 << 40)  # keys, so that it stands for lists
    monkeypatch.setattr(index_module, "auto_factory", lambda _, __, **fit: many(**fit))
    stores = {}
    for name, large in (("small", []), ("large", range(300)), ("one", [7])):
        keys = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
        keys[large, 2] = 70_000
        builder = new_builder(tmp_path / name)
        builder.write(np.arange(300), keys, np.zeros(300, np.int64))
        builder.sync()
        stores[name] = builder.finish()
    assert resolve(stores["small"], "auto") == "IVF2048,SQfp16"
    assert resolve(stores["large"], "auto") == "IVF2048,Flat"
    IndexBuilding(stores["large"], "IVF7,Flat", "l2").run()
    for factory in ("IVF7,SQfp16", "RR8,IVF7,SQfp16"):
        IndexBuilding(stores["small"], factory, "l2").run()
        said = "has keys up to 7e.04, but SQfp16 holds at most 65504; expected .*IVF7,Flat or .*SQ8"
        with pytest.raises(InputError, match=said):
            IndexBuilding(stores["one"], factory, "l2").run()


def contents(path):
    """Bytes of an index file."""
    return path.read_bytes()


def test_the_same_seed_gives_the_same_file(make_store, monkeypatch):
    """The sample is a part of the keys here, so which part matters."""
    monkeypatch.setattr(building_module, "SAMPLE_AT_LEAST", 100)
    monkeypatch.setattr(building_module, "POINTS_PER_CENTROID", 10)
    stores = [make_store(name=name)[0] for name in "abc"]
    a, b, c = (
        contents(IndexBuilding(store, "RR8,IVF7,PQ4x2", "l2", seed).run())
        for store, seed in zip(stores, (1, 1, 2), strict=True)
    )
    assert a == b
    assert a != c


@pytest.mark.parametrize("factory", ["Flat", "IVF7,SQ8", "PCA4,SQ8", "RR8,IVF7,RaBitQfs"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError], ids=["interrupt", "kill"])
def test_resumed_building_leaves_the_same_file(make_store, monkeypatch, factory, stop):
    """An interrupt keeps what is added; before a kill it was kept from time to time."""
    monkeypatch.setattr(datastore_module, "BLOCK_BYTES", 4 * 8 * 50)
    monkeypatch.setattr(building_module, "PARTIAL_EVERY", 0.0)
    whole = IndexBuilding(make_store(name="whole")[0], factory, "l2").run()
    store, _, _ = make_store(name="cut")

    def report(stage, done, total):
        if stage == "adding" and done == 150:
            raise stop

    with pytest.raises(stop):
        IndexBuilding(store, factory, "l2").run(report)
    stages = []
    path = IndexBuilding(store, factory, "l2").run(lambda *stage: stages.append(stage))
    assert stages[0][0] == "adding"  # not trained again
    if stop is KeyboardInterrupt:
        assert stages[0] == ("adding", 150, 300)
    else:
        assert 50 <= stages[0][1] < 150
    assert contents(path) == contents(whole)


def test_what_another_seed_began_is_not_continued(make_store):
    def interrupt(stage, done, total):
        if stage == "adding":
            raise KeyboardInterrupt

    store, _, _ = make_store()
    with pytest.raises(KeyboardInterrupt):
        IndexBuilding(store, "IVF7,SQ8", "l2", seed=1).run(interrupt)
    stages = []
    IndexBuilding(store, "IVF7,SQ8", "l2", seed=2).run(lambda *stage: stages.append(stage))
    assert stages[0][0] == "training"


def test_interrupt_inside_faiss(make_store, queries, monkeypatch):
    def make_interrupted(*args):
        index = make_index(*args)
        inner, rotation = faiss.downcast_index(index.index), index.chain.at(0)

        def add(keys):  # as faiss does with 65536 keys in place of 100
            inner.add(rotation.apply(keys[:100]))
            raise KeyboardInterrupt

        index.add = add
        return index

    store, _, _ = make_store()
    monkeypatch.setattr(building_module, "make_index", make_interrupted)
    with pytest.raises(KeyboardInterrupt):
        IndexBuilding(store, "RR8,IVF7,SQ8", "l2").run()
    monkeypatch.undo()
    IndexBuilding(store, "RR8,IVF7,SQ8", "l2").run()
    retriever = open_retriever(store, Search("RR8,IVF7,SQ8", "l2", 7))
    _, rows, _ = retriever.search(queries, 300)
    assert all(len(set(found)) == 300 for found in rows.tolist())


@pytest.fixture
def signalled_index(make_store, monkeypatch):
    """A datastore of six blocks, and an index that sends the process a SIGINT while it adds the
    third."""
    monkeypatch.setattr(datastore_module, "BLOCK_BYTES", 4 * 8 * 50)

    def make_signalled(*args):
        index = make_index(*args)
        real = index.add

        def add(keys):
            if index.ntotal == 100:
                os.kill(os.getpid(), signal.SIGINT)
            real(keys)

        index.add = add
        return index

    monkeypatch.setattr(building_module, "make_index", make_signalled)
    before = signal.getsignal(signal.SIGINT)
    yield make_store()[0]
    signal.signal(signal.SIGINT, before)


def test_interrupt_while_faiss_adds_waits_for_its_end(signalled_index):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    building = IndexBuilding(signalled_index, "IVF7,SQ8", "l2")
    with pytest.raises(KeyboardInterrupt):
        building.run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert faiss.read_index(str(building.partial)).ntotal == 150


def test_ignored_interrupts_stay_ignored(signalled_index):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    building = IndexBuilding(signalled_index, "IVF7,SQ8", "l2")
    try:
        building.run()
    except KeyboardInterrupt:  # would end pytest itself
        pytest.fail("interrupted")
    assert building.is_complete()


def test_damaged_partial_index_is_begun_anew(make_store):
    def interrupt(stage, done, total):
        if done == 300:
            raise KeyboardInterrupt

    store, _, _ = make_store()
    building = IndexBuilding(store, "IVF7,SQ8", "l2")
    with pytest.raises(KeyboardInterrupt):
        building.run(interrupt)
    building.partial.write_bytes(building.partial.read_bytes()[:500])
    building.run()
    assert open_retriever(store, Search("IVF7,SQ8", "l2", 7)).index.ntotal == 300


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_rows_without_a_key_are_neither_trained_on_nor_found(make_store, queries, metric):
    """They hold NaN here, which would spread to every centroid."""
    masked = [0, 1, 2, 150, 298, 299]
    store, keys, _ = make_store(masked=masked)
    poisoned = np.load(store.path / "keys.npy", mmap_mode="r+")
    poisoned[masked] = np.nan
    poisoned.flush()
    without_digests(store.path / "manifest.json")
    store = Datastore.open(store.path)
    IndexBuilding(store, "IVF7,Flat", metric).run()
    _, rows, _ = open_retriever(store, Search("IVF7,Flat", metric, 7)).search(queries, 300)
    assert (rows[:, 294:] == -1).all()
    kept = np.setdiff1d(np.arange(300), masked)
    _, order = brute_force(queries, keys[kept], metric, 294)
    np.testing.assert_array_equal(rows[:, :294], kept[order])


@pytest.mark.parametrize("factory", ["IVF7,Flat", "RR8,IVF7,Flat", "IVF7,SQ8,RFlat"])
def test_nprobe_is_how_many_lists_are_visited(make_store, queries, factory):
    """Also behind a rotation and before a refinement."""
    store, _, _ = make_store()
    path = IndexBuilding(store, factory, "l2").run()
    index = faiss.read_index(str(path))
    sizes = [faiss.extract_index_ivf(index).get_list_size(i) for i in range(7)]
    assert sum(sizes) == 300
    for nprobe in (1, 3, 7, 99):
        _, rows, _ = open_retriever(store, Search(factory, "l2", nprobe)).search(queries, 300)
        found = set((rows >= 0).sum(1).tolist())
        assert found <= {sum(lists) for lists in combinations(sizes, min(nprobe, 7))}


def test_an_index_file_from_elsewhere(make_store, queries, tmp_path):
    store, keys, _ = make_store()
    index = faiss.IndexFlatIP(8)
    index.add(keys)
    faiss.write_index(index, str(tmp_path / "made by hand.index"))
    _, rows, _ = open_retriever(
        store, Search(str(tmp_path / "made by hand.index"), "ip", 1)
    ).search(queries, 10)
    np.testing.assert_array_equal(rows, brute_force(queries, keys, "ip", 10)[1])
    with pytest.raises(InputError, match=r"by hand.index: its faiss metric type is 0, but 1 is"):
        open_retriever(store, Search(str(tmp_path / "made by hand.index"), "l2", 1))
    wider, _, _ = make_store(dim=9, name="wider")
    with pytest.raises(InputError, match=r"by hand.index: its dimension is 8, but 9 is expected"):
        open_retriever(wider, Search(str(tmp_path / "made by hand.index"), "ip", 1))


def test_index_of_another_datastore_of_the_same_size(make_store, new_builder, tmp_path):
    store, keys, values = make_store()
    path = IndexBuilding(store, "IVF7,SQ8", "l2").run()
    builder = new_builder(tmp_path / "other", corpus="another")
    builder.write(np.arange(300), keys + 1, values)
    builder.sync()
    other = builder.finish()
    with pytest.raises(InputError, match="its datastore is "):
        open_retriever(other, Search(str(path), "l2", 1))
    for suffix in ("", ".json"):
        shutil.copy(f"{path}{suffix}", f"{other.path / path.name}{suffix}")
    with pytest.raises(InputError, match="its datastore is "):
        IndexBuilding(other, "IVF7,SQ8", "l2").is_complete()


def test_too_few_keys_for_a_quantiser(make_store):
    store, _, _ = make_store(rows=20)
    with pytest.raises(InputError, match="PQ2x8 cannot be trained on 20 keys"):
        IndexBuilding(store, "PQ2x8", "l2").run()
    assert sorted(p.name for p in store.path.glob("*.faiss*")) == []


@pytest.mark.parametrize(
    ("n_keys", "dim"), [(4097, 1024), (40_000, 768), (2_000_000, 1024), (768_000_000, 1024)]
)
def test_auto_suits_faiss_and_memory(n_keys, dim):
    half = n_keys * dim * 2
    factories = [auto_factory(n_keys, dim, m) for m in (half, half - 1, half // 2, half // 2 - 1)]
    assert [f.rsplit(",")[-1] for f in factories] == ["SQfp16", "SQ8", "SQ8", "RaBitQfs"]
    for factory in factories:
        lists = int(factory.split("IVF")[1].split(",")[0])
        assert lists & (lists - 1) == 0
        assert abs(math.log2(lists) - math.log2(2 * n_keys**0.5)) <= 0.5
        for metric in ("l2", "ip"):
            assert make_index(dim, factory, metric).d == dim


def test_auto_is_exact_up_to_four_million_numbers():
    assert auto_factory(4096, 1024) == "flat"
    assert auto_factory(4097, 1024) != "flat"


def test_training_sees_what_is_searched(make_store, new_builder, tmp_path, queries):
    """The ranges of four-bit codes are learnt: of unit vectors under cosine, not of long keys."""
    _, keys, values = make_store()
    keys = keys * np.random.default_rng(0).uniform(50, 500, (300, 1)).astype(np.float32)
    builder = new_builder(tmp_path / "long")
    builder.write(np.arange(300), keys, values)
    builder.sync()
    store = builder.finish()
    IndexBuilding(store, "SQ4", "cosine").run()
    _, rows, _ = open_retriever(store, Search("SQ4", "cosine", 1)).search(queries, 20)
    _, order = brute_force(queries, keys, "cosine", 20)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(order, rows, strict=True)]) > 0.7


def test_interrupt_while_keys_are_read(make_store, monkeypatch):
    monkeypatch.setattr(datastore_module, "BLOCK_BYTES", 4 * 8 * 50)
    store, _, _ = make_store()
    whole = Datastore.blocks

    def interrupted(self, start=0, block_rows=None):
        blocks = whole(self, start, block_rows)
        yield next(blocks)
        yield next(blocks)
        raise KeyboardInterrupt

    monkeypatch.setattr(Datastore, "blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        IndexBuilding(store, "IVF7,SQ8", "l2").run()
    assert faiss.read_index(str(IndexBuilding(store, "IVF7,SQ8", "l2").partial)).ntotal == 100


def test_index_of_another_raw_datastore(tmp_path):
    rng, stores = np.random.default_rng(0), []
    for name in ("a", "b"):
        rng.normal(size=(300, 8)).astype(np.float32).tofile(tmp_path / f"{name}_keys.npy")
        rng.integers(0, 50, 300).tofile(tmp_path / f"{name}_vals.npy")
        stores.append(import_datastore(tmp_path / name, tmp_path / f"of-{name}", 300, 8))
    path = IndexBuilding(stores[0], "IVF7,SQ8", "l2").run()
    with pytest.raises(InputError, match="its datastore is "):
        open_retriever(stores[1], Search(str(path), "l2", 1))


def test_types_that_number_keys_themselves_are_refused(make_store):
    store, _, _ = make_store()
    with pytest.raises(InputError, match="IDMap"):
        IndexBuilding(store, "IDMap,Flat", "l2").run()


@pytest.mark.parametrize("place", ["some/dir/faiss_store.cosine", "faiss_store.cosine"])
def test_index_file_of_the_original_gnn_lm(make_store, queries, tmp_path, monkeypatch, place):
    """Made of unit vectors, without a manifest; in the folder where the program runs, its name
    alone is a path."""
    store, keys, _ = make_store()
    index = faiss.index_factory(8, "IVF7,SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(normalized(keys, "cosine"))
    index.add(normalized(keys, "cosine"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(path))
    distances, rows, _ = open_retriever(store, Search(place, "cosine", 7)).search(queries, 5)
    expected, order = brute_force(queries, keys, "cosine", 5)
    assert (rows[:, 0] == order[:, 0]).mean() > 0.9
    np.testing.assert_allclose(distances, expected, atol=0.02)
    with pytest.raises(InputError, match=r"faiss_store\.cosine: its faiss metric type is 0, but 1"):
        open_retriever(store, Search(place, "l2", 7))
    with pytest.raises(InputError, match=r"dir/faiss_store\.none: no such index"):
        open_retriever(store, Search("dir/faiss_store.none", "cosine", 7))


def test_words_and_factory_strings_are_no_paths(make_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("auto", "flat"):
        (tmp_path / name).write_text("no index")
        assert not is_path(name)
        assert is_path(f"./{name}")
    assert not is_path("IVF1024,SQfp16")
    store, _, _ = make_store()
    for name in ("auto", "flat"):
        assert isinstance(open_retriever(store, Search(name, "l2", 1)), FlatRetriever)


@pytest.mark.parametrize(
    ("metric", "dtype", "exact"),
    [("l2", "fp16", True), ("ip", "fp16", True), ("cosine", "fp16", False), ("l2", "fp32", False)],
)
def test_lists_of_halves_hold_half_precision_keys_as_they_are(make_store, metric, dtype, exact):
    """Then distances of the index are exact, and keys need not be read again."""
    store, _, _ = make_store(2000, 8, dtype)
    IndexBuilding(store, "IVF8,SQfp16", metric).run()
    retriever = open_retriever(store, Search("IVF8,SQfp16", metric, 8))
    assert retriever.exact is exact
    queries = np.random.default_rng(1).standard_normal((20, 8)).astype(np.float32)
    distances, rows, _ = retriever.search(queries, 50)
    if exact:
        again = exact_distances(queries, rows, store, metric)
        np.testing.assert_allclose(distances, again, rtol=1e-5, atol=1e-5)
    assert open_retriever(store, Search("flat", metric, 8)).exact is (metric != "l2")
