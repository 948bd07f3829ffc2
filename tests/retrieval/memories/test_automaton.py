"""The automaton against a walk in plain Python, one token at a time, and what must hold of it
whatever the data."""

import math
from collections import Counter
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch

from neighborlm.common.contracts import Neighbors, Scored
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.automaton import (
    AutomatonMemory,
    AutomatonSettings,
    coded_distances,
)
from neighborlm.retrieval.memories.knn_memory import KNNMemory
from neighborlm.retrieval.memories.pointers import with_members
from neighborlm.retrieval.search import BaseRetriever
from neighborlm.retrieval.search.clusters import Clusters, cluster_count, ensure_clusters
from neighborlm.retrieval.store.datastore import Datastore

ROWS, DIM, VOCAB, K = 400, 4, 5, 16
TOKENS, WALK = 150, 40
TEMPERATURE = 0.7


class Brute(BaseRetriever):
    """Reads all keys for every query."""

    metric, exact = "l2", True

    def __init__(self, datastore: Datastore) -> None:
        self.rows = np.setdiff1d(np.arange(len(datastore)), datastore.masked)
        self.keys = datastore.read(self.rows)

    def search(self, queries, k, ordered=True):
        distances = np.square(queries[:, None] - self.keys).sum(axis=2)
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
        return Neighbors(np.take_along_axis(distances, nearest, axis=1), self.rows[nearest])


@pytest.fixture
def store(new_builder, tmp_path):
    """Makes a datastore with few values, so that pointers come true."""

    def make(masked=()) -> Datastore:
        rng = np.random.default_rng(0)
        keys = rng.normal(size=(ROWS, DIM)).astype(np.float32)
        values = rng.integers(0, VOCAB, ROWS)
        builder = new_builder(tmp_path / "store", ROWS, DIM, masked=np.array(masked, np.int64))
        builder.write(np.arange(ROWS), keys, values)
        builder.sync()
        return builder.finish()

    return make


@pytest.fixture
def asked() -> Scored:
    """Tokens in the order of a text that begins at position 7."""
    rng = np.random.default_rng(1)
    return Scored(
        torch.arange(7, 7 + TOKENS),
        torch.from_numpy(rng.integers(0, VOCAB, TOKENS)),
        keys={"last_ffn_input": torch.from_numpy(rng.normal(size=(TOKENS, DIM))).float()},
    )


def part_of(asked: Scored, part: slice | np.ndarray) -> Scored:
    """Some of the tokens."""
    keys = {name: key[part] for name, key in asked.keys.items()}
    return Scored(asked.positions[part], asked.targets[part], keys=keys)


def memory_of(datastore: Datastore, clusters: Clusters | None = None, **settings):
    """A memory in the state in which a pass begins."""
    settings = AutomatonSettings(**{"walk_length": WALK, "max_pointers": 60, **settings})
    memory = AutomatonMemory(
        datastore,
        Brute(datastore),
        K,
        TEMPERATURE,
        settings,
        clusters=clusters,
    )
    memory.begin_pass()
    return memory


