"""train.py and evaluate.py as processes: their products exist, agree and are reused."""

import json
import sys

import numpy as np
import pytest
import torch
from small import ROOT, SMALL, hyperparameters, logged_by, scalars, write_corpus

from neighborlm.programs import evaluate, train
from neighborlm.programs.checkpoints import load_model

HERE = (*SMALL, "--data.corpus", "words")
OF_AN_UPDATE = ("loss", "tokens_per_second", "peak_memory_gb")


def test_training_leaves_a_run(workplace):
    run = workplace / "runs" / "words"
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (run / "config.yaml").is_file()
    logged = scalars(run / "train")
    assert {
        "train/loss",
        "val/loss",
        "val/ppl",
        "train/grad_norm",
        "train/tokens_per_second",
        "train/peak_memory_gb",
    } <= set(logged)
    steps = {tag: [event.step for event in logged[f"train/{tag}"]] for tag in OF_AN_UPDATE}
    assert steps["loss"] == steps["tokens_per_second"] == steps["peak_memory_gb"] != []
    assert any(tag.startswith("lr-") for tag in logged)
    ppl = [event.value for event in logged["val/ppl"]]
    assert ppl[-1] < ppl[0] < 60
    assert json.loads((run / "training.json").read_text())["updates"] == 40
    settings, figures = hyperparameters(run / "train")
    assert settings["model.width"] == 16
    assert settings["trainer.max_steps"] == 40
    assert figures == {"val/best_ppl"}
    assert logged["val/best_ppl"][-1].value == pytest.approx(min(ppl))
    assert "hp_metric" not in logged


def test_plain_evaluation_agrees_with_its_scores(workplace, run_program):
    flags = ("--output", "plain.json", "--token_scores", "plain.npz", "--split", "valid")
    run_program(workplace, "evaluate.py", *HERE, *flags)
    results = json.loads((workplace / "plain.json").read_text())
    scores = np.load(workplace / "plain.npz")
    text = (workplace / "words" / "valid.txt").read_text()
    assert results["tokens"] == len(text.split()) + text.count("\n")
    np.testing.assert_array_equal(scores["position"], np.arange(results["tokens"]))
    assert results["loss"] == pytest.approx(-scores["lm_log_prob"].astype(np.float64).mean())
    assert results["ppl"] == pytest.approx(np.exp(results["loss"]))
    # The validation during training scored the same rows.
    best = min(event.value for event in scalars(workplace / "runs/words/train")["val/ppl"])
    assert results["ppl"] == pytest.approx(best, rel=1e-5)


def test_knnlm_equals_brute_force_over_the_stored_keys(workplace, run_program):
    flags = ("--knnlm", "--knn.k", 8, "--knn.lmbda", 0.3, "--knn.temperature", 2.5)
    files = ("--output", "knn.json", "--token_scores", "knn.npz", "--knn.dtype", "fp32")
    place = ("--knn.datastore", "fp32-store")
    run_program(workplace, "evaluate.py", *HERE, *flags, *files, *place)
    results, scores = (
        json.loads((workplace / "knn.json").read_text()),
        np.load(workplace / "knn.npz"),
    )
    keys = np.load(workplace / "fp32-store" / "keys.npy").astype(np.float64)
    values = np.load(workplace / "fp32-store" / "values.npy")
    assert len(keys) == results["knn"]["datastore_rows"]

    # The queries are what the same program stores of the test split.
    store = ("--save_datastore", "--split", "test", "--knn.datastore", "queries")
    run_program(workplace, "evaluate.py", *HERE, *store, "--knn.dtype", "fp32")
    queries = np.load(workplace / "queries" / "keys.npy").astype(np.float64)
    targets = np.load(workplace / "queries" / "values.npy")
    np.testing.assert_array_equal(targets, scores["target"])
    distances = ((queries[:, None] - keys[None]) ** 2).sum(-1)
    nearest = np.argsort(distances, axis=1)[:, :8]
    weights = np.exp(-np.take_along_axis(distances, nearest, 1) / 2.5)
    hits = values[nearest] == targets[:, None]
    p_knn = (weights * hits).sum(1) / weights.sum(1)
    p_lm = np.exp(scores["lm_log_prob"].astype(np.float64))
    np.testing.assert_allclose(np.exp(scores["knn_log_prob"]), p_knn, rtol=1e-3, atol=1e-6)
    mixed = np.log(0.3 * p_knn + 0.7 * p_lm)
    np.testing.assert_allclose(scores["log_prob"], mixed, rtol=1e-3, atol=1e-4)
    assert results["knn"]["loss"] == pytest.approx(-mixed.mean(), abs=1e-4)
    assert results["knn"]["target_among_neighbors"] == pytest.approx(hits.any(1).mean(), abs=1e-6)


