"""GNN-LM by the programs, as a user runs them, on a tiny corpus."""

import json
import shutil

import numpy as np
import pytest
import torch
from small import ROOT

from neighborlm.programs.checkpoints import load_model
from neighborlm.retrieval.neighbors.tables import NeighborTable

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
GNN = "runs/words-gnn_lm/checkpoints/best.ckpt"


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
    assert (rows >= 0).all()
    assert (np.abs(rows - own) >= 30).all()
    assert load_model(trained / GNN).updates > 0
    made = read(trained, "runs/words-gnn_lm/training.json")["stage_seconds"]
    assert {f"neighbors_{split}" for split in SPLITS} <= set(made)


def test_evaluation_beside_the_lm_alone(trained, run_program):
    ckpt = ("--ckpt_path", GNN)
    scores = ("--output", "gnn.json", "--token_scores", "gnn.npz")
    done = run_program(trained, "evaluate.py", *DATA, *ckpt, *scores)
    assert "GNN-LM" in done.stdout
    results, columns = read(trained, "gnn.json"), np.load(trained / "gnn.npz")
    assert results["stage_seconds"] == {}  # all was there
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
def evaluated_with_knn(trained, run_program):
    """Evaluates it with kNN on top; gives the results and the token scores."""

    def run(key_type: str, *flags: str) -> tuple[dict, dict[str, np.ndarray]]:
        knn = ("--knnlm", "--knn.k", 8, "--knn.index", "flat", "--knn.key_type", key_type)
        knn = (*knn, "--knn.lmbda", 0.25, *flags)
        ckpt = ("--ckpt_path", GNN)
        files = ("--output", "mix.json", "--token_scores", "mix.npz")
        run_program(trained, "evaluate.py", *DATA, *ckpt, *knn, *files)
        results = read(trained, "mix.json")
        names = [row["name"] for row in results["table"]]
        assert names == ["LM", "GNN-LM", "GNN-LM + kNN"]
        return results["knn"], dict(np.load(trained / "mix.npz"))

    return run


@pytest.fixture(scope="module")
def found_by_lm(evaluated_with_knn):
    """What that gives with queries and keys of the LM."""
    return evaluated_with_knn("last_ffn_input")


def check_mixture(results: dict, columns: dict[str, np.ndarray]) -> None:
    """Of a quarter of kNN."""
    expected = np.logaddexp(
        columns["gnn_log_prob"] + np.log(0.75), columns["knn_log_prob"] + np.log(0.25)
    )
    np.testing.assert_allclose(columns["log_prob"], expected, atol=1e-5)
    assert results["ppl"] == pytest.approx(np.exp(-columns["log_prob"].mean()), rel=1e-4)


def test_knn_of_the_lm_on_top(found_by_lm):
    check_mixture(*found_by_lm)


def test_knn_of_the_graph_network_on_top(evaluated_with_knn):
    check_mixture(*evaluated_with_knn("gnn"))


def test_neighbors_of_the_lm_weighed_by_the_graph_network(evaluated_with_knn, found_by_lm):
    results, columns = evaluated_with_knn("last_ffn_input", "--knn.rescore_key_type", "gnn")
    check_mixture(results, columns)
    assert results["target_among_neighbors"] == found_by_lm[0]["target_among_neighbors"]
    assert not np.allclose(columns["knn_log_prob"], found_by_lm[1]["knn_log_prob"])


def test_shards_and_ranks_change_no_figure(trained, run_program):
    """Two ranks make what is missing, shard by shard; one finds it again."""
    ckpt = ("--ckpt_path", GNN)
    store = ("--neighbors.datastores", "shards", "--neighbors.shards", 3)
    ranks = ("--trainer.devices", 2, "--trainer.strategy", "ddp")
    found = {}
    for name, flags in (("whole", ()), ("two", (*store, *ranks)), ("one", store)):
        scores = ("--output", f"{name}.json", "--token_scores", f"{name}.npz")
        run_program(trained, "evaluate.py", *DATA, *ckpt, *scores, *flags)
        found[name] = np.load(trained / f"{name}.npz")["gnn_log_prob"]
    for name in ("two", "one"):
        np.testing.assert_array_equal(found[name], found["whole"])
    assert read(trained, "one.json")["stage_seconds"] == {}
    assert len(list((trained / "shards/test").glob("shard-*/neighbors-k4.npy"))) == 3