def plain_walk(
    datastore: Datastore,
    asked: Scored,
    counting: str = "paper",
    min_pointers: int = 1,
    max_pointers: int = 60,
    labels: np.ndarray | None = None,
    ends: tuple[int, ...] = (),
):
    """Distributions over the vocabulary, which tokens were searched for, how many pointers each
    had, and which rows voted."""
    no_key = set(datastore.masked.tolist())
    with_key = [row for row in range(len(datastore)) if row not in no_key]
    values, keys = datastore.values.tolist(), np.asarray(datastore.keys, np.float64)
    pointers, result = [], []
    for position, target, query in zip(
        asked.positions.tolist(),
        asked.targets.tolist(),
        asked.keys["last_ffn_input"].double().numpy(),
        strict=True,
    ):
        if position % WALK == 0:
            pointers = []
        distance = ((query - keys) ** 2).sum(axis=1).tolist()
        voters, counted = list(pointers), len(pointers)
        if labels is not None and len(pointers) < max_pointers:
            votes = Counter(labels[row] for row in pointers)
            counted = len(votes) if counting == "paper" else counted
            for label in sorted(votes, key=lambda label: (-votes[label], label)):
                members = [row for row in range(len(datastore)) if labels[row] == label]
                if counting == "paper":
                    members = [row for row in members if row not in pointers]
                voters += members
        voters = voters[:max_pointers]
        searched = counted < min_pointers
        if searched:
            nearest = sorted(with_key, key=distance.__getitem__)[:K]
            if counting == "paper":
                voters = [row for row in voters if row not in nearest]
            voters = nearest + voters
        probs = np.zeros(VOCAB)
        for row in voters:
            probs[values[row]] += math.exp(-distance[row] / TEMPERATURE)
        result.append((probs / probs.sum(), searched, len(pointers), list(voters)))
        come_true = [row for row in voters if values[row] == target]
        come_true.sort(key=distance.__getitem__)
        stops = {len(datastore) - 1, *ends, *(row - 1 for row in no_key)}
        pointers = [row + 1 for row in come_true if row not in stops]
    probs, searched, pointed, voters = zip(*result, strict=True)
    return np.stack(probs), np.array(searched), np.array(pointed), voters


def labels_of(count: int = 20) -> np.ndarray:
    """Clusters of different sizes."""
    return np.minimum(np.random.default_rng(2).integers(0, 2 * count, ROWS), count - 1)


@pytest.mark.parametrize("counting", ["paper", "program"])
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("min_pointers", [1, 3, 1000])
def test_equals_a_plain_walk(store, asked, counting, clustered, min_pointers):
    datastore = store()
    labels = labels_of() if clustered else None
    clusters = Clusters.of(labels.astype(np.int32), 20) if clustered else None
    how = {"counting": counting, "min_pointers": min_pointers}
    memory = memory_of(datastore, clusters, **how)
    opinion = memory.say(asked)
    probs, searched, pointed, voters = plain_walk(datastore, asked, labels=labels, **how)
    of_targets = probs[np.arange(TOKENS), asked.targets]
    there = of_targets > 0
    np.testing.assert_allclose(opinion.log_probs[there].exp(), of_targets[there], rtol=1e-4)
    nothing = -10000 if counting == "program" else -np.inf
    assert (opinion.log_probs[~there] == nothing).all()
    np.testing.assert_array_equal(opinion.features["searched"], searched)
    np.testing.assert_array_equal(opinion.features["pointers"], pointed)
    if min_pointers == 3:
        assert 0 < searched.sum() < TOKENS
        assert max(map(len, voters)) > K  # pointers voted with neighbours
    if counting == "paper":
        assert memory.searches_saved == pytest.approx(1 - searched.mean())


@pytest.mark.parametrize("clustered", [False, True])
def test_distribution_sums_to_one_and_holds_the_target(store, asked, clustered):
    datastore = store()
    clusters = Clusters.of(labels_of().astype(np.int32), 20) if clustered else None
    memory = memory_of(datastore, clusters, min_pointers=2)
    ids, weights = memory.distribution(asked)[:2]
    probs = torch.zeros(TOKENS, VOCAB).scatter_add_(1, ids, weights)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(TOKENS))
    labels = labels_of() if clustered else None
    expected, *_ = plain_walk(datastore, asked, labels=labels, min_pointers=2)
    np.testing.assert_allclose(probs, expected, rtol=1e-4, atol=1e-7)
    # A question changes nothing of what is answered to the next one.
    of_targets = probs.gather(1, asked.targets[:, None])[:, 0]
    torch.testing.assert_close(memory.say(asked).log_probs.exp(), of_targets)


