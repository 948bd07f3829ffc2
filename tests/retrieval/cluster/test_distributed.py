"""Search by several ranks against search of the whole by one, and what becomes of the others when
one of them is lost."""

import os
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from several_ranks import results, run, start

from neighborlm.callbacks.index_builder import IndexBuilder
from neighborlm.common.errors import InputError, LostRank
from neighborlm.retrieval.cluster.distributed import DistributedRetriever, local_k, open_distributed
from neighborlm.retrieval.cluster.ranks import HEADER_BYTES
from neighborlm.retrieval.search import Search
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.faiss_retriever import FaissRetriever
from neighborlm.retrieval.search.index import open_retriever, open_shards
from neighborlm.retrieval.search.rescoring import exact_distances
from neighborlm.retrieval.search.retriever import FlatRetriever
from neighborlm.retrieval.search.sharded_retriever import ShardedRetriever
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.sharded_builder import new_datastore

N, D, K = 600, 8, 60
MASKED = np.array([0, 1, 77, 300, 599])
QUERIES = np.random.default_rng(7).normal(size=(120, D)).astype(np.float32)


@pytest.fixture
def make_sharded(tmp_path):
    """Makes a datastore of random keys in shards."""

    def make(shards: int, kind: str, block_rows: int = 1, keys: np.ndarray | None = None):
        rng = np.random.default_rng(3)
        keys = rng.normal(size=(N, D)).astype(np.float32) if keys is None else keys
        path = tmp_path / f"{kind}-{shards}-{block_rows}"
        like = (path, N, D, "fp32", 50, {"model": "m"}, MASKED, shards, kind)
        builder = new_datastore(*like, block_rows=block_rows)
        builder.write(np.arange(N), keys, rng.integers(0, 50, N))
        builder.sync()
        return builder.finish()

    return make


def batches(rank: int) -> list[np.ndarray]:
    """As many as the rank's number, of several sizes: rank 0 has none."""
    own = QUERIES[rank::4]
    return np.split(own, np.cumsum(np.arange(1, rank)) * 4)[:rank]


def search(rank: int, path, metric: str, k: int, tolerance: float, index: str = "flat"):
    """What a rank finds in two passes, and what that took."""
    retriever = open_distributed(
        Datastore.open(path), Search(index, metric, nprobe=3), rescore=True
    )
    retriever.tolerance = tolerance
    passes = []
    for _ in range(2):
        retriever.begin_pass()
        found = [retriever.search(queries, k)[:2] for queries in batches(rank)]
        retriever.end_pass()
        passes.append((found, retriever.communication))
    return passes


def recall(store: Datastore, found: list) -> float:
    """Share of the exact neighbours that all ranks have found."""
    share = []
    for rank, passes in enumerate(found):
        for queries, (_, rows) in zip(batches(rank), passes[0][0], strict=True):
            _, nearest, _ = FlatRetriever(store, "l2").search(queries, K)
            share += [np.isin(a, b).mean() for a, b in zip(nearest, rows, strict=True)]
    return float(np.mean(share))


def missing_last(metric: str) -> float:
    return np.finfo(np.float32).max * (1 if metric == "l2" else -1)


@pytest.mark.parametrize(
    ("ranks", "shards", "kind", "metric", "k"),
    [
        (2, 5, "round_robin", "l2", K),
        (3, 3, "contiguous", "ip", K),
        (4, 2, "round_robin", "cosine", N),  # ranks without shards, and more than there are keys
    ],
)
def test_equals_search_of_the_whole(make_sharded, tmp_path, ranks, shards, kind, metric, k):
    store = make_sharded(shards, kind)
    found = run(ranks, tmp_path / "ranks", search, store.path, metric, k, 1e-6)
    whole = FlatRetriever(store, metric)
    for rank, passes in enumerate(found):
        for answers, _ in passes:
            assert len(answers) == rank
            for queries, (distances, rows) in zip(batches(rank), answers, strict=True):
                expected, nearest, _ = whole.search(queries, k)
                assert (distances.dtype, rows.dtype) == (np.float32, np.int64)
                np.testing.assert_array_equal(rows, nearest)
                there = rows >= 0
                np.testing.assert_allclose(distances[there], expected[there], rtol=1e-4, atol=1e-5)
                assert (distances[~there] == missing_last(metric)).all()
                assert (there.sum(axis=1) == min(k, N - len(MASKED))).all()


@pytest.mark.parametrize("index", ["flat", "torch"])
def test_alone(make_sharded, index):
    """Without other ranks it is the search of all shards."""
    store = make_sharded(3, "contiguous")
    retriever = open_distributed(store, Search(index, "l2", nprobe=1), rescore=True)
    retriever.begin_pass()
    distances, rows, _ = retriever.search(QUERIES, K)
    retriever.end_pass()
    assert retriever.communication == {}
    expected, nearest, _ = FlatRetriever(store, "l2").search(QUERIES, K)
    np.testing.assert_array_equal(rows, nearest)
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-5)


