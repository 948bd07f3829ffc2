"""A run of evaluations of a small model of transformers, and its mixture by brute force."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small import ROOT, write_corpus

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from small_huggingface import write_gpt2  # noqa: E402

from neighborlm.programs.evaluate import main  # noqa: E402

CONFIG = ("--config", str(ROOT / "configs/text/hf.yaml"), "--data.corpus", "words")
FLAGS = (*CONFIG, "--model.pretrained", "gpt2", "--trainer.enable_progress_bar", "false")
KNN = ("--knn.k", "16", "--knn.index", "flat", "--knn.dtype", "fp32")
RUN, ALL = Path("knn"), Path("all")


def make_runs(folder: Path) -> Path:
    """Text, a model, and a run with an evaluation of knn and one with all memories."""
    write_corpus(folder / "words", lines=(60, 20, 20))
    text = (folder / "words" / "train.txt").read_text()
    write_gpt2(folder / "gpt2", [text], n_positions=64)
    given = ("--knn.lmbda", "0.6", "--knn.temperature", "20")
    memories = ("--memories", "knn,ngram,recent,automaton", "--recent.size", "16")
    memories += ("--recent.temperature", "4", "--knn.temperature", "20")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*FLAGS, *KNN, "--trainer.default_root_dir", str(RUN), "--knnlm", *given])
        main([*FLAGS, *KNN, "--trainer.default_root_dir", str(ALL), *memories])
    return folder


def load() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained("gpt2").eval()


PROMPTS = ["w1 w2 w3 w4", "w20 w21"]


def tokenized() -> tuple[transformers.PreTrainedTokenizerBase, dict[str, torch.Tensor]]:
    """The prompts in a batch, padded on the left."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("gpt2", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [tokenizer.eos_token + prompt for prompt in PROMPTS]
    return tokenizer, dict(tokenizer(prompts, return_tensors="pt", padding=True))


def brute_force(text: list[int], lmbda: float = 0.6) -> np.ndarray:
    """log p of every token after a text, by all keys of the datastore."""
    model, (store,) = load(), Path().glob("**/train/keys.npy")
    keys, values = np.load(store), np.load(store.with_name("values.npy"))
    found = {}
    hook = model.transformer.h[-1].mlp.register_forward_pre_hook(
        lambda _, given: found.update(key=given[0][0, -1].double().numpy())
    )
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[0, -1].double()
    hook.remove()
    distances = np.square(keys.astype(np.float64) - found["key"]).sum(axis=1)
    nearest = distances.argsort()[:16]
    weights = np.exp(-(distances[nearest] - distances.min()) / 20)
    p_knn = np.bincount(values[nearest].astype(int), weights / weights.sum(), len(logits))
    return np.log(lmbda * p_knn + (1 - lmbda) * logits.softmax(0).numpy())
