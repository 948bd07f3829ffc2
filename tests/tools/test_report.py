"""Reports on caches of a made-up text, against loops over its tokens."""

import importlib.util
import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.retrieval.memories.cache import Extent
from neighborlm.retrieval.memories.cache_builder import RetrievalCacheBuilder
from neighborlm.tools import report as report_module
from neighborlm.tools.report import main

K, BLOCK, TOP = 6, 10, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> CorpusDataModule:
    """Five words make up most of it, and eighty the rest."""
    folder, rng = tmp_path_factory.mktemp("reported"), np.random.default_rng(0)
    (folder / "words").mkdir()
    for split, lines in (("train", 100), ("valid", 30), ("test", 40)):
        shape = (lines, 14)
        words = np.where(rng.random(shape) < 0.75, rng.integers(0, 5, shape), 0)
        words = np.where(rng.random(shape) < 0.22, rng.integers(5, 85, shape), words)
        text = "\n".join(" ".join(f"w{word}" for word in line) for line in words)
        (folder / "words" / f"{split}.txt").write_text(f"{text}\n")
    cached = str(folder / "cache")
    return CorpusDataModule(str(folder / "words"), tokens_per_sample=None, cache_dir=cached)


def counts_of(corpus, split: str) -> np.ndarray:
    """How often the training text has each token of a split."""
    train = corpus.stream("train").tokens.tolist()
    return np.array([train.count(token) for token in corpus.stream(split).tokens.tolist()])


def make_cache(corpus, path, frequent_gain: bool, further: float = 0.0, **made_from):
    """A neighbour of some tokens is right, a near one as a rule: of the frequent, or the rare."""
    split = path.name
    targets = corpus.stream(split).tokens.astype(np.int64)
    rng = np.random.default_rng(0)
    lm = rng.normal(-3, 0.5, len(targets)).astype(np.float32) - further
    is_frequent = counts_of(corpus, split) >= 30
    values = np.full((len(targets), K), corpus.dictionary.pad)
    right = np.flatnonzero(is_frequent == frequent_gain)
    columns = rng.choice(K, len(right), p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1])
    values[right, columns] = targets[right]
    scores = -np.sort(rng.gamma(2.0, 2.0, (len(targets), K)), axis=1).astype(np.float32)
    about = {"corpus": corpus.fingerprint(split), "split": split, "similarity": "l2", "model": "m"}
    about |= {"distances": "exact", "index": "flat", **made_from}
    text = {name: str(of) for name, of in asdict(corpus.settings).items() if of is not None}
    sizes = (len(targets), K, corpus.vocab_size)
    top_ids = np.stack([rng.permutation(corpus.vocab_size)[:TOP] for _ in targets])
    likely = (rng.random(len(targets)) < 0.3) & ~(top_ids == targets[:, None]).any(axis=1)
    top_ids[likely, 0] = targets[likely]
    top_log_probs = np.log(-np.sort(-rng.dirichlet(np.ones(TOP + 1), len(targets))))[:, :TOP]
    extent = Extent(datastore_rows=9, top=TOP)
    builder = RetrievalCacheBuilder(path, *sizes, about, extent, text=text)
    others = {"top_ids": top_ids, "top_log_probs": top_log_probs.astype(np.float32)}
    others |= {"entropy": np.ones(len(targets)), "rows": np.zeros(values.shape, dtype=int)}
    builder.write(np.arange(len(targets)), targets, lm, scores, values, **others)
    builder.sync()
    return builder.finish()


@pytest.fixture(scope="module")
def cache(corpus, tmp_path_factory):
    return make_cache(corpus, tmp_path_factory.mktemp("kept") / "test", True)


def flags_of(cache, *more: object) -> list[str]:
    given = ("--cache", cache.path, "--lmbda", 0.25, "--temperature", 2, "--block", BLOCK)
    return list(map(str, (*given, *more)))


def gains_one_by_one(cache, lmbda=0.25, temperature=2.0) -> np.ndarray:
    """Nats that kNN-LM gains of each token."""
    found = []
    for lm, target, scores, values in zip(
        cache.lm_log_prob, cache.targets, cache.scores, cache.values, strict=True
    ):
        votes = [math.exp((score - max(scores)) / temperature) for score in scores]
        hits = (vote for vote, value in zip(votes, values, strict=True) if value == target)
        knn = sum(hits) / sum(votes)
        found.append(math.log(lmbda * knn + (1 - lmbda) * math.exp(lm)) - lm)
    return np.array(found)


