"""Where datastores lie, and which are taken for what is at hand or what is to be made."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import without_digests

from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs.checkpoints import load_model
from neighborlm.programs.evaluation import evaluate
from neighborlm.programs.places import own_folder
from neighborlm.programs.products import Products
from neighborlm.programs.resources import MadeOnDemand
from neighborlm.programs.run import Run
from neighborlm.programs.settings import KNNSettings, MemorySettings, NeighborSettings
from neighborlm.programs.subject import Subject

ROWS = {"tokens_per_sample": 24, "context_window": 12, "max_tokens": 96}
QUIET = {"enable_progress_bar": False, "logger": False}


@pytest.fixture(scope="module")
def place(workplace, tmp_path_factory) -> Path:
    """A folder with the corpus, two runs with weights of their own, and the datastore of one."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(workplace / "words", place / "words")
    for name, more in (("first", 0.0), ("second", 1e-3)):
        checkpoint = torch.load(
            workplace / "runs/words/checkpoints/best.ckpt", map_location="cpu", weights_only=True
        )
        checkpoint["state_dict"]["decoder.layers.0.fc1.bias"] += more
        (place / f"runs/{name}/checkpoints").mkdir(parents=True)
        torch.save(checkpoint, place / f"runs/{name}/checkpoints/best.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        products("first").ensure_datastore("train")
    return place


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def products(name: str, knn: KNNSettings | None = None, precision: str | None = None, **rows):
    """The datastores of a run's model."""
    return subject(name, precision, **rows).products(knn or KNNSettings(k=4))


def subject(name: str, precision: str | None = None, **rows) -> Subject:
    run = Run(f"runs/{name}", QUIET | {"precision": precision})
    data = LMDataModule("words", **ROWS | rows)
    return Subject.of(load_model(f"runs/{name}/checkpoints/best.ckpt"), data, run)


OTHERWISE = [
    ({}, {}, None),
    ({"context_window": 3}, {}, "--data.context_window 12, --data.context_window 3"),
    ({"break_mode": "eos"}, {}, "--data.break_mode none, --data.break_mode eos"),
    ({"tokens_per_sample": 20}, {}, "--data.tokens_per_sample 24, --data.tokens_per_sample 20"),
    ({"drop_long_lines": True}, {}, "--data.drop_long_lines false, --data.drop_long_lines true"),
    (
        {"precision": "bf16-mixed"},
        {},
        "--trainer.precision 32-true, --trainer.precision bf16-mixed",
    ),
    ({}, {"min_context": 2}, "--knn.min_context 0, --knn.min_context 2"),
]


@pytest.mark.parametrize(("rows", "knn", "flags"), OTHERWISE, ids=str)
def test_a_datastore_that_was_made_otherwise(capsys, rows, knn, flags):
    """It is used, which is said once, and not taken for what is to be made."""
    made = products("first", KNNSettings(k=4, **knn), **rows)
    assert made.open_fitting_datastore("train").path == Path("datastores/first/train")
    made.open_fitting_datastore("train")
    said = capsys.readouterr().out.splitlines()
    if flags is None:
        assert said == []
        made.refuse_other("train")
        return
    (sentence,) = said
    with pytest.raises(InputError) as refusal:
        made.refuse_other("train")
    for text in (sentence, str(refusal.value)):
        assert text.startswith("datastores/first/train: was made with ")
        assert all(flag in text for flag in (*flags.split(", "), "--knn.datastore")), text


@pytest.mark.parametrize(
    ("knn", "words"),
    [
        ({"shards": 2}, ("--knn.shards 1", "--knn.shards 2")),
        ({"placement": "round_robin"}, ("--knn.placement contiguous", "round_robin")),
    ],
)
def test_a_datastore_that_was_dealt_otherwise(capsys, knn, words):
    made = products("first", KNNSettings(k=4, **knn))
    assert made.open_fitting_datastore("train") is not None
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError) as refusal:
        made.refuse_other("train")
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"thinned": {"method": "random"}}, "was made smaller, by neighborlm datastore thin"),
        ({"model": None}, "is of the original program"),
    ],
)
def test_a_datastore_that_this_command_cannot_make(tmp_path, changed, words):
    """Is not taken for the one that it is to make, and stays."""
    copy = shutil.copytree("datastores/first/train", tmp_path / "copy")
    manifest = copy / "manifest.json"
    made_from = json.loads(manifest.read_text())["made_from"] | changed
    without_digests(manifest, made_from={k: v for k, v in made_from.items() if v is not None})
    made = products("first", KNNSettings(k=4, datastore=str(copy)))
    with pytest.raises(InputError, match=rf"copy: {words}.*\(--knn.datastore FOLDER\)"):
        made.refuse_other("train")


