"""Recall of the target and of an index: every figure against loops over the queries."""

import importlib.util
import json

import faiss
import numpy as np
import pytest

from neighborlm.common.errors import InputError
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import index_path
from neighborlm.tools import recall as recall_module
from neighborlm.tools.recall import Sample, main, measure, overlap, plot, target_figures

KS = (1, 3, 8, 40)
VOCAB = 50


@pytest.fixture
def pair(tmp_path, new_builder):
    """Memory and queries of one model; contexts of the same token have keys near one another."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(VOCAB, 8))
    stores = []
    for corpus, rows in (("train", 400), ("valid", 90)):
        values = rng.integers(0, VOCAB, rows)
        keys = centres[values] + rng.normal(size=(rows, 8)) * 0.7
        builder = new_builder(
            tmp_path / corpus, rows, masked=(2, 5), corpus=corpus, key_type="last_hidden"
        )
        builder.write(np.arange(rows), keys.astype(np.float32), values)
        builder.sync()
        stores.append(builder.finish())
    return stores


def nearest(memory, queries, metric):
    """Rows of the memory for every row of the queries that has a key, nearest first."""
    rows = np.setdiff1d(np.arange(len(queries)), queries.masked)
    kept = np.setdiff1d(np.arange(len(memory)), memory.masked)
    keys, asked = memory.keys[kept].astype(np.float64), queries.keys[rows].astype(np.float64)
    if metric == "cosine":
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    distances = ((asked[:, None] - keys) ** 2).sum(-1)
    if metric == "ip":
        distances = -asked @ keys.T
    return rows, kept[np.argsort(distances, axis=1)]


def by_loops(rows, exact, values, targets, k):
    """Recall, precision, reciprocal rank and recall of the index, one query at a time."""
    recall, precision, reciprocal, kept = [], [], [], []
    for found, best, target in zip(rows, exact, targets, strict=True):
        carried = [values[row] == target for row in found if row >= 0]
        near = [values[row] == target for row in found[:k] if row >= 0]
        recall.append(any(near))
        precision.append(sum(near) / len(near) if near else 0)
        reciprocal.append(1 / (carried.index(True) + 1) if any(carried) else 0)
        kept.append(len(set(found[:k]) & set(best[:k])) / k)
    return np.mean(recall), np.mean(precision), np.mean(reciprocal), np.mean(kept)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("at_once", [2048, 16])
def test_exact_search(pair, metric, at_once, monkeypatch):
    monkeypatch.setattr(recall_module, "QUERIES_AT_ONCE", at_once)
    memory, queries = pair
    (found,) = measure(memory, queries, ["flat"], [1, 4], [metric], KS)
    rows, exact = nearest(memory, queries, metric)
    assert found.n_queries == len(rows) == 88
    assert (found.index, found.nprobe, found.key_type) == ("flat", None, "last_hidden")
    for k in KS:
        expected = by_loops(exact[:, :40], exact, memory.values, queries.values[rows], k)
        assert found.recall[k] == pytest.approx(expected[0])
        assert found.precision[k] == pytest.approx(expected[1])
        assert found.reciprocal_rank == pytest.approx(expected[2])
        assert found.index_recall[k] == 1
    assert 0.3 < found.recall[1] < found.recall[40]
    assert found.milliseconds > 0


def test_missing_neighbors_and_lost_ones(pair):
    memory, queries = pair
    sample = Sample.draw(memory, queries, 1000, 1)
    rng = np.random.default_rng(3)
    exact = nearest(memory, queries, "l2")[1][:, :40]
    rows = np.full_like(exact, -1)
    for i, row in enumerate(rows):  # others too, in another order, and fewer and fewer of them
        mixed = np.unique(np.concatenate([exact[i, :28], rng.choice(400, 12)]))
        found = rng.permutation(mixed)[: 40 - i % 41]
        row[: len(found)] = found
    assert (rows[40] == -1).all()
    found = sample.figures(rows, exact, KS)
    for i, k in enumerate(KS):
        expected = by_loops(rows, exact, memory.values, sample.targets, k)
        figures = (found[0][i], found[1][i], found[2], found[3][i])
        np.testing.assert_allclose(figures, expected)


def test_figures_of_one_query():
    hits = np.array([[False, True, False, True]])
    found = np.array([[True, True, True, False]])
    recall, precision, reciprocal = target_figures(hits & found, found, [1, 2, 4])
    assert recall.tolist() == [[0, 1, 1]]
    np.testing.assert_allclose(precision, [[0, 1 / 2, 1 / 3]])
    assert reciprocal.tolist() == [0.5]
    rows, exact = np.array([[3, -1], [0, 3], [-1, -1]]), np.array([[3, 0], [3, 0], [1, 0]])
    assert overlap(rows, exact, [1, 2]).tolist() == [[1, 0.5], [0, 1], [0, 0]]


def test_indexes_are_built_once_and_searched_with_every_nprobe(pair):
    memory, queries = pair
    stages = []
    found = list(
        measure(
            *(memory, queries, ["IVF8,SQ8", "flat", "auto", "SQ4"], [1, 8], ["l2"], KS, 1000, 1),
            lambda stage, done, total: stages.append(stage),
        )
    )
    names = [(result.index, result.nprobe) for result in found]
    assert names == [("IVF8,SQ8", 1), ("IVF8,SQ8", 8), ("flat", None), ("SQ4", None)]
    assert any("IVF8,SQ8, adding" in stage for stage in stages)
    assert found[0].index_recall[40] < found[1].index_recall[40]
    assert found[1].index_recall[8] > 0.9
    assert found[0].index_recall[40] < found[3].index_recall[40] < 1
    rows = faiss.read_index(str(index_path(memory, "IVF8,SQ8", "l2")))
    rows.nprobe = 1
    chosen, exact = nearest(memory, queries, "l2")
    ids = memory.rows_of(rows.search(queries.read(chosen), 40)[1])
    expected = by_loops(ids, exact, memory.values, queries.values[chosen], 8)
    assert found[0].recall[8] == pytest.approx(expected[0])
    assert found[0].index_recall[8] == pytest.approx(expected[3])
    stages.clear()
    arguments = (["IVF8,SQ8"], [8], ["l2"], KS, 1000, 1)
    (again,) = measure(memory, queries, *arguments, lambda stage, *_: stages.append(stage))
    assert again.recall == found[1].recall
    assert not any("adding" in stage for stage in stages)


def test_an_index_of_another_seed_or_a_file_serves(pair, tmp_path):
    memory, queries = pair
    path = IndexBuilding(memory, "IVF8,SQ8", "cosine", seed=7).run()
    copy = path.rename(tmp_path / "faiss_store.cosine")
    path.write_bytes(copy.read_bytes())
    named, file = measure(memory, queries, ["IVF8,SQ8", str(copy)], [2], ["cosine"], KS)
    assert named.recall == file.recall
    assert file.index == str(copy)


def test_sample_is_seeded_and_limited(pair):
    memory, queries = pair
    samples = [Sample.draw(memory, queries, 20, seed) for seed in (1, 1, 2)]
    assert samples[0].keys.shape == (20, 8)
    np.testing.assert_array_equal(samples[0].keys, samples[1].keys)
    assert not np.array_equal(samples[0].keys, samples[2].keys)
    rows = [np.flatnonzero((queries.keys == key).all(axis=1))[0] for key in samples[0].keys]
    np.testing.assert_array_equal(samples[0].targets, queries.values[rows])


def test_the_program(pair, tmp_path, capsys):
    memory, queries = pair
    output = tmp_path / "new" / "recall.json"
    main(
        [
            *("--memory", str(memory.path), "--queries", str(queries.path)),
            *("--indexes", "flat", "IVF8,SQfp16", "--nprobes", "1", "8", "--ks", "8", "1"),
            *("--metrics", "l2", "cosine", "--limit", "50", "--output", str(output)),
        ]
    )
    shown = capsys.readouterr().out
    assert "IVF8,SQfp16" in shown
    found = json.loads(output.read_text())
    assert len(found) == 6
    assert {result["n_queries"] for result in found} == {50}
    assert list(found[0]["recall"]) == ["1", "8"]
    for result in found:
        assert f"{result['recall']['8']:.4f}" in shown


def program(pair, *flags):
    memory, queries = pair
    main(["--memory", str(memory.path), "--queries", str(queries.path), "--ks", "4", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ks", "399"), "--ks 399: --memory {memory} has only 398 keys"),
        (("--ks", "4", "0"), "--ks is [4, 0]; expected at least 1"),
        (("--limit", "0"), "--limit is 0; expected at least 1"),
        (("--nprobes", "0"), "--nprobes is [0]; expected at least 1"),
        (("--indexes", "IFV8"), "--knn.index is 'IFV8'; expected auto, flat,"),
        (("--indexes", "IVF1000,Flat"), "--knn.index IVF1000,Flat has 1,000 lists but the datas"),
        (("--indexes", "none.faiss"), "none.faiss: no such index; expected one that was built"),
        (("--memory", "elsewhere"), "--queries was given 1 times and --memory 2; expected one"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(pair, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        program(pair, *flags)
    assert stopped.value.code == 2
    assert f"error: {message.format(memory=pair[0].path)}" in capsys.readouterr().err


def test_pairs_that_do_not_belong_together(pair, tmp_path, new_builder, make_store):
    memory, queries = pair
    with pytest.raises(InputError, match=r"holds the same text as --memory .* expected another"):
        list(measure(memory, memory, ["flat"], [1], ["l2"], KS))
    narrow, _, _ = make_store(dim=4)
    with pytest.raises(InputError, match="its dim is 4, but 8 is expected"):
        list(measure(memory, narrow, ["flat"], [1], ["l2"], KS))
    builder = new_builder(tmp_path / "other", 90, corpus="valid", key_type="last_ffn_input")
    builder.write(np.arange(90), queries.keys[:], queries.values[:])
    builder.sync()
    with pytest.raises(InputError, match="its key type is last_ffn_input, but last_hidden is"):
        list(measure(memory, builder.finish(), ["flat"], [1], ["l2"], KS))


def test_a_picture_needs_matplotlib(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recall_module, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        program(pair, "--plot", str(tmp_path / "recall.png"))
    assert 'pip install -c constraints.txt -e ".[plot]"' in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the extra plot is not installed"
)
def test_a_picture(pair, tmp_path):
    indexes, path = ["flat", "IVF8,SQ8"], tmp_path / "recall.png"
    plot(list(measure(*pair, indexes, [1, 8], ["l2", "cosine"], KS)), path)
    assert path.read_bytes().startswith(b"\x89PNG")