def favourites_one_by_one(cache, lmbda=0.25, temperature=2.0) -> list[tuple[float, bool]]:
    """Of kNN-LM: what its most probable token was given, and whether that came."""
    found = []
    for target, scores, values, ids, log_probs in zip(
        *(cache.targets, cache.scores, cache.values, cache.top_ids, cache.top_log_probs),
        strict=True,
    ):
        mixed = {}
        for token, log_prob in zip(ids.tolist(), log_probs, strict=True):
            mixed[token] = (1 - lmbda) * math.exp(log_prob)
        votes = [math.exp((score - max(scores)) / temperature) for score in scores]
        for token, vote in zip(values.tolist(), votes, strict=True):
            mixed[token] = mixed.get(token, 0) + lmbda * vote / sum(votes)
        best = max(mixed, key=mixed.get)
        found.append((mixed[best], best == target))
    return found


def test_how_often_favourites_are_right(cache, tmp_path):
    main(flags_of(cache, "--output", tmp_path / "r.json"))
    found = json.loads((tmp_path / "r.json").read_text())["calibration"]
    expected = {
        "LM": list(
            zip(
                np.exp(cache.top_log_probs[:, 0]), cache.top_ids[:, 0] == cache.targets, strict=True
            )
        ),
        "kNN-LM": favourites_one_by_one(cache),
    }
    assert list(found) == list(expected)
    for name, favourites in expected.items():
        error = 0.0
        for part in found[name]["parts"]:
            inside = [(p, right) for p, right in favourites if int(10 * p) == int(10 * part["low"])]
            assert part["share"] == pytest.approx(len(inside) / len(favourites))
            if inside:
                said, right = np.mean(inside, axis=0)
                assert part["said"] == pytest.approx(said, rel=1e-5)
                assert part["right"] == pytest.approx(right)
                error += part["share"] * abs(said - right)
        assert found[name]["error"] == pytest.approx(error, rel=1e-5)


def test_classes_by_what_the_training_text_has(corpus, cache, tmp_path):
    """Each suffix of each context is looked for in the training text as it is written."""
    array, output = tmp_path / "array", tmp_path / "r.json"
    main(flags_of(cache, "--suffix_array", array, "--output", output))
    rows = json.loads(output.read_text())["slices"]
    rows = [row for row in rows if row["by"] == "longest suffix in the training text"]
    train = " ".join(map(str, corpus.stream("train").tokens[:-1]))  # a token must follow
    text = corpus.stream("test").tokens.tolist()
    lengths = np.zeros(len(text), dtype=int)
    for i in range(len(text)):
        length = 1
        while length <= i and f" {' '.join(map(str, text[i - length : i]))} " in f" {train} ":
            length += 1
        lengths[i] = length - 1
    shares = {"0 to 1": lengths < 2, "2": lengths == 2, "3 to 4": (lengths > 2) & (lengths < 5)}
    each = gains_one_by_one(cache)
    assert {"2", "3 to 4"} <= {row["label"] for row in rows} <= {*shares, "5 to 8", "9 or more"}
    for row in rows:
        if row["label"] in shares:
            inside = shares[row["label"]]
            assert row["share"] == pytest.approx(inside.mean())
            gain = row["gains"]["kNN-LM"]["value"]
            assert gain == pytest.approx(each[inside].mean(), abs=1e-5)


def test_what_each_class_gains(corpus, cache, tmp_path, capsys):
    outputs = tmp_path / "r.json", tmp_path / "r.md"
    main(flags_of(cache, *(flag for path in outputs for flag in ("--output", path))))
    said, found = capsys.readouterr().out, json.loads(outputs[0].read_text())
    each, lm = gains_one_by_one(cache), np.array(cache.lm_log_prob, dtype=np.float64)
    assert found["ways"]["LM"]["ppl"]["value"] == pytest.approx(math.exp(-lm.mean()))
    mixed = found["ways"]["kNN-LM"]
    assert mixed["ppl"]["value"] == pytest.approx(math.exp(-(lm + each).mean()), rel=1e-5)
    assert (mixed["lmbda"], mixed["temperature"]) == (0.25, 2)
    counts = counts_of(corpus, "test")
    bands = {"1 to 9": (1, 9), "10 to 99": (10, 99), "100 to 999": (100, 999)}
    rows = [row for row in found["slices"] if row["by"] == "times in the training text"]
    assert {row["label"] for row in rows} <= {"0", *bands}
    for row in rows:
        low, high = bands.get(row["label"], (0, 0))
        inside = (counts >= low) & (counts <= high)
        gain = row["gains"]["kNN-LM"]
        assert row["share"] == pytest.approx(inside.mean())
        assert gain["value"] == pytest.approx(each[inside].mean(), abs=1e-5)
        assert gain["helped"] == pytest.approx((each[inside] > 0.01).mean())
        assert gain["hurt"] == pytest.approx((each[inside] < -0.01).mean())
    shares = {}
    for row in found["slices"]:
        shares[row["by"]] = shares.get(row["by"], 0) + row["share"]
    assert list(shares.values()) == pytest.approx([1] * len(shares))
    assert {"nearest distance", "place in its line"} < shares.keys()
    assert outputs[1].read_text() in said
    assert f"{mixed['ppl']['value']:.2f} ({mixed['ppl']['low']:.2f} to" in said