@pytest.mark.parametrize("t", [0, 1, 60, TOKENS - 1])
def test_what_comes_later_changes_nothing_before(store, asked, t):
    """A token's target says nothing of its own distribution or features, nor does what follows."""
    rng = np.random.default_rng(3)
    targets = asked.targets.clone()
    targets[t:] = torch.from_numpy(rng.integers(0, VOCAB, TOKENS - t))
    keys = asked.keys["last_ffn_input"].clone()
    keys[t + 1 :] = torch.from_numpy(rng.normal(size=(TOKENS - t - 1, DIM)))
    changed = asked._replace(targets=targets, keys={"last_ffn_input": keys})
    before = memory_of(store(), min_pointers=2)
    after = memory_of(before.datastore, min_pointers=2)
    distributions = before.distribution(asked)[:2], after.distribution(changed)[:2]
    for one, other in zip(*distributions, strict=True):
        width = min(one.shape[1], other.shape[1])
        assert torch.equal(one[: t + 1, :width], other[: t + 1, :width])
        assert not one[: t + 1, width:].any()
        assert not other[: t + 1, width:].any()
    one, other = before.say(asked), after.say(changed)
    assert torch.equal(one.log_probs[:t], other.log_probs[:t])
    for name, feature in one.features.items():
        assert torch.equal(feature[: t + 1], other.features[name][: t + 1])
    if t == 60:
        assert not torch.equal(one.features["pointers"][t:], other.features["pointers"][t:])


@pytest.mark.parametrize("sizes", [(1,), (7,), (50, 1, 3)])
@pytest.mark.parametrize("counting", ["paper", "program"])
def test_figures_do_not_depend_on_what_is_asked_together(store, asked, sizes, counting):
    whole = memory_of(store(), min_pointers=2, counting=counting)
    expected = whole.say(asked)
    whole.observe(asked.targets)
    parts = memory_of(whole.datastore, min_pointers=2, counting=counting)
    found, first = [], 0
    while first < TOKENS:
        last = first + sizes[len(found) % len(sizes)]
        part = part_of(asked, slice(first, last))
        found.append(parts.say(part))
        parts.observe(part.targets)
        first = last
    assert torch.equal(torch.cat([opinion.log_probs for opinion in found]), expected.log_probs)
    for name, feature in expected.features.items():
        assert torch.equal(torch.cat([opinion.features[name] for opinion in found]), feature)
    assert parts.counts == whole.counts
    assert parts.searches_saved == whole.searches_saved


def test_rows_of_a_batch_may_come_in_any_order(store, asked):
    """Walks are told apart by their positions alone."""
    memory = memory_of(store(), min_pointers=2)
    expected = memory.say(asked).log_probs
    rows = np.split(np.arange(TOKENS), np.flatnonzero(asked.positions % WALK == 0))
    order = np.concatenate(rows[::-1])
    assert torch.equal(memory.say(part_of(asked, order)).log_probs, expected[order])


@pytest.mark.parametrize("first", [50, 80, 120])
def test_a_part_of_the_text_behind_its_warm_up_is_as_in_the_whole(store, asked, first):
    memory = memory_of(store(), min_pointers=2)
    expected = memory.say(asked).log_probs[first:]
    assert memory.warm_up == WALK - 1
    memory.begin_pass()
    part = memory.say(part_of(asked, slice(first - memory.warm_up, None)))
    assert torch.equal(part.log_probs[memory.warm_up :], expected)


def test_a_gap_in_the_text_begins_a_new_walk(store, asked):
    memory = memory_of(store())
    memory.say(part_of(asked, slice(0, 10)))
    memory.observe(asked.targets[:10])
    assert memory.say(part_of(asked, slice(11, 12))).features["searched"].item() == 1
    assert memory.say(part_of(asked, slice(10, 11))).features["searched"].item() == 0


def test_generated_tokens_stand_for_true_ones(store, asked):
    """A token at a time, whose target is not known until `observe`."""
    memory = memory_of(store(), min_pointers=2)
    expected = memory.say(asked)
    memory.begin_pass()
    for t in range(TOKENS):
        unknown = part_of(asked, slice(t, t + 1))._replace(targets=torch.tensor([0]))
        ids, weights = memory.distribution(unknown)[:2]
        p = weights[ids == asked.targets[t]].sum()
        torch.testing.assert_close(p, expected.log_probs[t].exp())
        memory.observe(asked.targets[t : t + 1])