def test_tuning_beats_no_memory_and_is_logged(workplace, run_program):
    flags = ("--knnlm", "--knn.k", 32, "--split", "valid")
    done = run_program(workplace, "evaluate.py", *HERE, *flags, "--output", "auto.json")
    assert "tuned on this very split" in done.stdout
    results = json.loads((workplace / "auto.json").read_text())
    assert results["knn"]["tuned"]
    assert results["knn"]["ppl"] < results["ppl"]
    place = logged_by(results, workplace)
    logged = scalars(place)
    assert {"valid/ppl", "valid/knn/ppl", "valid/knn/nearest_distance"} <= set(logged)
    curve = logged["tuning/valid_ppl_over_lmbda_percent"]
    assert [event.step for event in curve] == list(range(100))
    assert curve[0].value == pytest.approx(results["ppl"], rel=1e-5)
    assert min(curve, key=lambda event: event.value).step == round(100 * results["knn"]["lmbda"])
    settings, figures = hyperparameters(place)
    assert (settings["split"], settings["memories"], settings["knn.k"]) == ("valid", "knn", 32)
    assert settings["model.width"] == 16
    assert not any(name.startswith(("automaton.", "recent.")) for name in settings)
    assert figures == {"valid/ppl", *(f"valid/knn/{x}" for x in ("ppl", "lmbda", "temperature"))}
    assert len(logged["valid/ppl"]) == 1


def test_what_is_retrieved_is_kept_and_mixed_again(workplace, run_program):
    """With the figures of a command that searches."""
    flags = (*HERE, "--knnlm", "--knn.k", 16, "--knn.index", "IVF8,SQ8", "--output", "c.json")
    kept = ("--knn.cache", "kept")
    run_program(workplace, "evaluate.py", *flags, *kept)
    made = {path: path.stat().st_mtime_ns for path in (workplace / "kept").glob("*/*.npy")}
    assert len(made) == 16  # of two splits
    again = ("--knn.lmbda", 0.4, "--knn.temperature", 3, "--token_scores", "c.npz")
    found = {}
    for name, cache in (("searching", ()), ("kept", kept)):
        run_program(workplace, "evaluate.py", *flags, *cache, *again)
        scores = dict(np.load(workplace / "c.npz"))
        found[name] = json.loads((workplace / "c.json").read_text()), scores
    (searching, scores), (cached, of_cache) = found.values()
    assert cached["knn"]["loss"] == pytest.approx(searching["knn"]["loss"], rel=1e-6)
    assert cached["loss"] == pytest.approx(searching["loss"], rel=1e-6)
    assert cached["knn"]["kth_distance"] == pytest.approx(searching["knn"]["kth_distance"])
    for name in ("position", "target", "lm_log_prob", "knn_log_prob", "log_prob"):
        np.testing.assert_allclose(of_cache[name], scores[name], rtol=1e-4)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    refused = run_program(workplace, "evaluate.py", *flags, *kept, "--knn.nprobe", 3, status=2)
    assert "nprobe" in refused.stderr
    run_program(workplace, "neighborlm", "sweep", "--cache", "kept/test", "--output", "s.json")
    swept = json.loads((workplace / "s.json").read_text())
    assert swept["best"]["loss"] < swept["lm"]["loss"]


def test_products_are_made_by_stage_and_reused(workplace, run_program):
    store = workplace / "datastores" / "words" / "train-last_hidden"
    flags = (*HERE, "--knn.key_type", "last_hidden", "--knn.index", "IVF8,SQ8", "--knn.nprobe", 8)
    run_program(workplace, "evaluate.py", *flags, "--save_datastore")
    index = store / "IVF8_SQ8-l2.faiss"
    assert not index.exists()
    run_program(workplace, "evaluate.py", *flags, "--build_index")
    made = {path: path.stat().st_mtime_ns for path in (store / "keys.npy", index)}
    run_program(workplace, "evaluate.py", *flags, "--knnlm", "--knn.k", 4, "--knn.lmbda", 0.25)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert (
        "datastore"
        not in json.loads((workplace / "runs/words/results.json").read_text())["stage_seconds"]
    )