def test_an_index_finds_what_it_finds_in_one_piece(make_sharded, tmp_path):
    """Its quantiser is trained on keys of all shards, and what travels are exact distances."""
    store = make_sharded(3, "round_robin", 16)
    IndexBuilding(store, "IVF7,SQ8", "l2").run()
    whole = open_retriever(store, Search("IVF7,SQ8", "l2", nprobe=3))
    assert isinstance(whole, FaissRetriever)
    expected = [whole.search(queries, K) for queries in batches(3)]
    for file in store.path.glob("*.faiss*"):
        file.unlink()
    trained = IndexBuilding(store, "IVF7,SQ8", "l2").train()
    for number in range(3):
        IndexBuilding(store.shard(number), "IVF7,SQ8", "l2", trained=trained).run()
    of_shards = open_retriever(store, Search("IVF7,SQ8", "l2", nprobe=3))
    assert isinstance(of_shards, ShardedRetriever)
    for queries, theirs in zip(batches(3), expected, strict=True):
        ours = of_shards.search(queries, K)
        np.testing.assert_array_equal(ours[1], theirs[1])
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    found = run(4, tmp_path / "ranks", search, store.path, "l2", K, 1e-6, "IVF7,SQ8")
    for queries, ours, theirs in zip(batches(3), found[3][0][0], expected, strict=True):
        np.testing.assert_array_equal(ours[1], theirs[1])
        exact = exact_distances(queries, theirs[1], store, "l2")
        np.testing.assert_array_equal(ours[0], exact)
    assert recall(store, found) < 1


# -- how many each rank is asked for -------------------------------------------------------------


