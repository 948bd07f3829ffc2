"""The programs on an accelerator, which must give the figures that they give on the CPU."""

import json

import pytest
from small import ROOT, SMALL

CORPUS = ("--data.corpus", "words")
GNN = (
    *(
        "--config",
        ROOT / "configs/text/gnn_lm.yaml",
        *CORPUS,
        "--trainer.enable_progress_bar=false",
    ),
    *("--data.tokens_per_sample", 24, "--data.context_window", 12, "--data.max_tokens", 96),
    *("--data.threshold", 0, "--neighbors.k", 4, "--neighbors.exclude_window", 30),
)
LM = "runs/words/checkpoints/best.ckpt"
STEPS = ("--trainer.max_steps", 4, "--trainer.val_check_interval", 4)


def compare(run_here, run_there, folder, *flags) -> None:
    """Evaluates on the CPU and on the accelerator, and compares all losses."""
    losses = []
    for run, name in ((run_here, "here.json"), (run_there, "there.json")):
        run(folder, "evaluate.py", *flags, "--output", name)
        said = json.loads((folder / name).read_text())
        losses.append([said[part]["loss"] for part in ("gnn", "knn", "mixture") if part in said])
        losses[-1].append(said["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_an_lm_and_every_memory(workplace, run_program, run_on_accelerator):
    memories = ("--knnlm", "--memories", "knn,ngram,recent,automaton", "--mixer", "gate")
    evaluation = (*SMALL, *CORPUS, "--ckpt_path", LM, *memories, "--knn.k", 8)
    compare(run_program, run_on_accelerator, workplace, *evaluation)


def test_a_gnn_lm_and_its_products(workplace, run_program, run_on_accelerator, tmp_path):
    """Trained there, with all that it lacks made there; evaluated there and here."""
    (tmp_path / "words").symlink_to(workplace / "words")
    run_on_accelerator(tmp_path, "train.py", *SMALL, *CORPUS, *STEPS)
    network = ("--model.lm_checkpoint", LM, "--model.heads", 2, "--model.warmup_updates", 2)
    run_on_accelerator(tmp_path, "train.py", *GNN, *network, *STEPS)
    checkpoint = ("--ckpt_path", "runs/words-gnn_lm/checkpoints/best.ckpt")
    compare(run_program, run_on_accelerator, tmp_path, *GNN, *checkpoint, "--knnlm", "--knn.k", 8)


def test_a_text_is_the_same(workplace, run_program, run_on_accelerator):
    """That of beams, longer than a row of the model."""
    knn = ("--knnlm", "--knn.k", 8, "--knn.lmbda", 0.5, "--knn.temperature", 3)
    decoding = ("--prompt", "w1 w2", "--max_new_tokens", 30, "--beams", 2)
    texts = []
    for run, name in ((run_program, "here.jsonl"), (run_on_accelerator, "there.jsonl")):
        flags = (*SMALL, *CORPUS, "--ckpt_path", LM, *knn, *decoding, "--output", name)
        run(workplace, "generate.py", *flags)
        texts.append(json.loads((workplace / name).read_text())["tokens"])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 30