def test_figures_do_not_depend_on_batches_or_workers(workplace, run_program):
    flags = (*HERE, "--knnlm", "--knn.k", 16, "--knn.datastore", "fixed-store")
    flags = (*flags, "--knn.lmbda", 0.25)
    losses = []
    for variant in ((), ("--data.max_tokens", 24), ("--data.num_workers", 2)):
        run_program(workplace, "evaluate.py", *flags, *variant, "--output", "variant.json")
        results = json.loads((workplace / "variant.json").read_text())
        losses.append((results["loss"], results["knn"]["loss"], results["tokens"]))
    assert losses[1][2] == losses[2][2] == losses[0][2]
    np.testing.assert_allclose(losses[1][:2], losses[0][:2], rtol=1e-6)
    np.testing.assert_allclose(losses[2][:2], losses[0][:2], rtol=1e-12)


def test_figures_do_not_depend_on_ranks(workplace, run_program):
    """Three ranks that share the batches unevenly; also the datastore they write together."""
    flags = (*HERE, "--knnlm", "--knn.k", 16, "--knn.index", "IVF8,SQ8")
    results, stores = [], []
    for ranks, strategy in ((1, "auto"), (3, "ddp")):
        store = workplace / f"store-of-{ranks}"
        here = ("--knn.datastore", store, "--output", f"{ranks}.json", "--token_scores")
        devices = ("--trainer.devices", ranks, "--trainer.strategy", strategy)
        run_program(workplace, "evaluate.py", *flags, *here, f"{ranks}.npz", *devices)
        results.append(json.loads((workplace / f"{ranks}.json").read_text()))
        stores.append((store / "keys.npy").read_bytes())
    assert stores[0] == stores[1]
    for name in ("tokens", "loss", "ppl"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-12)
        assert results[0]["knn"][name] == pytest.approx(results[1]["knn"][name], rel=1e-12)
    scores = [np.load(workplace / f"{ranks}.npz") for ranks in (1, 3)]
    for name in scores[0]:
        np.testing.assert_array_equal(scores[0][name], scores[1][name])


def test_parameters_shared_out_to_ranks(workplace, run_program, tmp_path):
    """fsdp trains to what ddp trains to, also where it goes on, and what it leaves is evaluated."""
    best = []
    for strategy, updates in (("ddp", (4,)), ("fsdp", (2, 4))):
        ranks = ("--trainer.devices", 2, "--trainer.strategy", strategy)
        run = tmp_path / strategy
        flags = (*HERE, *ranks, "--trainer.val_check_interval", 2)
        for last in updates:
            place = ("--trainer.default_root_dir", run, "--trainer.max_steps", last)
            run_program(workplace, "train.py", *flags, *place)
        summary = json.loads((run / "training.json").read_text())
        assert summary["updates"] == 4
        best.append(summary["best_valid_ppl"])
    assert best[1] == pytest.approx(best[0], rel=1e-6)
    made = ("--ckpt_path", run / "checkpoints/best.ckpt", "--output", tmp_path / "results.json")
    run_program(workplace, "evaluate.py", *HERE, *made, *ranks, "--split", "valid")
    assert json.loads((tmp_path / "results.json").read_text())["ppl"] == pytest.approx(best[0])


def test_same_command_same_numbers_and_a_finished_run_stays(workplace, run_program, tmp_path):
    flags = (*HERE, "--trainer.max_steps", 40, "--trainer.val_check_interval", 20)
    run_program(workplace, "train.py", *flags, "--trainer.default_root_dir", tmp_path / "again")
    first = load_model(workplace / "runs/words/checkpoints/best.ckpt").state_dict()
    again = load_model(tmp_path / "again/checkpoints/best.ckpt").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)

    before = (workplace / "runs/words/checkpoints/best.ckpt").read_bytes()
    done = run_program(workplace, "train.py", *flags)
    assert "continuing from" in done.stdout
    assert (workplace / "runs/words/checkpoints/best.ckpt").read_bytes() == before


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*/*.yaml")), ids=str)
def test_shipped_configs_parse(config, monkeypatch, capsys):
    program = evaluate if config.name == "hf.yaml" else train  # of a model that is not trained
    monkeypatch.setattr(sys, "argv", ["program.py", "--config", str(config), "--print_config"])
    with pytest.raises(SystemExit) as stop:
        program.main()
    assert stop.value.code == 0
    assert "max_steps" in capsys.readouterr().out


def test_characters_and_lines(tmp_path, run_program):
    write_corpus(tmp_path / "words", seed=1, lines=(60, 20, 20))
    flags = (*HERE, "--data.level", "char", "--data.break_mode", "complete")
    run_program(tmp_path, "train.py", *flags, "--trainer.max_steps", 4)
    run_program(tmp_path, "evaluate.py", *flags, "--ckpt_path", "runs/words/checkpoints/last.ckpt")
    results = json.loads((tmp_path / "runs/words/results.json").read_text())
    assert results["tokens"] == len((tmp_path / "words" / "test.txt").read_text())
