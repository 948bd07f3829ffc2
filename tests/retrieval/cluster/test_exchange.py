"""Rows and files that ranks give one another, where each reaches but one shard."""

import numpy as np
import pytest
from several_ranks import run

from neighborlm.common.errors import InputError
from neighborlm.retrieval.cluster.exchange import Exchange, ExchangedArray, share_files
from neighborlm.retrieval.cluster.ranks import Ranks
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.sharded_builder import new_datastore

N, D, SHARDS = 500, 6, 3


@pytest.fixture(params=[("contiguous", 1), ("round_robin", 7)])
def store(request, tmp_path) -> Datastore:
    """In three shards."""
    kind, block_rows = request.param
    nothing = np.empty(0, dtype=np.int64)
    like = (tmp_path / "store", N, D, "fp16", 50, {"model": "m"}, nothing, SHARDS, kind)
    builder = new_datastore(*like, block_rows=block_rows)
    rng = np.random.default_rng(0)
    builder.write(np.arange(N), rng.normal(size=(N, D)), rng.integers(0, 50, N))
    builder.sync()
    return builder.finish()


def asked_by(rank: int) -> list[np.ndarray]:
    """Rows that a rank reads, one array after another; the last rank none at first."""
    rng = np.random.default_rng(rank)
    return [rng.integers(-N, N, (5, 4)), rng.integers(0, N, 90 if rank < 3 else 0), np.arange(N)]


def read(rank: int, path) -> tuple[list, dict]:
    """What a rank reads of keys and values, where ranks 0 and 3 are of one host."""
    shard = Datastore.open(path, rank % SHARDS)
    exchange = Exchange(shard, Ranks.connect(60))
    arrays = [ExchangedArray(own, exchange) for own in (shard.keys, shard.values)]
    found = [[array[rows] for rows in asked_by(rank)] for array in arrays]
    return found, exchange.ranks.traffic


def test_rows_of_all_shards(store, tmp_path):
    for rank, (found, traffic) in enumerate(run(4, tmp_path / "ranks", read, store.path)):
        for array, parts in zip((store.keys, store.values), found, strict=True):
            for rows, part in zip(asked_by(rank), parts, strict=True):
                assert part.dtype == array.dtype
                np.testing.assert_array_equal(part, np.asarray(array)[rows])
        assert traffic["bytes_sent"] > N * D * 2 or rank == 3  # which nobody asks


def read_of_two(rank: int, path) -> None:
    Exchange(Datastore.open(path, rank), Ranks.connect(60))


def test_a_shard_that_no_host_has(store, tmp_path):
    with pytest.raises(InputError, match=r"no rank reaches the shards \[2\] of 3; expected each"):
        run(2, tmp_path / "ranks", read_of_two, store.path)


def share(rank: int, folder, held: dict[int, str]) -> list[str]:
    """What a rank's files say in the end, and what was made."""
    paths = [folder / str(rank) / name for name in ("a", "b")]
    paths[0].parent.mkdir()
    for path in paths if rank in held else paths[:1]:
        path.write_text(held.get(rank, "half of them"))

    def make() -> None:
        for path in paths:
            path.write_text("made")

    share_files(Ranks.connect(60), paths, make)
    assert {path.name for path in paths[0].parent.iterdir()} == {"a", "b"}
    return [path.read_text() for path in paths]


@pytest.mark.parametrize(("held", "said"), [({}, "made"), ({2: "held"}, "held")])
def test_files_come_from_the_first_that_has_them(tmp_path, held, said):
    assert run(3, tmp_path / "ranks", share, tmp_path, held) == [[said, said]] * 3


def test_files_that_differ_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"is another one on .* than on other hosts"):
        run(3, tmp_path / "ranks", share, tmp_path, {1: "one", 2: "another"})
