"""Mixtures by evaluate.py, in this process: the one table, from how many passes, and what is
kept."""

import json

import numpy as np
import pytest
from small import SMALL, logged_by, scalars

from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.programs import evaluate, evaluation, hearing, mixture
from neighborlm.programs.checkpoints import load_model
from neighborlm.programs.inspection import inspect_token
from neighborlm.programs.run import Run
from neighborlm.programs.settings import KNNSettings, MemorySettings
from neighborlm.programs.subject import Subject

KNN = ("--knn.k", "16")
NAMES = ("knn", "ngram", "recent")
ALL = ("--memories", ",".join(NAMES), *KNN)


@pytest.fixture
def run(workplace, tmp_path, monkeypatch, capsys):
    """Evaluates; gives the results, the splits that were passed over, and what was printed."""
    monkeypatch.chdir(workplace)
    passes = []
    for module in (hearing, mixture):
        score = module.score

        def counted(subject, split, *args, score=score):
            passes.append(split)
            return score(subject, split, *args)

        monkeypatch.setattr(module, "score", counted)

    def run(*flags: str) -> tuple[dict, list[str], str]:
        passes.clear()
        output = ("--output", str(tmp_path / "results.json"))
        evaluate.main([*SMALL, "--data.corpus", "words", *flags, *output])
        results = json.loads((tmp_path / "results.json").read_text())
        return results, list(passes), capsys.readouterr().out

    return run


def test_one_table_from_one_pass_over_each_split(run, tmp_path, workplace):
    """Of what each memory says, in the scores of every token."""
    file = tmp_path / "scores.npz"
    results, passes, printed = run(*ALL, "--token_scores", str(file))
    assert passes == ["valid", "test"]
    scores, table = np.load(file), results["table"]
    assert [row["memories"] for row in table] == [[], *([name] for name in NAMES), list(NAMES)]
    assert [row["name"] for row in table[::4]] == ["LM", "LM + knn + ngram + recent"]
    assert table[0]["ppl"] == results["ppl"]
    assert table[-1]["ppl"] == results["mixture"]["ppl"]
    probs = {name: np.exp(scores[f"{name}_log_prob"].astype(float)) for name in ("lm", *NAMES)}
    for row in table:
        mixed = (1 - sum(row["weights"].values())) * probs["lm"]
        mixed += sum(weight * probs[name] for name, weight in row["weights"].items())
        assert row["ppl"] == pytest.approx(np.exp(-np.log(mixed).mean()), rel=1e-5)
        assert f"{row['ppl']:.2f}" in printed
        assert row["tokens_per_second"] > 0
    store, array = workplace / "datastores/words/train", workplace / "datastores/words"
    on_disk = {
        "knn": sum(np.load(store / f"{name}.npy").nbytes for name in ("keys", "values")),
        "ngram": sum(f.stat().st_size for f in (array / "train-suffix_array").iterdir()),
        "recent": 0,
    }
    for row in table:
        assert row["bytes_on_disk"] == sum(on_disk[name] for name in row["memories"])
        assert row["searches"] == ("knn" in row["memories"]) * results["tokens"]
    logged = scalars(logged_by(results, workplace))["test/table/ngram/ppl"]
    assert logged[-1].value == pytest.approx(table[2]["ppl"])


def test_the_weight_of_one_memory_alone_is_the_best(run, tmp_path):
    """On the validation split, as if the others had not been there."""
    alone = run("--memories", "ngram")[0]
    table = run(*ALL)[0]["table"]
    row = table[2]
    assert row["ppl"] == pytest.approx(alone["mixture"]["ppl"], rel=1e-9)
    assert row["weights"]["ngram"] == pytest.approx(alone["mixture"]["weight.ngram"], rel=1e-9)
    # A gate that skips nothing is the plain kNN-LM, where it foretells no weight.
    gate = run("--memories", "adaptive", *KNN, "--adaptive.skip", "0")[0]["table"]
    assert gate[1]["ppl"] == pytest.approx(table[1]["ppl"], rel=1e-9)


