"""Datastores in shards: where rows lie, and that nothing else differs from a datastore in one
piece."""

import json
import shutil

import numpy as np
import pytest
from running import kill_last_when
from small import SMALL, without_digests

from neighborlm.callbacks.neighbor_table_writer import NeighborTableWriter
from neighborlm.common.errors import InputError
from neighborlm.datamodules.graphs import NeighborMemory
from neighborlm.programs.settings import KNNSettings
from neighborlm.retrieval.neighbors.codec import build_codes, has_codes, open_codes
from neighborlm.retrieval.neighbors.tables import TableSettings, find_table
from neighborlm.retrieval.search import Search
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import open_retriever
from neighborlm.retrieval.search.retriever import FlatRetriever
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.maintenance import deal_again, put_together
from neighborlm.retrieval.store.sharded_builder import new_datastore
from neighborlm.retrieval.store.shards import Placement, ShardedArray, shard_name
from neighborlm.tools.datastore import main

RNG = np.random.default_rng(1)
KEYS = RNG.normal(size=(300, 8)).astype(np.float32)
VALUES = RNG.integers(0, 50, 300)
MASKED = np.array([0, 1, 74, 75, 76, 299])
ROWS = np.arange(300)
DEALT = [("contiguous", 4, 1), ("round_robin", 4, 16), ("round_robin", 3, 7), ("contiguous", 7, 1)]


