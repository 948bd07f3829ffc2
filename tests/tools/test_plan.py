"""The planner: its bytes against the files that the stages write, and what does not fit."""

import json
import math

import numpy as np
import pytest

from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.cache import RetrievalCacheBuilder
from neighborlm.retrieval.neighbors.codec import build_codes
from neighborlm.retrieval.neighbors.tables import NeighborSearch, TableSettings
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import open_retriever
from neighborlm.retrieval.store.datastore import DatastoreBuilder
from neighborlm.tools.plan import advice, main
from neighborlm.tools.plan_costs import Costs
from neighborlm.tools.plan_settings import Constants, Wanted, amount

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


def planned(**wanted) -> Costs:
    defaults = {"dim": DIM, "vocab": VOCAB, "cores": 1, "tokens_per_second": 1e4}
    return Costs(Wanted(**{**defaults, **wanted}), Constants())


@pytest.mark.parametrize("rows", [20_000, 160_000])
@pytest.mark.parametrize(
    "factory", ["IVF128,SQfp16", "IVF64,SQ8", "RR64,IVF128,RaBitQfs", "IVF32,PQ8"]
)
def test_bytes_are_those_of_the_files(new_store, rows, factory):
    store = new_store(rows)
    path = IndexBuilding(store, factory, "l2").run()
    bytes_of = planned(tokens=rows, index=factory).bytes
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
    NeighborSearch(store, store, open_retriever(store, "flat", "l2", 1), settings).run()
    RetrievalCacheBuilder(tmp_path / "cache", 3000, 64, VOCAB, {}).finish()
    bytes_of = planned(
        tokens=4000, index="flat", table_k=16, codec=codec, k=64, queries=3000, cache=True
    ).bytes
    assert bytes_of["index"] == 0
    files = {
        "neighbour table": store.path.glob("neighbors*"),
        "codes": codes.path.parent.glob("codes*"),
        "cache": (tmp_path / "cache").glob("*.*"),
    }
    for name, paths in files.items():
        assert sum(path.stat().st_size for path in paths) == pytest.approx(bytes_of[name], rel=0.2)


def test_large_indexes_need_room_for_their_parts():
    small, large = planned(tokens=1e6), planned(tokens=1e9, index="IVF65536,SQfp16")
    assert small.disk_needs["stays"] == small.disk_needs["at the most"]
    index = large.bytes["index"]
    assert large.disk_needs["at the most"] == pytest.approx(large.disk_needs["stays"] + index)


def test_everything_fits_where_there_is_room():
    costs = planned(tokens=1e6)
    assert costs.factory == "IVF2048,SQfp16"
    assert advice(costs) == []
    assert all(0 < seconds < math.inf for seconds in costs.seconds.values())


def test_changes_end_what_does_not_fit():
    costs = planned(tokens=1e9, dim=1024, memory="64GB", disk="2TB", index="IVF65536,SQfp16")
    found = {short["what"]: short for short in advice(costs)}
    assert set(found) == {"disk", "memory for search"}
    assert all(short["needed"] > short["there"] for short in found.values())
    assert found["disk"]["change"] == ["--hosts 4"]  # 6.2 TB while parts are merged
    assert "--hosts 64" in found["memory for search"]["change"]
    one_bit = "--index RR1024,IVF65536,RaBitQfs"
    assert one_bit not in found["memory for search"]["change"]  # 144 GB


def test_training_needs_memory_for_its_sample():
    costs = planned(tokens=1e10, dim=1024, memory="64GB", hosts=64)
    short = next(s for s in advice(costs) if s["what"] == "memory for index training")
    assert costs.shape.lists == 262144
    assert "--index RR1024,IVF131072,RaBitQfs" in short["change"]


def test_hosts_share_the_keys_and_send_queries():
    one, four = (planned(tokens=1e8, dim=256, hosts=hosts, memory="1TB") for hosts in (1, 4))
    assert one.network_bytes == 0
    assert not four.rescores
    assert four.network_bytes == 3 / 4 * (4 * 256 + 1024 * 10)  # fp32, 4 bytes, uint16
    assert four.bytes["keys"] == pytest.approx(one.bytes["keys"] / 4, rel=1e-6)
    assert four.queries_per_second > one.queries_per_second
    large = planned(tokens=1e10, hosts=4)  # rows beyond 2^31, and distances to stored keys
    assert large.network_bytes == 3 / 4 * (4 * DIM + 1024 * 18)


