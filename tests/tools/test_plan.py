"""The planner: its bytes beside the files that the stages write, and what does not fit."""

import json

import numpy as np
import pytest

from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.cache import TOP, Extent
from neighborlm.retrieval.memories.cache_builder import RetrievalCacheBuilder
from neighborlm.retrieval.neighbors.codec import build_codes
from neighborlm.retrieval.neighbors.tables import NeighborSearch, TableSettings
from neighborlm.retrieval.search import Search
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import open_retriever
from neighborlm.retrieval.store.datastore import DatastoreBuilder
from neighborlm.tools.plan import (
    Wanted,
    advice,
    amount,
    in_memory,
    main,
    most_on_disk,
    on_disk,
    sent,
)

DIM, VOCAB = 64, 20_000


@pytest.fixture
def new_store(tmp_path):
    """Makes a datastore of random keys."""

    def make(rows: int):
        rng = np.random.default_rng(0)
        nothing = np.empty(0, np.int64)
        builder = DatastoreBuilder(tmp_path / "store", rows, DIM, "fp16", VOCAB, {}, nothing)
        keys = rng.standard_normal((rows, DIM), dtype=np.float32)
        builder.write(np.arange(rows), keys, rng.integers(0, VOCAB, rows))
        builder.sync()
        return builder.finish()

    return make


def wanted(**others) -> Wanted:
    return Wanted(**{"dim": DIM, "vocab": VOCAB, **others})


@pytest.mark.parametrize("rows", [20_000, 160_000])
@pytest.mark.parametrize(
    "factory", ["IVF128,SQfp16", "IVF64,SQ8", "RR64,IVF128,RaBitQfs", "IVF32,PQ8"]
)
def test_bytes_are_those_of_the_files(new_store, rows, factory):
    store = new_store(rows)
    path = IndexBuilding(store, factory, "l2").run()
    bytes_of = on_disk(wanted(tokens=rows, index=factory))
    assert path.stat().st_size == pytest.approx(bytes_of["index"], rel=0.02)
    for name in ("keys", "values"):
        assert (store.path / f"{name}.npy").stat().st_size == bytes_of[name]
    others = sum((store.path / name).stat().st_size for name in ("checksums.npy", "manifest.json"))
    assert 0.2 < others / bytes_of["checksums and manifest"] < 5
    found = sum(file.stat().st_size for file in store.path.iterdir())
    assert found == pytest.approx(sum(bytes_of.values()), rel=0.02)


def test_bytes_of_tables_codes_and_caches(new_store, tmp_path):
    store = new_store(4000)
    codec = "PQ8"
    codes = build_codes(store, codec)
    settings = TableSettings("l2", "flat", 1, 16)
    NeighborSearch(store, store, open_retriever(store, Search("flat", "l2", 1)), settings).run()
    extent = Extent(len(store), TOP)
    RetrievalCacheBuilder(tmp_path / "cache", 3000, 64, VOCAB, {}, extent).finish()
    plan = {"table_k": 16, "codec": codec, "k": 64, "queries": 3000, "cache": True}
    bytes_of = on_disk(wanted(tokens=4000, index="flat", **plan))
    assert bytes_of["index"] == 0
    files = {
        "neighbour table": store.path.glob("neighbors*"),
        "codes": codes.path.parent.glob("codes*"),
        "cache": (tmp_path / "cache").glob("*.*"),
    }
    for name, paths in files.items():
        assert sum(path.stat().st_size for path in paths) == pytest.approx(bytes_of[name], rel=0.2)


def test_large_indexes_need_room_for_their_parts():
    small, large = wanted(tokens=1e6), wanted(tokens=1e9, index="IVF65536,SQfp16")
    assert most_on_disk(small) == sum(on_disk(small).values())
    products = on_disk(large)
    assert most_on_disk(large) == pytest.approx(sum(products.values()) + products["index"])


def test_a_datastore_that_is_written_needs_room_for_its_marks():
    products = on_disk(wanted(tokens=1e6, index="flat"))
    assert most_on_disk(wanted(tokens=1e6, index="flat")) == sum(products.values()) + 1e6


def test_everything_fits_where_there_is_room():
    small = wanted(tokens=1e6)
    assert small.factory == "IVF2048,SQfp16"
    assert advice(small) == []