@pytest.mark.parametrize("frequent", [True, False])
def test_the_long_tail(corpus, tmp_path, capsys, frequent):
    """Who gains was decided by `make_cache`."""
    cache = make_cache(corpus, tmp_path / "test", frequent)
    main(flags_of(cache, "--output", tmp_path / "r.json"))
    (tail,) = json.loads((tmp_path / "r.json").read_text())["long_tail"]
    is_rare = counts_of(corpus, "test") < tail["rarer_than"]
    each = gains_one_by_one(cache)
    assert tail["share"] == pytest.approx(is_rare.mean())
    assert tail["rare"]["value"] == pytest.approx(each[is_rare].mean(), abs=1e-5)
    assert tail["frequent"]["value"] == pytest.approx(each[~is_rare].mean(), abs=1e-5)
    said = capsys.readouterr().out
    assert ("gain goes to frequent tokens" in said) == frequent
    assert ("gain goes to the long tail" in said) != frequent


def test_a_text_of_few_blocks_has_no_intervals(cache, tmp_path, capsys):
    flags = flags_of(cache, "--output", tmp_path / "r.json")
    main([*flags, "--block", "100000"])
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["ways"]["kNN-LM"]["ppl"]["high"] is None
    assert {row["gains"]["kNN-LM"]["low"] for row in found["slices"]} == {None}
    assert "too few blocks to say how sure" in capsys.readouterr().out


def test_two_caches_side_by_side(corpus, cache, tmp_path, capsys):
    other = make_cache(corpus, tmp_path / "test", False, distances="index", index="PQ4")
    main(flags_of(cache, "--against", other.path, "--output", tmp_path / "r.json"))
    found = json.loads((tmp_path / "r.json").read_text())
    names = ["kNN-LM, distances exact, index flat", "kNN-LM, distances index, index PQ4"]
    assert list(found["ways"]) == ["LM", *names]
    both = [gains_one_by_one(of) for of in (cache, other)]
    for name, each in zip(names, both, strict=True):
        gain = found["slices"][0]["gains"][name]["value"]
        assert gain == pytest.approx(each.mean(), abs=1e-5)
    ratio = math.exp(both[0].mean() - both[1].mean())
    assert found["against"]["relative"]["value"] == pytest.approx(ratio, rel=1e-5)
    assert f"is {ratio:.4f} (" in capsys.readouterr().out


def test_the_best_setting_is_that_of_the_validation_split(corpus, tmp_path):
    caches = [make_cache(corpus, tmp_path / split, True) for split in ("test", "valid")]
    output = tmp_path / "r.json"
    main(["--cache", str(caches[0].path), "--output", str(output)])
    found = json.loads(output.read_text())["ways"]["kNN-LM"]
    best = gains_one_by_one(caches[1], found["lmbda"], found["temperature"]).mean()
    for factor in (0.5, 2):
        other = gains_one_by_one(caches[1], found["lmbda"], factor * found["temperature"])
        assert other.mean() <= best + 1e-6
    assert gains_one_by_one(caches[1]).mean() < best


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--output", "r.txt"), "--output r.txt: expected a name that ends in .md, .json or .png"),
        (("--block", 0), "--block is 0; expected at least 1"),
        (("--lmbda", 1), "tokens probability 0; expected --lmbda below 1"),
        (("--against", "SAME"), "is --cache itself; expected another"),
        (("--against", "OTHER_MODEL"), "its model is other, but m is expected here"),
        (("--against", "FURTHER"), "the model's log-probabilities differ by up to 0.5 from"),
        (("--output", "r.png"), 'pip install -c constraints.txt -e ".[plot]"'),
    ],
)
def test_slips(corpus, cache, tmp_path, capsys, monkeypatch, flags, sentence):
    monkeypatch.setattr(report_module, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    others = {"OTHER_MODEL": {"model": "other"}, "FURTHER": {"further": 0.5}}
    if flags[1] in others:
        make_cache(corpus, tmp_path / "test", True, **others[flags[1]])
    places = {"SAME": cache.path, **dict.fromkeys(others, tmp_path / "test")}
    with pytest.raises(SystemExit) as stop:
        main(flags_of(cache, flags[0], places.get(flags[1], flags[1])))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the extra plot is not installed"
)
def test_a_picture(cache, tmp_path):
    main(flags_of(cache, "--output", tmp_path / "r.png"))
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