# -- placement -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["contiguous", "round_robin"])
@pytest.mark.parametrize(
    ("rows", "shards", "block_rows"),
    [(300, 4, 16), (301, 3, 7), (7, 7, 3), (64, 4, 16), (65, 4, 16), (63, 4, 16), (1, 1, 5)],
)
def test_placement_against_dealing_row_by_row(kind, rows, shards, block_rows):
    placement = Placement.deal(rows, shards, kind, block_rows)
    hands = [[] for _ in range(shards)]
    size = -(-rows // shards)
    block = size if kind == "contiguous" else min(block_rows, size)
    for row in range(rows):
        hands[row // block % shards].append(row)
    if kind == "contiguous":
        assert [row for hand in hands for row in hand] == list(range(rows))
    assert [placement.size(number) for number in range(shards)] == list(map(len, hands))
    numbers, local = placement.locate(np.arange(rows))
    for number, hand in enumerate(hands):
        assert placement.rows_of(number, np.arange(-1, len(hand))).tolist() == [-1, *hand]
        assert np.flatnonzero(numbers == number).tolist() == hand
        assert local[numbers == number].tolist() == list(range(len(hand)))
    for first, last in ((0, rows), (rows // 3, rows), (rows // 3, 2 * rows // 3), (1, 1)):
        found = np.full(last - first, -1)
        for number, there, here in placement.runs(first, last):
            found[here] = np.array(hands[number])[there]
        assert found.tolist() == list(range(first, last))


def test_shards_without_rows_are_refused():
    with pytest.raises(InputError, match="5 rows in blocks of 2 fill only 3 of them"):
        Placement.deal(5, 4, "contiguous")


@pytest.mark.parametrize(("kind", "shards", "block_rows"), DEALT)
def test_arrays_are_indexed_as_one(kind, shards, block_rows):
    placement = Placement.deal(300, shards, kind, block_rows)
    numbers, _ = placement.locate(ROWS)
    array = ShardedArray([KEYS[numbers == number] for number in range(shards)], placement)
    assert (len(array), array.shape, array.dtype, array.ndim) == (300, (300, 8), KEYS.dtype, 2)
    grid = RNG.integers(-300, 300, (6, 5))
    indices = (grid, grid[:0], [3, 1], 7, -1, np.int64(9), KEYS[:, 0] > 0, slice(None))
    indices += (slice(10, 200), slice(-5, None), slice(3, 4), slice(9, 2), slice(None, None, -3))
    for index in indices:
        found = array[index]
        np.testing.assert_array_equal(found, KEYS[index])
        assert found.shape == KEYS[index].shape
    np.testing.assert_array_equal(np.asarray(array, dtype=np.float64), KEYS)
    for outside in ([300], [-301]):
        with pytest.raises(IndexError):
            array[outside]


@pytest.mark.parametrize("shard", [-1, 4])
def test_flags_that_name_no_shard_are_refused(shard):
    with pytest.raises(InputError, match=f"--knn.shard is {shard} and --knn.shards 4"):
        KNNSettings(shards=4, shard=shard).check()


# -- writing -------------------------------------------------------------------------------------


def builder_of(path, kind, shards, block_rows, masked=MASKED, made_from=("m", 1), only=None):
    return new_datastore(
        path,
        300,
        8,
        "fp32",
        50,
        dict([made_from]),
        masked,
        shards,
        kind,
        only,
        block_rows,
    )


def write(builder, rows=ROWS):
    builder.write(rows, KEYS[rows], VALUES[rows])
    builder.sync()


def files(path):
    """Name and content of all data files."""
    return {p.relative_to(path): p.read_bytes() for p in sorted(path.rglob("*.npy"))}


@pytest.fixture
def whole(tmp_path):
    """The same content in one directory."""
    builder = builder_of(tmp_path / "whole", "contiguous", 1, 1)
    write(builder)
    return builder.finish()


@pytest.fixture(params=DEALT, ids=str)
def sharded(request, tmp_path):
    builder = builder_of(tmp_path / "dealt", *request.param)
    write(builder)
    return builder.finish()


def test_nothing_but_the_place_differs(whole, sharded):
    assert sharded.fingerprint == whole.fingerprint
    assert sharded.n_keys == whole.n_keys
    assert sharded.masked.tolist() == whole.masked.tolist()
    np.testing.assert_array_equal(sharded.keys, whole.keys)
    np.testing.assert_array_equal(sharded.values, whole.values)
    for ours, theirs in zip(sharded.blocks(5, 17), whole.blocks(5, 17), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(sharded.sample(50, 3), whole.sample(50, 3), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for index in ("flat", "torch", "IVF4,SQfp16"):
        found = []
        for store in (whole, sharded):
            if index.startswith("IVF"):
                IndexBuilding(store, index, "l2").run()
            found.append(
                open_retriever(store, Search(index, "l2", 4)).search(KEYS[:20] + 0.1, 9)[:2]
            )
        np.testing.assert_array_equal(found[0], found[1])


def test_what_a_graph_network_reads_of_it_is_the_same(whole, sharded):
    """Codes and neighbour tables, which lie in the shards, and batches of them."""
    codes = [build_codes(store, "PQ4x4") for store in (whole, sharded)]
    np.testing.assert_array_equal(*(made.codes for made in codes))
    tables, features = [], []
    for store, made in zip((whole, sharded), codes, strict=True):
        search = Search("flat", "l2", 1)
        writer = NeighborTableWriter(store.path, store.path, search, 6, exclude_window=3)
        tables.append(writer.build())
        narrower = TableSettings("l2", "flat", 1, 4, exclude_window=3)
        assert find_table(store, store, narrower).nearest(4).shape == (300, 4)
        memory = NeighborMemory(
            tables[-1].nearest(4), made.codes, 2, 2, 3, None, store.keys, store.values
        )
        positions = np.array([[80, 81, 82, -1], [150, 151, -1, -1]])
        near = memory.neighborhood(positions)
        features.append([near.rows, near.features, near.values, memory.features_of(positions)])
    np.testing.assert_array_equal(*(table.rows for table in tables))
    for ours, theirs in zip(*features, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not list(sharded.path.glob("neighbors*.np*")) + list(sharded.path.glob("codes*.npy"))
    for shard in sharded.shards():
        for name in ("neighbors-k6.npy", "codes-PQ4x4.npy"):
            assert len(np.load(shard.path / name)) == len(shard)


def test_tables_and_codes_of_shards_that_are_there_are_kept(whole, sharded, monkeypatch):
    writer = NeighborTableWriter(sharded.path, sharded.path, Search("flat", "l2", 1), 5)
    last = sharded.shards()[-1].path
    real = Datastore.read

    def interrupted(store, rows):
        if store.path == last:
            raise KeyboardInterrupt
        return real(store, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Datastore, "read", interrupted)
        for work in (writer.build, lambda: build_codes(sharded, "SQ8")):
            with pytest.raises(KeyboardInterrupt):
                work()
    assert find_table(sharded, sharded, TableSettings("l2", "flat", 1, 5)) is None
    assert not has_codes(sharded, "SQ8")
    with pytest.raises(InputError, match=r"codes-SQ8.json: is unfinished"):
        open_codes(sharded, "SQ8")
    made = {p: p.stat().st_mtime_ns for p in sharded.path.rglob("*.npy") if p.parent != last}
    np.testing.assert_array_equal(
        build_codes(sharded, "SQ8").codes, build_codes(whole, "SQ8").codes
    )
    assert len(writer.build().rows) == 300
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert has_codes(sharded, "SQ8")


def test_codes_of_shards_by_different_codecs_are_refused(sharded):
    path = build_codes(sharded, "SQ8").path
    for suffix in (".json", ".faiss"):  # lost, and trained again on another sample
        path.with_suffix(suffix).unlink()
    with pytest.raises(InputError, match="its seed is 1, but 2 is expected"):
        build_codes(sharded, "SQ8", seed=2)
    without_digests(path, seed=1)
    with pytest.raises(InputError, match=r"shard-00000-of-0000\d/codes-SQ8.json: its codec is"):
        open_codes(sharded, "SQ8")


def test_a_shard_is_a_datastore_and_a_part(sharded):
    """Alone it counts its own rows; opened through the whole, those of the whole."""
    every, fingerprints = [], set()
    for number in range(sharded.n_shards):
        part = sharded.shard(number)
        alone = Datastore.open(part.path)
        fingerprints |= {alone.fingerprint}
        assert len(part) == len(alone) == alone.manifest["rows"]
        own, rows = (store.rows_of(np.arange(store.n_keys)) for store in (alone, part))
        np.testing.assert_array_equal(alone.read(own), sharded.read(rows))
        np.testing.assert_array_equal(part.read(rows), sharded.read(rows))
        np.testing.assert_array_equal(part.values[part.places_of(rows)], sharded.values[rows])
        every += rows.tolist()
        drawn, keys = part.sample(5, 1)
        np.testing.assert_array_equal(keys, KEYS[drawn])
    assert sorted(every) == np.setdiff1d(ROWS, MASKED).tolist()
    assert len(fingerprints) == sharded.n_shards
    with pytest.raises(ValueError, match="rows of other shards"):
        sharded.shard(0).read(sharded.shard(1).rows_of(np.array([0])))


def test_searching_the_shards_is_searching_the_whole(whole, sharded):
    distances, rows, _ = FlatRetriever(whole, "l2").search(KEYS[:20] + 0.1, 9)
    parts = [
        FlatRetriever(sharded.shard(number), "l2").search(KEYS[:20] + 0.1, 9)[:2]
        for number in range(sharded.n_shards)
    ]
    found, of = (np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True))
    nearest = np.argsort(found, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(np.take_along_axis(of, nearest, 1), rows)
    np.testing.assert_allclose(np.take_along_axis(found, nearest, 1), distances, rtol=1e-5)


@pytest.mark.parametrize("dealt", DEALT, ids=str)
def test_any_order_by_any_ranks_gives_the_same_bytes(tmp_path, dealt):
    write(builder_of(tmp_path / "a", *dealt))
    order = np.random.default_rng(3).permutation(300)
    ranks = [builder_of(tmp_path / "b", *dealt) for _ in range(2)]
    for rank, rows in zip((0, 1, 0), np.split(order[:180], 3), strict=True):
        write(ranks[rank], rows)
    ranks[1].write(order[180:200], KEYS[order[180:200]] + 1, VALUES[:20])  # killed before its sync
    del ranks
    ranks = [builder_of(tmp_path / "b", *dealt) for _ in range(3)]
    assert ranks[0].n_written == len(np.union1d(order[:180], MASKED))
    assert ranks[0].is_written(order[:180])
    assert not ranks[0].is_written(order[:181])
    for rank, rows in zip(ranks, np.split(order[150:], 3), strict=True):
        write(rank, rows)
    builder_of(tmp_path / "a", *dealt).finish()
    ranks[2].finish()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert Datastore.open(tmp_path / "b").manifest["complete"]


def test_a_run_that_was_killed_while_it_finished_goes_on(tmp_path):
    builder = builder_of(tmp_path / "s", *DEALT[1])
    write(builder)
    builder.builders[2].finish()
    assert not Datastore.is_complete(tmp_path / "s")
    again = builder_of(tmp_path / "s", *DEALT[1])
    assert again.n_written == again.n_rows == 300
    assert again.is_written(ROWS)
    np.testing.assert_array_equal(again.finish().values[2:74], VALUES[2:74])


def test_hosts_that_share_nothing_write_a_shard_each(tmp_path, sharded):
    dealt = sharded.manifest["placement"], sharded.n_shards, sharded.manifest["block_rows"]
    for number in range(sharded.n_shards):
        builder = builder_of(tmp_path / f"host{number}", *dealt, only=number)
        rows = np.flatnonzero(builder.is_wanted())
        np.testing.assert_array_equal(
            rows, sharded.shard(number).part.placement.rows_of(number, np.arange(len(rows)))
        )
        assert builder.is_written(np.setdiff1d(ROWS, rows))
        write(builder)  # also what is not its own
        made = builder.finish()
        assert files(made.path) == files(sharded.shard(number).path)
        whole = Datastore.open(made.path.parent, shard=number)
        assert whole.rows_of(np.array([0])) in rows
    assert not Datastore.is_complete(tmp_path / "host0")
    places = [next((tmp_path / f"host{number}").glob("shard*")) for number in range(dealt[1])]
    made = put_together(places[::-1], tmp_path / "together")
    np.testing.assert_array_equal(made.keys, sharded.keys)
    assert made.fingerprint == sharded.fingerprint
    for number in range(1, dealt[1]):
        shutil.move(places[number], tmp_path / "host0")
    np.testing.assert_array_equal(Datastore.open(tmp_path / "host0").keys, sharded.keys)
    with pytest.raises(InputError, match=f"shard 1 of {dealt[1]} is missing at .*host1"):
        Datastore.open(tmp_path / "together")
    with pytest.raises(InputError, match="each once"):
        put_together(places[:1] * 2, tmp_path / "twice")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": 2}, "its shards is 4, but 2 is expected"),
        ({"shards": 1}, "its shards is 4, but 1 is expected"),
        ({"kind": "contiguous"}, "its placement is round_robin, but contiguous is expected"),
        ({"block_rows": 8}, "its block rows is 16, but 8 is expected"),
        ({"made_from": ("m", 2)}, "its m is 1, but 2 is expected"),
        ({"masked": MASKED[1:]}, "its masked is 6, but 5 is expected"),
    ],
)
def test_another_datastore_in_the_making_is_refused(tmp_path, change, message):
    same = {"kind": "round_robin", "shards": 4, "block_rows": 16}
    builder_of(tmp_path / "s", **same)
    with pytest.raises(InputError, match=message):
        builder_of(tmp_path / "s", **{**same, **change})


def test_a_datastore_in_one_piece_is_not_continued_in_shards(tmp_path):
    builder_of(tmp_path / "s", "contiguous", 1, 1)
    with pytest.raises(InputError, match="its shards is 1, but 4 is expected"):
        builder_of(tmp_path / "s", *DEALT[0])


def test_a_shard_of_another_datastore_is_refused(tmp_path, sharded):
    builder = builder_of(tmp_path / "other", *DEALT[1], made_from=("m", 2))
    write(builder)
    builder.finish()
    place = sharded.shard(0).path
    shutil.rmtree(place)
    shutil.copytree(Datastore.open(tmp_path / "other", shard=0).path, place)
    with pytest.raises(InputError, match="its m is 2, but 1 is expected"):
        Datastore.open(sharded.path)


@pytest.mark.parametrize("short", [0, 1])
def test_room_is_counted_for_all_shards_of_a_disk(tmp_path, monkeypatch, short):
    """Keys of 8 floats, values of a byte and a mark each, and a page a shard for headers."""
    needed = 300 * (8 * 4 + 1 + 1) + 4 * 4096
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - short)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    if short:
        with pytest.raises(InputError, match="shard-00000-of-00004: 4 shards on its disk need"):
            builder_of(tmp_path / "s", *DEALT[1])
        assert not list(tmp_path.rglob("keys.npy"))
    else:
        assert len(builder_of(tmp_path / "s", *DEALT[1]).builders) == 4


# -- the program ---------------------------------------------------------------------------------


def test_split_and_merge(tmp_path, whole, capsys):
    places = {"source": whole.path, "output": tmp_path / "four"}
    flags = [text for name, path in places.items() for text in (f"--{name}", str(path))]
    main(["split", *flags, "--shards", "4", "--placement", "round_robin", "--block_rows", "16"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("four: 300 rows x 8 fp32, 9.9 kB, 4 shards round_robin, complete")
    deal_again(Datastore.open(tmp_path / "four"), tmp_path / "three", 3)
    main(["merge", "--source", str(tmp_path / "three"), "--output", str(tmp_path / "one")])
    assert files(tmp_path / "one") == files(whole.path)
    direct = builder_of(tmp_path / "direct", *DEALT[1])
    write(direct)
    direct.finish()
    assert files(tmp_path / "four") == files(tmp_path / "direct")


def test_a_killed_copy_goes_on(tmp_path, whole, monkeypatch):
    monkeypatch.setattr("neighborlm.retrieval.store.maintenance.BLOCK_BYTES", 40 * 32)
    monkeypatch.setattr("neighborlm.retrieval.store.maintenance.SYNC_SECONDS", 0.0)

    def stop(done, total):
        if done >= 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deal_again(whole, tmp_path / "cut", 3, report=stop)
    assert not Datastore.is_complete(tmp_path / "cut")
    made = deal_again(whole, tmp_path / "cut", 3)
    np.testing.assert_array_equal(made.keys, whole.keys)


def test_list(tmp_path, whole, sharded, capsys):
    write(builder_of(tmp_path / "half", *DEALT[1]), np.arange(2, 152))
    builder_of(tmp_path / "host", *DEALT[1], only=2)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps({"kind": "another"}))
    main(["list", "--path", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    named = [line.split(":")[0].split("/")[-1] for line in lines]
    assert named == ["dealt", "half", "host", "whole"]
    ends = ("complete", "unfinished, 51 % written", "without shard 0, 1, 3", "complete")
    for line, end in zip(lines, ends, strict=True):
        assert line.endswith(end)


def test_verify_names_the_damaged_shard(sharded, capsys):
    main(["verify", "--path", str(sharded.path)])
    assert f"{sharded.path}: is as it was written" in capsys.readouterr().out
    _, whole, damaged, *_ = (shard.path for shard in sharded.shards())
    keys = np.load(damaged / "keys.npy", mmap_mode="r+")
    keys[11, 3] += 1
    keys.flush()
    for path in (sharded.path, damaged):
        with pytest.raises(SystemExit):
            main(["verify", "--path", str(path)])
        said = capsys.readouterr().err
        assert str(damaged) in said
        assert f"keys.npy: rows 0 to {len(keys) - 1} are damaged: their checksum is" in said
    main(["verify", "--path", str(whole)])


# -- runs of several processes -------------------------------------------------------------------

HERE = (*SMALL, "--data.corpus", "words", "--save_datastore", "--knn.shards", 2)


def ranks(count):
    strategy = "ddp" if count > 1 else "auto"
    return ("--trainer.devices", count, "--trainer.strategy", strategy)


@pytest.mark.slow
def test_a_killed_rank_and_a_restart_with_other_ranks(workplace, run_program, tmp_path):
    """The second of two ranks is killed while both write; three go on."""
    flags = (*HERE, "--data.max_tokens", 24, "--data.break_mode", "complete")
    run_program(workplace, "evaluate.py", *flags, "--knn.datastore", tmp_path / "whole")
    cut = tmp_path / "cut"
    command = (*flags, *ranks(2), "--knn.datastore", cut)
    processes = run_program.start(workplace, "evaluate.py", [command] * 2)
    written = cut / shard_name(0, 2)
    kill_last_when(
        lambda: (
            (written / "checksums.npy").exists()
            and np.load(written / "keys.npy", mmap_mode="r").any()
        ),
        processes,
    )
    assert not Datastore.is_complete(cut)
    run_program(workplace, "evaluate.py", *flags, *ranks(3), "--knn.datastore", cut)
    assert files(cut) == files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.hosts
def test_hosts_dump_a_shard_each_and_all_search_it(workplace, run_program, tmp_path):
    """Rows of one length, in batches of one row: each host computes the very same keys."""
    flags = (*HERE, "--data.max_tokens", 24, "--knn.k", 8, "--knn.lmbda", 0.25)
    whole = ("--knn.datastore", tmp_path / "whole", "--knnlm", "--output", tmp_path / "whole.json")
    run_program(workplace, "evaluate.py", *flags, *whole)
    for number in range(2):
        place = ("--knn.shard", number, "--knn.datastore", tmp_path / f"host{number}")
        run_program(workplace, "evaluate.py", *flags, *place)
        alone = tmp_path / f"host{number}" / shard_name(number, 2)
        assert files(alone) == files(tmp_path / "whole" / alone.name)
    places = json.dumps([str(path) for path in tmp_path.glob("host*/shard-*")])
    together = ("--output", tmp_path / "all")
    run_program(workplace, "neighborlm", "datastore", "assemble", "--shards", places, *together)
    again = ("--knn.datastore", tmp_path / "all", "--knnlm", "--output", tmp_path / "all.json")
    run_program(workplace, "evaluate.py", *flags, *again)
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "all")]
    assert results[0]["knn"]["loss"] == results[1]["knn"]["loss"]
    assert "datastore" not in results[1]["stage_seconds"]
