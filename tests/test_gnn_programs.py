"""GNN-LM by the programs, as a user runs them, on a tiny corpus."""

import json

import numpy as np
import pytest
from small import ROOT

from models.checkpoint import load_model
from retrieval.neighbors import NeighborTable

DATA = (
    *("--config", ROOT / "configs/text/gnn_lm.yaml", "--data.corpus", "words"),
    *("--data.tokens_per_sample", 24, "--data.context_window", 12, "--data.max_tokens", 96),
    *("--data.threshold", 0, "--neighbors.k", 4, "--neighbors.exclude_window", 30),
    *("--trainer.enable_progress_bar", "false"),
)
NETWORK = ("--model.heads", 2, "--model.warmup_updates", 5)
STEPS = ("--trainer.max_steps", 20, "--trainer.val_check_interval", 10)
SPLITS = ("train", "valid", "test")
LM = ("--model.lm_checkpoint", "runs/words/checkpoints/best.ckpt")


@pytest.fixture(scope="module")
def trained(workplace, run_program):
    """The folder, with a GNN-LM trained in runs/words-gnn_lm."""
    run_program(workplace, "train.py", *DATA, *NETWORK, *STEPS, *LM)
    return workplace


def read(folder, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_training_makes_what_it_lacks(trained):
    store = trained / "datastores/words"
    tables = {split: NeighborTable.open(store / split / "neighbors-k4.npy") for split in SPLITS}
    for split, table in tables.items():
        tokens = len(np.load(store / split / "values.npy"))
        assert table.rows.shape == (tokens, 4)
    own = np.arange(len(tables["train"].rows))[:, None]
    rows = tables["train"].rows
    assert (np.abs(rows - own)[rows >= 0] >= 30).all()
    assert load_model(trained / "runs/words-gnn_lm/checkpoints/best.ckpt").updates > 0


def test_evaluation_beside_the_lm_alone(trained, run_program):
    ckpt = ("--ckpt_path", "runs/words-gnn_lm/checkpoints/best.ckpt")
    scores = ("--output", "gnn.json", "--token_scores", "gnn.npz")
    done = run_program(trained, "evaluate.py", *DATA, *ckpt, *scores)
    assert "GNN-LM" in done.stdout
    results, columns = read(trained, "gnn.json"), np.load(trained / "gnn.npz")
    mean = {name: -columns[name].astype(np.float64).mean() for name in columns.files[2:]}
    assert results["loss"] == pytest.approx(mean["lm_log_prob"], abs=1e-6)
    assert results["gnn"]["loss"] == pytest.approx(mean["gnn_log_prob"], abs=1e-6)
    lm = (*DATA[2:8], "--data.max_tokens", 96, "--data.threshold", 0)
    run_program(
        *(trained, "evaluate.py", "--config", ROOT / "configs/text/lm.yaml", *lm),
        *("--trainer.enable_progress_bar", "false", "--output", "lm.json"),
    )
    assert read(trained, "lm.json")["loss"] == pytest.approx(results["loss"], abs=1e-6)


@pytest.fixture(scope="module")
def found_by_lm() -> dict:
    """What a test leaves for the one after it."""
    return {}


@pytest.mark.parametrize(
    ("key_type", "rescored"), [("last_ffn_input", ()), ("gnn", ()), ("last_ffn_input", ("gnn",))]
)
def test_knn_on_top(trained, run_program, found_by_lm, key_type, rescored):
    flags = ("--knnlm", "--knn.k", 8, "--knn.index", "flat", "--knn.key_type", key_type)
    flags += ("--knn.rescore_key_type", *rescored) if rescored else ()
    ckpt = ("--ckpt_path", "runs/words-gnn_lm/checkpoints/best.ckpt", "--token_scores", "mix.npz")
    run_program(trained, "evaluate.py", *DATA, *ckpt, *flags, "--output", "mix.json")
    results, columns = read(trained, "mix.json"), np.load(trained / "mix.npz")
    expected = np.logaddexp(
        columns["gnn_log_prob"] + np.log(0.75), columns["knn_log_prob"] + np.log(0.25)
    )
    np.testing.assert_allclose(columns["log_prob"], expected, atol=1e-5)
    if rescored:  # the same neighbours with other weights
        plain = results["knn"]["target_among_neighbors"], columns["knn_log_prob"]
        assert plain[0] == found_by_lm["share"]
        assert not np.allclose(plain[1], found_by_lm["knn_log_prob"])
    elif key_type == "last_ffn_input":
        found_by_lm["share"] = results["knn"]["target_among_neighbors"]
        found_by_lm["knn_log_prob"] = columns["knn_log_prob"]
    assert results["knn"]["ppl"] == pytest.approx(np.exp(-columns["log_prob"].mean()), rel=1e-4)


def test_a_second_stage_begins_with_the_first(trained, run_program):
    start = ("--model.start_from", "runs/words-gnn_lm/checkpoints/best.ckpt")
    stage = ("--trainer.default_root_dir", "runs/stage2", "--neighbors.k", 2)
    steps = ("--trainer.max_steps", 2, "--trainer.val_check_interval", 1, "--model.lr", 1e-9)
    done = run_program(trained, "train.py", *DATA, *NETWORK, *steps, *start, *stage)
    assert "lowest validation perplexity" in done.stdout
    assert not list((trained / "datastores/words/train").glob("neighbors-k2*.npy"))  # k = 4 serves


@pytest.mark.parametrize(
    ("program", "flags", "said"),
    [
        ("train.py", (), "--model.lm_checkpoint is missing"),
        ("train.py", ("--model.lm_checkpoint", "nowhere.ckpt"), "nowhere.ckpt: no such"),
        ("train.py", (*LM, "--neighbors.index", "IVFx"), "'IVFx'"),
        ("train.py", (*LM, "--neighbors.features", "codes", "--neighbors.codec", "Q"), "'Q'"),
        ("train.py", (*LM, "--neighbors.k", 0), "--neighbors.k is 0"),
        ("evaluate.py", ("--ckpt_path", LM[1]), "holds a TransformerLM"),
    ],
)
def test_refusals(trained, run_program, program, flags, said):
    network = NETWORK if program == "train.py" else ()
    root = ("--trainer.default_root_dir", "runs/refused")
    done = run_program(trained, program, *DATA, *network, *root, *flags, status=2)
    assert said in done.stderr