def test_hosts_make_tables_and_codes_of_their_own_shards():
    wanted = {"tokens": 1e8, "dim": 256, "index": "IVF16384,SQfp16", "memory": "1TB"}
    one, two, four = (planned(**wanted, hosts=hosts, table_k=32) for hosts in (1, 2, 4))
    searching = one.seconds["neighbour table"]
    choosing = 3e8 * 2 * 16384 * 256 / (1e9 * one.constants.assign_gflops)  # in three more shards
    assert four.seconds["neighbour table"] == pytest.approx((searching + choosing) / 4)
    codes = [costs.seconds["codes"] for costs in (one, two, four)]
    # Encoding is divided, training is not.
    assert codes[0] - codes[1] == pytest.approx(2 * (codes[1] - codes[2]))
    assert codes[2] > codes[0] / 4


@pytest.mark.parametrize(
    ("index", "dtype", "rescores"),
    [
        ("flat", "fp16", True),
        ("torch", "fp16", False),
        ("IVF64,SQfp16", "fp16", False),
        ("IVF64,SQfp16", "fp32", True),
        ("IVF64,Flat", "fp32", False),
        ("IVF64,SQ8", "fp16", True),
    ],
)
def test_stored_keys_are_read_again_where_distances_are_not_exact(index, dtype, rescores):
    wanted = {"tokens": 1e6, "index": index, "dtype": dtype}
    assert ("stored keys" in planned(**wanted).search_parts) == rescores
    assert "stored keys" not in planned(**wanted, distances="index").search_parts


def test_an_index_larger_than_memory_waits_for_the_disk():
    little, enough = (
        planned(tokens=1e8, dim=512, index="IVF16384,SQfp16", memory=memory)
        for memory in ("16GB", "256GB")
    )
    assert enough.search_parts["disk"] == 0
    assert little.search_parts["disk"] > sum(enough.search_parts.values())


def test_amounts():
    assert amount("64GB", "memory") == 64e9
    assert amount("1.5 GiB", "memory") == 1.5 * 2**30
    assert amount("10Gbit/s", "network", "bit") == 1e10
    for text in ("much", "-1GB", "3 GBit", ""):
        with pytest.raises(InputError, match=r"--memory is .*; expected such as 64GB"):
            amount(text, "memory")


def test_program(tmp_path, capsys):
    constants = tmp_path / "constants.json"
    constants.write_text(json.dumps({"constants": {"list_gflops": 80}}))
    flags = "--tokens 103e6 --dim 1024 --k 1024 --index auto --hosts 4 --memory 64GB --disk 2TB "
    flags += "--queries 250e3 --nprobe 32 --dtype fp16 --vocab 267744 --cores 16 --network 10Gbit"
    files = ["--constants", str(constants), "--output", str(tmp_path / "plan.json")]
    main([*flags.split(), *files])
    said = capsys.readouterr().out
    assert "103,000,000 keys" in said
    assert "queries per second" in said
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["constants"]["list_gflops"] == 80
    assert written["index"] == "RR1024,IVF16384,RaBitQfs"
    assert written["keys_per_host"] == 25_750_000


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tokens", "100", "--k", "1024"], "--k is 1024, but there are only 100 keys"),
        (["--tokens", "1e6", "--hosts", "0"], "--hosts is 0; expected at least 1"),
        (["--tokens", "1e6", "--memory", "all"], "--memory is 'all'; expected such as 64GB"),
        (["--tokens", "1e6", "--index", "HNSW32"], "expected auto, flat, torch or inverted lists"),
        (["--tokens", "1e6", "--constants", "none.json"], "expected what benchmarks/constants.py"),
    ],
)
def test_refusals(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_evaluations_weigh_in_place_what_nobody_asks_for():
    wanted = {"tokens": 2e5, "dim": 128, "index": "IVF1024,SQfp16", "nprobe": 21}
    plain = planned(**wanted)
    assert set(plain.evaluation_parts) == {"lists", "decode", "products", "vote", "disk"}
    for asked_for in ({"cache": True}, {"hosts": 2}, {"dtype": "fp32"}):
        other = planned(**wanted, **asked_for)
        assert "vote" not in other.evaluation_parts
        assert "select" in other.evaluation_parts
        assert sum(other.search_parts.values()) > sum(plain.evaluation_parts.values())
    few_lists = planned(**{**wanted, "index": "IVF16,SQfp16", "nprobe": 8})
    assert few_lists.candidates > 32 * 1024
    assert "select" in few_lists.evaluation_parts  # by a sieve