def test_the_figures_say_how_the_datastore_was_made():
    knn = KNNSettings(k=4, min_context=2, lmbda=0.2)
    found = evaluate(subject("first"), "test", ["knn"], settings=MemorySettings(knn)).results["knn"]
    assert (found["min_context"], found["shards"]) == (0, 1)


def test_two_evaluations_that_tune_at_once():
    """One that lasts as long as another begins and ends keeps its folder."""
    settings = MemorySettings(KNNSettings(k=4))
    with own_folder(Path("runs/first"), "retrieved") as others:
        found = evaluate(subject("first"), "test", ["knn"], settings=settings).results["knn"]
        assert found["tuned"]
        assert list(Path("runs/first").glob("retrieved-*")) == [others]


def test_another_models_datastore_is_refused_by_name():
    """From Python too."""
    knn = KNNSettings(k=4, datastore="datastores/first/train")
    with pytest.raises(InputError) as refusal:
        evaluate(subject("second"), "test", ["knn"], settings=MemorySettings(knn))
    sentence = str(refusal.value)
    for words in (
        "datastores/first/train: its model is runs/first/checkpoints/best.ckpt (",
        "but runs/second/checkpoints/best.ckpt (",
        "--knn.datastore",
    ):
        assert words in sentence, sentence
    names = json.loads(Path("datastores/first/train/manifest.json").read_text())["names"]
    assert "the train split of words" in names.values()
    with pytest.raises(InputError, match="but the valid split of words"):
        products("first", knn).refuse_other("valid")


def test_models_of_one_corpus_do_not_share_a_place(tmp_path):
    first, second = (products(name) for name in ("first", "second"))
    assert first.datastore_path("train") == Path("datastores/first/train")
    assert second.datastore_path("train") == Path("datastores/second/train")
    assert second.open_fitting_datastore("train") is None
    of_corpus = MadeOnDemand(subject("first"), MemorySettings()).folder("train-suffix_array")
    assert of_corpus == Path("datastores/words/train-suffix_array")


def test_a_datastore_that_lies_with_the_corpus_is_found(place, monkeypatch):
    """As version 0.1 made it; but not another model's, nor one of another text."""
    moved = place / "datastores/words"
    (place / "datastores/first").rename(moved)
    try:
        assert products("first").datastore_path("train") == Path("datastores/words/train")
        assert products("first").open_fitting_datastore("train") is not None
        assert products("second").datastore_path("train") == Path("datastores/second/train")
        assert products("first").datastore_path("valid") == Path("datastores/first/valid")
        elsewhere = replace(KNNSettings(k=4), key_type="last_hidden")
        found = products("first", elsewhere).datastore_path("train")
        assert found == Path("datastores/first/train-last_hidden")
        loose = load_model("runs/first/checkpoints/best.ckpt")
        loose.checkpoint = "anywhere.pt"
        of_corpus = Products(Run("runs/x"), LMDataModule("words", **ROWS), loose, KNNSettings())
        assert of_corpus.datastore_path("train") == Path("datastores/words/train")
    finally:
        moved.rename(place / "datastores/first")


def test_networks_that_differ_in_the_settings_of_their_lm(tmp_path):
    """Their weights are the same; version 0.1 did not tell their keys apart."""
    lm = load_model("runs/first/checkpoints/best.ckpt")
    others = TransformerLM(**{**lm.hparams, "heads": 4, "compile": False}).eval()
    others.load_state_dict(lm.state_dict())
    data, found = LMDataModule("words", **ROWS), []
    for part in (lm, others):
        torch.manual_seed(0)
        model = GNNLM(part, heads=2, layers=1).eval()
        model.neighbors = {}
        knn, shown = KNNSettings(key_type="gnn"), NeighborSettings()
        found.append(Products(Run(tmp_path), data, model, knn, shown=shown))
    made_from = found[0].expected_of_datastore()
    assert made_from["model"] == found[1].expected_of_datastore()["model"]
    assert made_from["lm"] == lm.fingerprint
    with pytest.raises(InputError, match=r"its lm is .* is expected here"):
        found[0].refuse_mismatch(Path("x"), made_from, found[1].expected_of_datastore())
    del made_from["lm"]
    found[0].refuse_mismatch(Path("x"), made_from, found[1].expected_of_datastore())