@pytest.mark.parametrize("counting", ["paper", "program"])
def test_no_pointer_leads_to_a_row_without_a_key(store, asked, counting):
    masked = tuple(range(3, ROWS, 7))
    datastore = store(masked)
    memory = memory_of(datastore, counting=counting)
    opinion = memory.say(asked)
    probs, _, pointed, voters = plain_walk(datastore, asked, counting)
    np.testing.assert_array_equal(opinion.features["pointers"], pointed)
    there = probs[np.arange(TOKENS), asked.targets]
    np.testing.assert_allclose(opinion.log_probs.exp(), there, rtol=1e-4)
    assert not set(masked) & {row for rows in voters for row in rows}
    assert {row + 1 for rows in voters for row in rows} & set(masked)  # some would have led there


def test_pointers_stay_in_their_document(store, asked):
    datastore = store()
    ends = np.flatnonzero(datastore.values == 3)
    cut = memory_of(datastore, document_end=3).say(asked)
    _, _, pointed, _ = plain_walk(datastore, asked, ends=tuple(ends))
    np.testing.assert_array_equal(cut.features["pointers"], pointed)
    uncut = memory_of(datastore).say(asked)
    assert not torch.equal(cut.features["pointers"], uncut.features["pointers"])
    # The original program knows of no documents.
    as_program = memory_of(datastore, document_end=3, counting="program").say(asked)
    assert torch.equal(as_program.features["pointers"], uncut.features["pointers"])


def test_pointers_are_measured_by_the_codes_of_an_index(store, asked):
    """As the original program does, and only where neighbours are too."""
    datastore = store(masked=(0, 5, 17))
    index = faiss.index_factory(DIM, "IVF4,PQ2x4")
    index.train(datastore.read(np.setdiff1d(np.arange(ROWS), datastore.masked)))
    index.add(datastore.read(np.setdiff1d(np.arange(ROWS), datastore.masked)))
    retriever = Brute(datastore)
    retriever.index = index
    memory = AutomatonMemory(datastore, retriever, K, distances="index")
    queries = asked.keys["last_ffn_input"].numpy()[:2]
    rows = np.array([[1, 399, -1], [18, -1, 6]])
    decoded = {row: index.reconstruct(id) for row, id in {1: 0, 399: 396, 18: 15, 6: 4}.items()}
    expected = np.zeros((2, 3), np.float32)
    for walk, column in np.argwhere(rows >= 0):
        expected[walk, column] = np.square(queries[walk] - decoded[rows[walk, column]]).sum()
    np.testing.assert_allclose(memory.measure(queries, rows), expected, rtol=1e-5)
    products = coded_distances(queries, rows, index, datastore, "ip")
    np.testing.assert_allclose(products[0, 0], queries[0] @ decoded[1], rtol=1e-5)


def test_counts_and_times_are_those_of_the_pass(store, asked):
    memory = memory_of(store(), counting="program")
    memory.say(asked)
    _, searched, pointed, _ = plain_walk(memory.datastore, asked, "program")
    assert memory.counts["tokens"] == TOKENS
    assert memory.counts["searches"] == searched.sum()
    assert memory.counts["pointers"] == pointed.sum()
    # Steps after the last search of a walk are none of the original program's.
    walks = np.split(searched, np.flatnonzero(asked.positions % WALK == 0))
    between = sum(int((~walk[: np.flatnonzero(walk)[-1]]).sum()) for walk in walks)
    assert memory.searches_saved == between / (between + searched.sum())
    assert between < TOKENS - searched.sum()
    assert memory.seconds["walk"] >= memory.seconds["search"] > 0
    memory.begin_pass()
    assert not memory.counts
    assert not memory.seconds


@pytest.mark.parametrize("doubles", [False, True])
def test_members_of_more_clusters_than_there_is_room_for(doubles):
    """Those of the cluster that most pointers are in come first."""
    clusters = Clusters.of(np.array([0, 1, 1, 1, 2, 2, 2, 2, 2], np.int32), 3)
    pointers = np.array([[-1, -1, -1], [2, 4, 1], [0, -1, -1]])
    found = with_members(pointers, clusters, 6, doubles)
    expected = {False: [2, 4, 1, 3, 5, 6], True: [2, 4, 1, 1, 2, 3]}[doubles]
    assert found[1].tolist() == expected
    assert found[0].tolist() == [-1] * 6
    assert with_members(pointers[:1], clusters, 6, doubles).tolist() == [[]]
    assert found[2].tolist() == ([0, 0] if doubles else [0, -1]) + [-1] * 4