def test_a_gate_before_the_search(run):
    """Skipping and the foretold weight are reported apart; nothing else is searched for."""
    results, passes, _ = run("--memories", "adaptive", *KNN, "--adaptive.skip", "0.6")
    assert passes == ["valid", "test"]
    one, own = results["table"][1:]
    assert [row["name"] for row in (one, own)] == [
        "LM + adaptive, one lmbda",
        "LM + adaptive, its lmbda",
    ]
    searched = results["mixture"]["adaptive.searched"]
    assert one["searches"] == own["searches"] == round(searched * results["tokens"])
    assert 0.1 < searched < 0.7
    lmbda = results["mixture"]["lmbda"]
    assert one["weights"]["adaptive"] == pytest.approx(lmbda * searched, rel=1e-6)
    assert one["ppl"] < results["ppl"]
    assert own["ppl"] == results["mixture"]["ppl"] < results["ppl"]


def test_what_is_kept_is_mixed_again_without_model_and_search(run, tmp_path):
    """By any mixer, with the figures of a command that keeps nothing."""
    kept = ("--knn.cache", str(tmp_path / "kept"))
    assert run(*ALL, *kept)[1] == ["valid", "test"]
    flags = (*ALL, "--mixer", "meta_k")  # which reads most of what is kept
    again, passes, _ = run(*flags, *kept)
    assert passes == []
    assert again["table"][-1]["searches"] == 0
    expected = run(*flags)[0]
    assert again["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for row, other in zip(again["table"], expected["table"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
    # One memory more is heard alone; fewer, and a smaller k, need nothing.
    assert run("--memories", "knn,recent", "--knn.k", "8", *kept)[1] == []
    more = ("--recent.size", "50")
    results, passes, _ = run(*ALL, *more, *kept)
    assert passes == ["valid", "test"]
    assert [row["searches"] for row in results["table"]] == [0] * 5


def test_a_token_is_looked_at_as_it_was_evaluated(workplace, tmp_path, monkeypatch):
    """Also by memories that must have read the text before it, and by several distributions."""
    monkeypatch.chdir(workplace)
    rows = {"tokens_per_sample": 24, "context_window": 12, "max_tokens": 96, "threshold": 0}
    data, run = LMDataModule("words", **rows), Run(tmp_path, {"enable_progress_bar": False})
    model = load_model(workplace / "runs/words/checkpoints/best.ckpt")
    subject, settings = Subject.of(model, data, run), MemorySettings(KNNSettings(k=16))
    names = ["knn", "ngram", "recent", "automaton"]
    evaluated = evaluation.evaluate(subject, "test", names, "meta_k", settings, keep_scores=True)
    scores = evaluated.scores
    for position in (0, 1, 71):
        token = inspect_token(subject, evaluated, "test", position)
        found = token.probabilities
        assert found["lm"] == pytest.approx(np.exp(scores["lm_log_prob"][position]), rel=1e-4)
        assert found["mixture"] == pytest.approx(np.exp(scores["log_prob"][position]), rel=1e-3)
        for name in names:
            of_all = scores[f"{name}_log_prob"][position].reshape(-1)[-1]
            assert found[name] == pytest.approx(np.exp(of_all), rel=1e-3, abs=1e-6)
        assert len(token.neighbors) == 5


@pytest.mark.parametrize(
    ("names", "mixer", "knn", "sentence"),
    [
        ("adaptive,knn", "constant", {}, "adaptive decides before each search"),
        ("adaptive", "gate", {}, "expected it alone, and no --mixer"),
        ("ngram", "constant", {"cache": "c"}, "--knn.cache c: keeps what the memory knn retrieves"),
        ("knn,ngram", "constant", {"lmbda": 0.2}, "--knn.lmbda 0.2: has no effect with --memories"),
        ("knn", "constant", {"temperature": 3.0}, "--knn.temperature 3.0: has no effect"),
    ],
)
def test_what_something_else_decides_on_is_refused(names, mixer, knn, sentence):
    with pytest.raises(InputError, match=sentence):
        mixture.check_mixing(names.split(","), mixer, KNNSettings(**knn))


@pytest.mark.parametrize(
    ("names", "mixer", "sentence"),
    [
        (["knn", "cloud"], "constant", "cloud is no memory; expected some of knn, ngram"),
        (["knn", "ngram", "knn"], "constant", "--memories are knn,ngram,knn; expected each once"),
        (["knn"], "median", "--mixer is median; expected one of constant, buckets"),
    ],
)
def test_names_that_cannot_be(names, mixer, sentence):
    with pytest.raises(InputError, match=sentence):
        mixture.check_names(names, mixer)