def test_changes_end_what_does_not_fit():
    large = wanted(tokens=1e9, dim=1024, memory="64GB", disk="2TB", index="IVF65536,SQfp16")
    found = {short["what"]: short for short in advice(large)}
    assert set(found) == {"disk", "memory for search"}
    assert all(short["needed"] > short["there"] for short in found.values())
    assert found["disk"]["change"] == ["--hosts 4"]  # 6.2 TB while parts are merged
    assert "--hosts 64" in found["memory for search"]["change"]
    one_bit = "--index RR1024,IVF65536,RaBitQfs"
    assert one_bit not in found["memory for search"]["change"]  # 144 GB


def test_half_precision_is_a_change():
    large = wanted(tokens=1e8, dim=1024, dtype="fp32", disk="300GB", index="flat")
    assert advice(large)[0]["change"] == ["--dtype fp16", "--hosts 2"]


def test_training_needs_memory_for_its_sample():
    large = wanted(tokens=1e10, dim=1024, memory="64GB", hosts=64)
    short = next(s for s in advice(large) if s["what"] == "memory for index training")
    assert large.shape.lists == 262144
    assert "--index RR1024,IVF131072,RaBitQfs" in short["change"]


def test_hosts_share_the_keys_and_send_queries():
    one, four = (wanted(tokens=1e8, dim=256, hosts=hosts, memory="1TB") for hosts in (1, 4))
    assert sent(one) == 0
    assert sent(four) == 3 / 4 * (4 * 256 + 1024 * 10)  # fp32, 4 bytes, uint16
    assert on_disk(four)["keys"] == pytest.approx(on_disk(one)["keys"] / 4, rel=1e-6)
    assert in_memory(four)["search"] < in_memory(one)["search"]
    large = wanted(tokens=1e10, hosts=4)  # rows beyond 2^31, and distances to stored keys
    assert sent(large) == 3 / 4 * (4 * DIM + 1024 * 18)


@pytest.mark.parametrize(
    ("index", "dtype", "bytes_of_distances"),
    [
        ("flat", "fp16", 8),
        ("torch", "fp16", 4),
        ("IVF64,SQfp16", "fp16", 4),
        ("IVF64,SQfp16", "fp32", 8),
        ("RR64,IVF64,SQfp16", "fp16", 8),
        ("IVF64,Flat", "fp32", 4),
        ("IVF64,SQ8", "fp16", 8),
    ],
)
def test_distances_to_stored_keys_are_sent_where_others_are_not_exact(
    index, dtype, bytes_of_distances
):
    plan = {"tokens": 1e6, "index": index, "dtype": dtype, "hosts": 2, "k": 64}
    assert sent(wanted(**plan)) == (4 * DIM + 64 * (bytes_of_distances + 4 + 2)) / 2
    assert sent(wanted(**plan, distances="index")) == (4 * DIM + 64 * (4 + 4 + 2)) / 2


def test_amounts():
    assert amount("64GB", "memory") == 64e9
    assert amount("1.5 GiB", "memory") == 1.5 * 2**30
    assert amount("2T", "disk") == 2e12
    for text in ("much", "-1GB", "3 GBit", ""):
        with pytest.raises(InputError, match=r"--memory is .*; expected such as 64GB"):
            amount(text, "memory")


def test_program(tmp_path, capsys):
    flags = "--tokens 103e6 --dim 1024 --k 1024 --index auto --hosts 4 --memory 4GB --disk 2TB"
    main([*flags.split(), "--output", str(tmp_path / "plan.json")])
    said = capsys.readouterr().out
    assert "103,000,000 keys" in said
    assert "memory for index training: " in said
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["index"] == "RR1024,IVF16384,RaBitQfs"
    assert written["keys_per_host"] == 25_750_000
    assert written["bytes_per_host"]["keys"] == 128 + 25_750_000 * 2048
    assert written["does_not_fit"][0]["there"] == 4e9


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tokens", "100", "--k", "1024"], "--k is 1024, but there are only 100 keys"),
        (["--tokens", "1e6", "--hosts", "0"], "--hosts is 0; expected at least 1"),
        (["--tokens", "1e6", "--memory", "all"], "--memory is 'all'; expected such as 64GB"),
        (["--tokens", "1e6", "--index", "HNSW32"], "expected auto, flat, torch or inverted lists"),
        (["--tokens", "1e6", "--cores", "4"], "--cores"),
    ],
)
def test_refusals(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