@pytest.fixture(scope="module")
def on_hosts(trained, run_program, run_on_hosts):
    """Runs a program as two ranks on hosts with a shard each of the training split, and whole
    datastores of the others."""
    keys = ("--neighbors.key_type", "last_hidden", "--neighbors.datastores", "made")
    steps = ("--trainer.max_steps", 2, "--trainer.val_check_interval", 1)
    root = ("--trainer.default_root_dir", "runs/made")
    run_program(trained, "train.py", *DATA, *NETWORK, *steps, *LM, *keys, *root)
    split = ("split", "--source", "made/train-last_hidden", "--output", "both/train-last_hidden")
    run_program(trained, "neighborlm", "datastore", *split, "--shards", 2)
    for number in range(2):
        absent = shutil.ignore_patterns(f"shard-{1 - number:05}-of-00002")
        shutil.copytree(trained / "both", trained / f"host{number}", ignore=absent)
        for split in ("valid-last_hidden", "test-last_hidden"):
            new = shutil.ignore_patterns("neighbors-*")
            shutil.copytree(trained / "made" / split, trained / f"host{number}" / split, ignore=new)

    def run(program: str, *flags: object) -> None:
        def on(number: int) -> tuple:
            place = ("--neighbors.datastores", f"host{number}", "--neighbors.shard", number)
            return (*DATA, *flags, *place)

        run_on_hosts(trained, program, on)

    return run


SHARDS = (
    *("--neighbors.key_type", "last_hidden", "--neighbors.features", "codes"),
    *("--neighbors.codec", "PQ4", "--neighbors.index", "IVF4,Flat", "--neighbors.shards", 2),
)


def test_hosts_that_share_no_files(trained, run_program, on_hosts):
    """They train, and evaluate, as ranks do that reach all shards."""
    steps = ("--trainer.max_steps", 6, "--trainer.val_check_interval", 3)
    train = (*SHARDS, *NETWORK, *LM, *steps)
    on_hosts("train.py", *train, "--trainer.default_root_dir", "runs/hosts")
    # Trained on one host's keys, and given to the other.
    codecs = [trained / f"host{n}/train-last_hidden/codes-PQ4.faiss" for n in range(2)]
    assert codecs[0].read_bytes() == codecs[1].read_bytes()
    both = trained / "both"
    for number in range(2):  # all that was made, in one place; but tables are searched anew
        tables = shutil.ignore_patterns("neighbors-*")
        shutil.copytree(trained / f"host{number}", both, ignore=tables, dirs_exist_ok=True)
    ranks = ("--trainer.devices", 2, "--trainer.strategy", "ddp")
    place = ("--neighbors.datastores", "both")
    root = ("--trainer.default_root_dir", "runs/both")
    run_program(trained, "train.py", *DATA, *train, *place, *ranks, *root)
    shard = "train-last_hidden/shard-00001-of-00002/neighbors-k4.npy"
    np.testing.assert_array_equal(np.load(both / shard), np.load(trained / "host1" / shard))
    found = {}
    for name in ("hosts", "both"):
        checkpoint = trained / f"runs/{name}/checkpoints/last.ckpt"
        found[name] = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, tensor in found["both"].items():
        torch.testing.assert_close(found["hosts"][name], tensor, rtol=0, atol=0)
    ckpt = ("--ckpt_path", "runs/hosts/checkpoints/last.ckpt", *SHARDS)
    on_hosts("evaluate.py", *ckpt, "--output", "hosts.json", "--token_scores", "hosts.npz")
    scores = ("--output", "both.json", "--token_scores", "both.npz")
    run_program(trained, "evaluate.py", *DATA, *ckpt, *place, *scores)
    here, there = (np.load(trained / f"{name}.npz")["gnn_log_prob"] for name in ("both", "hosts"))
    np.testing.assert_array_equal(there, here)
    assert read(trained, "hosts.json")["gnn"]["communication"]["bytes_sent"] > 10_000


def test_a_second_stage_begins_with_the_first(trained, run_program):
    start = ("--model.start_from", GNN)
    stage = ("--trainer.default_root_dir", "runs/stage2", "--neighbors.k", 2)
    steps = ("--trainer.max_steps", 2, "--trainer.val_check_interval", 1, "--model.lr", 1e-9)
    done = run_program(trained, "train.py", *DATA, *NETWORK, *steps, *start, *stage)
    assert "lowest validation perplexity" in done.stdout
    assert not list((trained / "datastores/words/train").glob("neighbors-k2*.npy"))  # k = 4 serves


def test_ranks_take_the_same_path(trained, run_program):
    """Some batches go past the graph network: what they leave out waits for nobody, where weights
    are shared out too."""
    joint = ("--model.unfreeze", "[layers]", "--model.lm_path_probability", 0.5)
    joint = (*joint, "--neighbors.token_features", "online", "--trainer.devices", 2)
    joint = (*joint, "--trainer.max_steps", 8, "--trainer.val_check_interval", 4)
    best = []
    for strategy in ("ddp", "fsdp"):
        run = ("--trainer.strategy", strategy, "--trainer.default_root_dir", f"runs/{strategy}")
        run_program(trained, "train.py", *DATA, *NETWORK, *STEPS, *LM, *joint, *run)
        best.append(read(trained, f"runs/{strategy}/training.json")["best_valid_ppl"])
    assert best[1] == pytest.approx(best[0], rel=1e-6)


