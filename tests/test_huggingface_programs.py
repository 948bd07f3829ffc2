"""The programs on a model of transformers: memories beside it, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small import ROOT, write_corpus
from small_huggingface import write_gpt2, write_tokenizer

from neighborlm.common.errors import InputError
from neighborlm.programs.checkpoints import load_model
from neighborlm.programs.evaluate import main
from neighborlm.programs.train import main as train

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with raw text and a model."""
    folder = tmp_path_factory.mktemp("huggingface")
    write_corpus(folder / "words", lines=(60, 20, 20))
    write_gpt2(folder / "gpt2", [(folder / "words" / "train.txt").read_text()])
    return folder


@pytest.fixture
def evaluate(place, monkeypatch) -> Callable[..., dict]:
    """Evaluates the model, with further flags; the latest results, if there are any."""
    monkeypatch.chdir(place)

    def run(*flags: object) -> dict:
        config = ("--config", ROOT / "configs/text/hf.yaml", "--data.corpus", "words")
        quiet = ("--trainer.enable_progress_bar", "false")
        output = ("--output", "results.json", "--token_scores", "scores.npz")
        given = flags if "--model.pretrained" in flags else (*flags, "--model.pretrained", "gpt2")
        main([str(flag) for flag in (*config, *quiet, *output, *given)])
        results = Path("results.json")
        return json.loads(results.read_text()) if results.exists() else {}

    return run


def test_a_memory_beside_it(evaluate, place, capsys):
    found = evaluate("--knnlm", "--knn.k", 16)
    assert found["knn"]["tuned"]
    assert found["window"]["tokens_per_sample"] == 32  # all that the model reads
    assert found["window"]["stride"] == 16
    scores = np.load("scores.npz")
    text = (place / "words" / "test.txt").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained("gpt2")
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert scores["target"].tolist() == ids
    assert (found["words"], found["bytes"]) == (len(text.split()), len(text.encode()))
    nats = -scores["log_prob"].astype(np.float64).sum()
    assert found["knn"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()))
    model = transformers.AutoModelForCausalLM.from_pretrained("gpt2")
    row = torch.tensor([tokenizer.eos_token_id, *ids])
    for start in (0, 16, 64):  # a row scores 16 tokens behind up to 16 of context
        first = max(start - 16, 0)
        with torch.no_grad():
            log_probs = model(row[None, first : start + 16]).logits[0].log_softmax(-1)
        expected = log_probs[torch.arange(len(log_probs)), row[first + 1 : start + 17]]
        np.testing.assert_allclose(
            scores["lm_log_prob"][start : start + 16], expected[-16:], atol=1e-5
        )
    manifest = json.loads((place / found["knn"]["datastore"] / "manifest.json").read_text())
    assert manifest["made_from"]["keys"] == "input of transformer.h.1.mlp"
    assert "keys last_ffn_input: input of transformer.h.1.mlp" in capsys.readouterr().out


def test_several_memories_together(evaluate):
    found = evaluate("--memories", "knn,ngram,recent", "--knn.k", 16)
    assert found["mixture"]["ppl"] < found["ppl"]


def test_a_datastore_of_another_model_or_tokenizer_is_refused(evaluate, place, tmp_path, capsys):
    evaluate("--save_datastore", "--split", "train")
    store = place / "datastores" / "words-gpt2" / "train"
    text = (place / "words" / "train.txt").read_text()
    other = write_gpt2(tmp_path / "other", [text], layer_norm_epsilon=1e-3)
    with pytest.raises(SystemExit):
        evaluate("--model.pretrained", other, "--knnlm", "--knn.datastore", store)
    said = capsys.readouterr().err
    assert f"{store}: its model is " in said
    assert said.count("\n") == 1
    other = write_tokenizer(shutil.copytree(place / "gpt2", tmp_path / "gpt2"), [text[:500]])
    with pytest.raises(SystemExit):
        evaluate("--model.pretrained", other, "--knnlm", "--knn.datastore", store)
    assert f"{store}: its dictionary is " in capsys.readouterr().err


GNN = (
    *("--config", ROOT / "configs/text/gnn_lm.yaml", "--data.corpus", "words"),
    *("--data.tokens_per_sample", 32, "--data.context_window", 16, "--data.max_tokens", 128),
    *("--neighbors.k", 4, "--neighbors.exclude_window", 40, "--model.layers", 1),
    *("--model.heads", 2, "--model.pretrained", "gpt2", "--trainer.enable_progress_bar", "false"),
)