def test_is_made_as_the_settings_have_it(store, asked):
    datastore = store()
    knn = SimpleNamespace(k=K, temperature=TEMPERATURE, key_type="last_ffn_input")
    knn.distances, knn.similarity = "exact", None
    settings = AutomatonSettings(clusters="auto", max_pointers=60, walk_length=WALK)
    sections = SimpleNamespace(knn=knn, automaton=settings)
    resources = SimpleNamespace(
        settings=sections, datastore=lambda: datastore, retriever=lambda: Brute(datastore)
    )
    memory = AutomatonMemory.of(resources)
    labels = np.load(datastore.path / "clusters-4.npy")
    probs, *_ = plain_walk(datastore, asked, labels=labels)
    of_targets = probs[np.arange(TOKENS), asked.targets]
    memory.begin_pass(np.zeros(TOKENS))
    np.testing.assert_allclose(memory.say(asked).log_probs.exp(), of_targets, rtol=1e-4)
    sections.automaton = AutomatonSettings()
    assert AutomatonMemory.of(resources).clusters is None


# -- clusters ------------------------------------------------------------------------------------


def test_clusters_are_those_of_the_nearest_centroids(store):
    datastore = store(masked=(0, 5, ROWS - 1))
    clusters = ensure_clusters(datastore, 8)
    centroids = np.load(datastore.path / "clusters-8-centroids.npy")
    distances = np.square(np.asarray(datastore.keys)[:, None] - centroids).sum(axis=2)
    expected = distances.argmin(axis=1)
    expected[datastore.masked] = -1
    np.testing.assert_array_equal(clusters.labels, expected)
    for cluster in range(8):
        members = clusters.members[clusters.bounds[cluster] : clusters.bounds[cluster + 1]]
        np.testing.assert_array_equal(members, np.flatnonzero(expected == cluster))
    assert cluster_count(datastore, "auto") == (ROWS - 3) // 100


def test_clustering_goes_on_where_it_stopped(store, monkeypatch):
    from neighborlm.retrieval.search import clusters as module

    datastore = store()
    expected = np.array(ensure_clusters(datastore, 8).labels)
    for path in datastore.path.glob("clusters-8*"):
        path.unlink()
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * DIM * 100)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "assigning" and done == 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_clusters(datastore, 8, report=interrupt)
    stages = []
    again = ensure_clusters(datastore, 8, report=lambda *told: stages.append(told))
    np.testing.assert_array_equal(again.labels, expected)
    assert stages[0] == ("assigning", 200, ROWS)


@pytest.mark.parametrize("memory", [AutomatonMemory, KNNMemory])
def test_distances_of_an_index_are_read_as_no_other_measure(store, memory):
    datastore = store()
    with pytest.raises(InputError, match="the distances of the index are l2"):
        memory(datastore, Brute(datastore), K, distances="index", similarity="ip")


def test_clusters_of_another_seed_are_refused(store):
    datastore = store()
    ensure_clusters(datastore, 8, seed=1)
    with pytest.raises(InputError, match=r"clusters-8\.npy: its seed is 1, but 2"):
        ensure_clusters(datastore, 8, seed=2)
    with pytest.raises(InputError, match=r"--automaton\.clusters is 500, but .* only 400 keys"):
        cluster_count(datastore, 500)


# -- bad input -----------------------------------------------------------------------------------


def test_settings_that_cannot_be_right():
    for name in ("min_pointers", "max_pointers", "walk_length"):
        with pytest.raises(InputError, match=rf"--automaton\.{name} is 0; expected at least 1"):
            AutomatonSettings(**{name: 0}).check()
    with pytest.raises(InputError, match=r"--automaton\.clusters is -1; expected at least 0"):
        AutomatonSettings(clusters=-1).check()
    AutomatonSettings(clusters="auto").check()