@pytest.mark.parametrize(("k", "shares"), [(64, 4), (1024, 2), (1024, 16), (5, 3)])
def test_a_rank_seldom_has_more_neighbours_than_it_is_asked_for(k, shares):
    """By dealing keys at random, as often as it takes to see probabilities of one in a hundred."""
    rng = np.random.default_rng(0)
    there = rng.hypergeometric(20 * k // shares, 20 * k - 20 * k // shares, k, size=200_000)
    for tolerance in (0.3, 0.01, 1e-4):
        asked = local_k(k, 1 / shares, tolerance)
        assert (there > asked).mean() <= tolerance
    replaced, asked = rng.binomial(k, 1 / shares, size=200_000), local_k(k, 1 / shares, 0.01)
    assert (replaced > asked).mean() < 0.011
    assert (replaced >= asked).mean() > 0.009  # no fewer would do
    assert [local_k(k, share, 1e-9) for share in (0.0, 1.0)] == [0, k]


def test_ranks_are_asked_for_fewer_and_nothing_is_lost(make_sharded, tmp_path, monkeypatch):
    dealt = make_sharded(2, "round_robin")
    found = run(2, tmp_path / "dealt", search, dealt.path, "l2", K, 1e-3)
    assert recall(dealt, found) == 1
    few = found[1][0][1]
    assert few["asked_again"] == 0

    whole = make_sharded(2, "contiguous")
    found = run(2, tmp_path / "contiguous", search, whole.path, "l2", K, 1e-3)
    assert few["bytes_received"] < 0.8 * found[1][0][1]["bytes_received"]

    # Neighbours that lie together: all of a query's are in one shard.
    keys = np.random.default_rng(3).normal(size=(N, D)).astype(np.float32)
    keys[:, 0] += 50 * (np.arange(N) // 100 % 2)
    lumps = make_sharded(2, "round_robin", 100, keys)
    found = run(2, tmp_path / "lumps", search, lumps.path, "l2", K, 1e-3)
    assert recall(lumps, found) == 1
    assert found[1][0][1]["asked_again"] == len(batches(1)[0])


# -- hosts that share no files -------------------------------------------------------------------


def search_own_shard(rank: int, folder, index: str):
    """On a host that has the manifest of the whole and one shard; ranks 2 and 3 share one."""
    number = min(rank, 2)
    store = Datastore.open(folder / f"host{number}", shard=number)
    retriever = open_distributed(store, Search(index, "l2", nprobe=3), rescore=True)
    retriever.begin_pass()
    found = [retriever.search(queries, K) for queries in batches(rank)]
    retriever.end_pass()
    return found


@pytest.fixture
def hosts(make_sharded, tmp_path):
    """The whole, and a directory for each host."""
    store = make_sharded(3, "round_robin", 16)
    for number in range(3):
        shard = store.shard(number).path
        shutil.copytree(shard, tmp_path / f"host{number}" / shard.name)
        shutil.copy(store.path / "manifest.json", tmp_path / f"host{number}")
    return store


@pytest.mark.parametrize("index", ["flat", "IVF7,SQ8"])
def test_hosts_that_share_no_files_find_what_one_finds(hosts, tmp_path, index):
    """One trains on its keys, and the others begin with that."""
    for number in range(3):
        for file in (tmp_path / "host0").glob("*.trained*") if number else ():
            shutil.copy(file, tmp_path / f"host{number}")
        IndexBuilder(tmp_path / f"host{number}", Search(index, "l2"), shard=number).build()
    for file in (tmp_path / "host0").glob("*.trained*"):
        shutil.copy(file, hosts.path)
    IndexBuilder(hosts.path, Search(index, "l2")).build()
    whole = open_retriever(hosts, Search(index, "l2", nprobe=3))
    found = run(4, tmp_path / "ranks", search_own_shard, tmp_path, index)
    for rank, answers in enumerate(found):
        for queries, (distances, rows, values) in zip(batches(rank), answers, strict=True):
            _, nearest, _ = whole.search(queries, K)
            np.testing.assert_array_equal(rows, nearest)
            np.testing.assert_array_equal(distances, exact_distances(queries, rows, hosts, "l2"))
            np.testing.assert_array_equal(values[rows >= 0], hosts.values[rows[rows >= 0]])


def test_shards_that_do_not_fit_together_are_refused(hosts, tmp_path):
    with pytest.raises(InputError, match=r"no rank reaches the shards \[2\] of 3"):
        run(2, tmp_path / "two", search_own_shard, tmp_path, "flat")
    for number in range(3):
        seed = 2 if number == 1 else 1
        IndexBuilder(tmp_path / f"host{number}", Search("IVF7,SQ8", "l2"), seed, number).build()
    with pytest.raises(InputError, match=r"its index began with .* but those of other ranks"):
        run(3, tmp_path / "three", search_own_shard, tmp_path, "IVF7,SQ8")


# -- what travels --------------------------------------------------------------------------------


def test_communication_is_counted(make_sharded, tmp_path):
    """Headers and queries to every rank, distances, rows and values from each."""
    store = make_sharded(3, "contiguous")
    found = run(3, tmp_path / "ranks", search, store.path, "l2", K, 1e-6)
    counts = [passes[0][1] for passes in found]
    assert counts == [
        {**passes[1][1], "seconds_searching": count["seconds_searching"]}
        for passes, count in zip(found, counts, strict=True)
    ]
    rounds = 3  # rank 2 has two batches, and then all say that they have none
    assert [count["rounds"] for count in counts] == [rounds] * 3
    sizes = [sum(map(len, batches(rank))) for rank in range(3)]
    headers = 2 * HEADER_BYTES * (2 * rounds - 1)
    neighbor = 4 + 2 + 1 + 4  # distance, one of 600 rows and 50 values, distance to the stored key
    for rank, count in enumerate(counts):
        others = sum(sizes) - sizes[rank]
        assert count["bytes_sent"] == headers + 2 * sizes[rank] * D * 4 + others * K * neighbor
        assert count["bytes_received"] == headers + others * D * 4 + 2 * sizes[rank] * K * neighbor
        assert count["seconds_searching"] > 0


# -- ranks that are lost -------------------------------------------------------------------------


class Dies:
    """The third search of rank 1 is its last."""

    exact, trained = True, None

    def __init__(self, rank: int, how: str, retriever) -> None:
        self.rank = rank
        self.how = how
        self.retriever = retriever
        self.searches = 0

    def search(self, queries, k, ordered=True):
        self.searches += 1
        if self.rank == 1 and self.searches == 3:
            if self.how == "fails":
                raise ValueError("no search today")
            os.kill(os.getpid(), signal.SIGKILL if self.how == "is killed" else signal.SIGSTOP)
        if self.rank == 2:
            time.sleep(0.3)  # comes later than rank 0
        return self.retriever.search(queries, k)


def search_and_die(rank: int, path, how: str, timeout: float):
    store = Datastore.open(path)

    def opening(numbers):
        return Dies(rank, how, open_shards(store, numbers, Search("flat", "l2", 1)))

    retriever = DistributedRetriever(store, opening, "l2", True, timeout)
    retriever.begin_pass()
    for first in range(rank, 100, 10):
        retriever.search(QUERIES[first : first + 5], 9)
    retriever.end_pass()


@pytest.mark.parametrize(
    ("how", "said", "timeout"),
    [
        ("is killed", "has ended", 60),
        ("fails", "has failed", 60),
        ("is stopped", "has said nothing for 2 seconds", 2),
    ],
)
def test_a_lost_rank_stops_the_others(make_sharded, tmp_path, how, said, timeout):
    store = make_sharded(3, "contiguous")
    begin = time.monotonic()
    processes = start(3, tmp_path / "ranks", search_and_die, store.path, how, timeout)
    ends = results(processes, tmp_path / "ranks", [0, 2], seconds=30)
    assert time.monotonic() - begin < 25
    for end in ends:
        assert isinstance(end, LostRank)
        assert re.match(f"rank 1 on {re.escape(socket.gethostname())} {said}", str(end))
        assert "\n" not in str(end)


def test_the_failing_rank_says_why(make_sharded, tmp_path):
    store = make_sharded(3, "contiguous")
    processes = start(3, tmp_path / "ranks", search_and_die, store.path, "fails", 60)
    (end,) = results(processes, tmp_path / "ranks", [1])
    assert str(end) == "no search today"