def test_a_graph_network_on_a_frozen_model(place, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(place)
    steps = ("--trainer.max_steps", 6, "--trainer.val_check_interval", 3)
    train([*map(str, (*GNN, *steps))])
    checkpoint = place / "runs/words-gnn_lm/checkpoints/best.ckpt"
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not any(name.startswith("lm.") for name in weights)
    train([*map(str, (*GNN, *steps, "--trainer.max_steps", 8))])  # goes on
    assert "continuing from" in capsys.readouterr().out
    output = ("--output", tmp_path / "results.json", "--ckpt_path", checkpoint)
    memory = ("--knnlm", "--knn.k", 8, "--knn.lmbda", 0.1)
    main([*map(str, (*GNN, *output, *memory))])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["gnn"]["ppl"] != pytest.approx(found["ppl"], rel=1e-6)
    assert found["gnn"]["ppl"] < 1.1 * found["ppl"]
    assert found["knn"]["bits_per_byte"] > 0
    model = load_model(checkpoint)
    assert model.lm_fingerprint == model.lm.fingerprint
    shutil.copytree("gpt2", "kept")
    try:
        change_config(place / "gpt2", layer_norm_epsilon=1e-3)
        with pytest.raises(InputError, match=r"is another model .* than the graph network was"):
            load_model(checkpoint)
    finally:
        shutil.rmtree("gpt2")
        Path("kept").rename("gpt2")


REFUSED = {
    "no such directory": (lambda m: m.rename(m.parent / "away"), "no such directory"),
    "no config": (lambda m: (m / "config.json").unlink(), "has no config.json"),
    "pickles": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        "has pytorch_model.bin, but no *.safetensors; expected these, or --model.allow_pickle",
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "has no weights; expected"),
    "no tokenizer": (
        lambda m: [file.unlink() for file in m.glob("*token*")],
        "has no tokenizer; expected a directory with a tokenizer.json",
    ),
    "a config of another size": (
        lambda m: change_config(m, n_layer=3),
        "its files lack 12 of the weights of a GPT2LMHeadModel, such as transformer.h.2.attn",
    ),
    "an encoder with a decoder": (
        lambda m: transformers.T5Config(d_model=8).save_pretrained(m),
        "is a t5, an encoder with a decoder; expected a causal language model",
    ),
    "no language model": (
        lambda m: transformers.ViTConfig().save_pretrained(m),
        "is a vit, of which transformers has no causal language model",
    ),
    "a larger tokenizer": (
        lambda m: write_tokenizer(m, [f"w{i} word{i}" for i in range(500)], 400),
        "gives ids up to 399, but the model has a vocabulary of 304",
    ),
}


def change_config(model: Path, **settings) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_used_is_said_in_one_sentence(what, evaluate, place, tmp_path, capsys):
    damage, sentence = REFUSED[what]
    model = shutil.copytree(place / "gpt2", tmp_path / "model")
    damage(model)
    with pytest.raises(SystemExit):
        evaluate("--model.pretrained", model)
    said = capsys.readouterr().err
    assert sentence in said
    assert str(model) in said
    assert said.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--data.tokens_per_sample", 33), "but the model reads at most 32 tokens"),
        (("--model.pretrained", "null"), "--model.pretrained is missing"),
        (("--data.dictionary", "dict.txt"), "has no effect with --data.tokenizer gpt2"),
        (("--knnlm", "--knn.key_type", "layer:2:output"), "the model's layers are 0 to 1"),
    ],
)
def test_flags_that_do_not_fit(flags, sentence, evaluate, capsys):
    with pytest.raises(SystemExit):
        evaluate(*flags)
    assert sentence in capsys.readouterr().err


def test_a_tokenizer_that_is_not_the_model_s_is_refused(evaluate, place, tmp_path, capsys):
    other = write_tokenizer(tmp_path / "other", ["another text of other words"])
    with pytest.raises(SystemExit):
        evaluate("--data.tokenizer", other)
    assert "gives other ids than the tokenizer of --model.pretrained gpt2" in (
        capsys.readouterr().err
    )


def test_without_the_extra_a_sentence_says_so(evaluate, monkeypatch, capsys):
    monkeypatch.setattr("neighborlm.common.extras.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        evaluate()
    assert "--arch huggingface: needs transformers, tokenizers, datasets, safetensors, not " in (
        capsys.readouterr().err
    )
