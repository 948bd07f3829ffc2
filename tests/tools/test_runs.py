"""The table of what was done in runs, of records made up for it and of a real training."""

import json
from pathlib import Path

import pytest
import yaml

from neighborlm.tools.runs import main


def evaluation(folder: Path, run: str, hour: int, ppl: float, knn: dict | None = None, **more):
    """A record as evaluate.py leaves one."""
    results = {"split": "test", "ppl": ppl, "seconds": 2.0, "stage_seconds": {"tuning": 60.0}}
    settings = {"arch": "lm", "mixer": "constant", "data": {"corpus": run}}
    if knn:
        results["knn"] = {"ppl": knn.pop("ppl"), "seconds": 15.0}
        settings |= {"knn": knn}
    record = {"time": f"2026-01-31T{hour:02}:00:00+00:00"}
    record |= {"settings": settings | more.pop("settings", {}), "results": results | more}
    path = folder / run / "evaluations" / f"test-{hour}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two runs with four evaluations and a training."""
    folder = tmp_path / "runs"
    evaluation(folder, "one", 9, 40.0)
    evaluation(folder, "one", 11, 40.0, {"ppl": 30.0, "k": 8, "index": "flat"})
    evaluation(folder, "one", 10, 40.0, {"ppl": 31.0, "k": 64, "index": "flat"})
    mixture = {"ppl": 20.0, "seconds": 7.0, "memories": ["knn", "ngram"]}
    given = {"mixer": "gate", "output": "x.json"}
    evaluation(folder, "two", 12, 50.0, mixture=mixture, settings=given, part="first 9 tokens")
    summary = {"best_valid_ppl": 45.0, "seconds": 90.0, "stage_seconds": {}}
    summary["time"] = "2026-01-31T08:00:00+00:00"
    (folder / "one/training.json").write_text(json.dumps(summary))
    config = {"arch": "lm", "trainer": {"max_steps": 5, "logger": None}, "data": {"corpus": "one"}}
    (folder / "one/config.yaml").write_text(yaml.safe_dump(config))
    return folder


def shown(capsys, *flags: object) -> list[dict]:
    main([*map(str, flags), "--format", "json"])
    return json.loads(capsys.readouterr().out)


def test_everything_that_was_done_with_its_figures(runs, capsys):
    found = shown(capsys, runs)
    assert [entry["time"][:2] for entry in found] == ["20"] * 5
    two, best, other, plain, training = found  # the latest first
    assert (two["memories"], two["mixer"], two["mixed_ppl"]) == ("knn+ngram", "gate", 20.0)
    assert (two["seconds"], two["part"]) == (67.0, "first 9 tokens")
    assert (best["memories"], best["ppl"], best["mixed_ppl"]) == ("knn", 40.0, 30.0)
    assert (best["seconds"], plain["seconds"]) == (75.0, 62.0)
    assert (plain["memories"], plain["mixed_ppl"]) == ("", None)
    assert (training["kind"], training["split"], training["ppl"]) == ("training", "valid", 45.0)
    assert best["differing"] == {"data.corpus": "one", "knn.k": 8}  # not the index, not the places
    assert other["differing"]["knn.k"] == 64
    assert two["differing"] == {"data.corpus": "two"}
    assert training["settings"] == {
        "arch": "lm",
        "trainer.max_steps": 5,
        "data.corpus": "one",
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--sort", "ppl"), [20, 30, 31, 40, 45]),
        (("--sort", "name"), [45, 40, 31, 30, 20]),
        (("--where", "knn.k=8"), [30]),
        (("--where", "kind=evaluation", "--where", "run=one"), [30, 31, 40]),
        (("--where", "memories=knn,ngram"), [20]),
        (("--where", "memories="), [40, 45]),
    ],
)
def test_sorted_and_filtered(runs, capsys, flags, expected):
    found = shown(capsys, runs, *flags)
    assert [entry["mixed_ppl"] or entry["ppl"] for entry in found] == expected


def test_as_markdown_and_as_a_table(runs, capsys):
    main([str(runs), "--where", "run=one", "--format", "markdown"])
    lines = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:2] == ["one", "evaluation test lm knn"]
    assert cells[3:] == ["40.00", "30.00", "knn.k 8", "1 min 15 s"]
    main([str(runs)])
    said = capsys.readouterr().out
    for part in ("knn+ngram", "gate", "knn.k 64", "1 min 30 s", "first 9"):
        assert part in said


def test_damaged_records_are_named_and_left_out(runs, capsys):
    damaged = [
        runs / "one/evaluations/cut.json",
        runs / "one/evaluations/list.json",
        runs / "two/training.json",
    ]
    for path, content in zip(damaged, ('{"time": "2026', "[1]", "{}"), strict=True):
        path.write_text(content)
    main([str(runs), "--format", "json"])
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == 5
    lines = said.err.splitlines()
    assert len(lines) == 3
    for path in damaged:
        assert sum(str(path) in line for line in lines) == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--where", "knn.kk=8"), "--where knn.kk=8: names nothing that a record has; did you"),
        (("--where", "knn.k"), "--where knn.k: names nothing that a record has; did you mean"),
        (("--where", "knn.k=9"), "--where knn.k=9: no record fulfils it"),
        (("--sort", "size"), "--sort: invalid choice"),
    ],
)
def test_slips(runs, capsys, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        main([str(runs), *flags])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


@pytest.mark.parametrize("made", [False, True])
def test_where_there_are_no_runs(tmp_path, capsys, made):
    folder = tmp_path / "runs"
    if made:
        (folder / "empty").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main([str(folder)])
    said = capsys.readouterr().err
    assert ("holds no record" if made else "no such folder") in said


def test_what_a_training_leaves(workplace, capsys):
    training = shown(capsys, workplace / "runs", "--where", "kind=training", "--where", "run=words")
    said = json.loads((workplace / "runs/words/training.json").read_text())
    assert [entry["ppl"] for entry in training] == [said["best_valid_ppl"]]
    assert training[0]["seconds"] == pytest.approx(said["seconds"])
    assert training[0]["seconds"] > 0
    assert training[0]["settings"]["data.corpus"] == "words"