def test_interrupted_training_takes_the_same_paths(trained, run_program, tmp_path):
    flags = (*DATA, *NETWORK, *LM, "--model.dropout", 0.2, "--trainer.max_steps", 12)
    flags = (*flags, "--model.unfreeze", "[layers]", "--model.lm_path_probability", 0.5)
    flags = (*flags, "--neighbors.token_features", "online", "--trainer.val_check_interval", 6)
    stop = ("--trainer.callbacks", "interrupting.Interrupt", "--trainer.callbacks.moment")
    stop = (*stop, "on_train_batch_end", "--trainer.callbacks.call", 7)
    stop = (*stop, "--trainer.callbacks.number", 2)
    runs = [tmp_path / name for name in ("whole", "cut")]
    for run, more, status in ((runs[0], (), 0), (runs[1], stop, 130), (runs[1], (), 0)):
        place = ("--trainer.default_root_dir", run)
        run_program(trained, "train.py", *flags, *place, *more, status=status)
    whole, cut = (load_model(run / "checkpoints/last.ckpt").state_dict() for run in runs)
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


SHARD = ("--neighbors.shards", 2, "--neighbors.shard", 1)
LAST_HIDDEN = (
    *("--neighbors.key_type", "last_hidden", "--neighbors.features", "keys"),
    *("--trainer.default_root_dir", "runs/last_hidden"),
)


@pytest.fixture(scope="module")
def evaluated_in_rows(trained, run_program):
    """Evaluates a GNN-LM whose keys are last_hidden in rows of some context; gives the losses of
    the LM and of itself."""
    steps = ("--trainer.max_steps", 2, "--trainer.val_check_interval", 1)
    run_program(trained, "train.py", *DATA, *NETWORK, *steps, *LM, *LAST_HIDDEN)

    def run(context: int, *flags: str) -> tuple[float, float]:
        rows = ("--data.tokens_per_sample", 12 + context, "--data.context_window", context)
        run_program(trained, "evaluate.py", *DATA, *LAST_HIDDEN, *rows, *flags)
        results = read(trained, "runs/last_hidden/results.json")
        return results["loss"], results["gnn"]["loss"]

    return run


def test_evaluation_reads_stored_token_features_if_told_to(trained, evaluated_in_rows):
    stored = ("--neighbors.token_features", "stored")
    long, short = evaluated_in_rows(12), evaluated_in_rows(0)
    assert read(trained, "runs/last_hidden/results.json")["gnn"]["token_features"] == "online"
    # Stored in rows with context, whatever rows are evaluated.
    assert evaluated_in_rows(12, *stored) == pytest.approx(long, abs=1e-3)
    lm, gnn = evaluated_in_rows(0, *stored)
    assert lm == pytest.approx(long[0], abs=1e-3)
    assert abs(short[0] - long[0]) > 1e-2
    assert abs(gnn - short[1]) > 1e-3
    knn = ("--knnlm", "--knn.k", 4, "--knn.index", "flat", "--knn.lmbda", 0.25)
    with_knn = evaluated_in_rows(0, *stored, *knn)
    assert with_knn == pytest.approx((lm, gnn), abs=1e-6)


@pytest.mark.parametrize(
    ("program", "flags", "said"),
    [
        ("train.py", (), "--model.lm_checkpoint is missing"),
        ("train.py", ("--model.lm_checkpoint", "nowhere.ckpt"), "nowhere.ckpt: no such"),
        ("train.py", (*LM, "--neighbors.index", "IVFx"), "'IVFx'"),
        ("train.py", (*LM, "--neighbors.features", "codes", "--neighbors.codec", "Q"), "'Q'"),
        ("train.py", (*LM, "--neighbors.k", 0), "--neighbors.k is 0"),
        (
            "train.py",
            (*LM, "--neighbors.token_features", "stored"),
            "--neighbors.key_type last_ffn_input is not what the softmax reads",
        ),
        (
            "train.py",
            (*LM, *LAST_HIDDEN, "--model.unfreeze", "[layers]"),
            "--model.unfreeze ['layers'] would train nothing; expected online",
        ),
        ("train.py", (*LM, *SHARD), "--trainer.num_nodes is 1; expected two shards or more"),
        (
            "train.py",
            (*LM, *SHARD, "--trainer.num_nodes", 2, "--data.num_workers", 1),
            "--data.num_workers is 1; expected 0",
        ),
        (
            "train.py",
            (*LM, *SHARD, "--trainer.num_nodes", 2, "--neighbors.index", "imported"),
            "what was imported is of a datastore in one piece",
        ),
        ("train.py", (*LM, *SHARD, "--neighbors.shards", 1), "--neighbors.shards 1; expected"),
        ("evaluate.py", ("--ckpt_path", LM[1]), "holds a TransformerLM"),
        (
            "evaluate.py",
            ("--ckpt_path", GNN, "--neighbors.features", "embeddings"),
            f"{GNN}: its features is keys, but embeddings is expected here",
        ),
    ],
)
def test_refusals(trained, run_program, program, flags, said):
    network = NETWORK if program == "train.py" else ()
    root = ("--trainer.default_root_dir", "runs/refused")
    done = run_program(trained, program, *DATA, *network, *flags, *root, status=2)
    assert said in done.stderr
