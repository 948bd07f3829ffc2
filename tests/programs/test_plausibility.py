"""A dictionary and a model of the same sizes as the right ones are told from these."""

from pathlib import Path

import numpy as np
import pytest
import torch

from neighborlm.datamodules.dictionary import EOS, SPECIAL_SYMBOLS
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs.checkpoints import load_model
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.programs.plausibility import check_ids, check_keys, confusion, loss_and_entropy
from neighborlm.programs.products import Products
from neighborlm.programs.run import Run
from neighborlm.programs.settings import KNNSettings
from neighborlm.programs.subject import Subject
from neighborlm.retrieval.store.datastore import Datastore

ORIGINAL = Path(__file__).parents[3] / "shared/parity/knnlm"
BEST = "runs/words/checkpoints/best.ckpt"
ROWS = {"tokens_per_sample": 24, "context_window": 12}


@pytest.fixture(autouse=True)
def there(workplace, monkeypatch) -> None:
    monkeypatch.chdir(workplace)


@pytest.fixture
def lm() -> TransformerLM:
    """A trained model that does not say which dictionary it was trained with."""
    model = load_model(BEST)
    model.dictionary_fingerprint = None
    return model


def test_a_dictionary_of_the_same_size(lm, tmp_path, capsys):
    """Its symbols are those of the right one in another order."""
    run = Run(tmp_path)
    Subject(lm, LMDataModule("words", **ROWS), run)
    assert "warning" not in capsys.readouterr().out
    lines = Path("runs/words/dict.txt").read_text().splitlines()
    shuffled = [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]
    (tmp_path / "dict.txt").write_text("\n".join(shuffled) + "\n")
    other = LMDataModule("words", **ROWS, dictionary=str(tmp_path / "dict.txt"))
    assert other.vocab_size == lm.vocab_size == len(lines) + len(SPECIAL_SYMBOLS)
    for _ in range(2):
        Subject(lm, other, run)
    (sentence,) = (line for line in capsys.readouterr().out.splitlines() if "warning" in line)
    assert f"{BEST}: seems to know nothing of words" in sentence
    assert "--data.dictionary" in sentence
    lm.dictionary_fingerprint = other.dictionary.fingerprint  # it says so itself
    check_ids(lm, other, Run(tmp_path))
    assert "warning" not in capsys.readouterr().out


def test_the_loss_and_the_entropy_are_those_of_the_whole_distribution(lm):
    tokens = LMDataModule("words", **ROWS).stream("valid").tokens[:128]
    loss, entropy = loss_and_entropy(lm, tokens, 128)
    read = torch.from_numpy(np.concatenate([[EOS], tokens[:-1]]).astype(np.int64))[None]
    log_probs = lm.log_prob(lm.hidden(read)[0][0]).double().detach().numpy()
    assert loss == pytest.approx(-log_probs[np.arange(128), tokens].mean(), abs=1e-5)
    assert entropy == pytest.approx(-(np.exp(log_probs) * log_probs).sum(1).mean(), abs=1e-5)


def test_a_raw_datastore_of_another_model(lm, tmp_path, capsys):
    """As the original writes them, without a word on what made them."""
    data = LMDataModule("words", **ROWS)
    knn = KNNSettings(k=4, datastore=str(tmp_path / "ours"))
    made = Products(Run(tmp_path, {"logger": False}), data, lm, knn).ensure_datastore("train")
    np.asarray(made.keys).tofile(tmp_path / "raw_keys.npy")
    np.asarray(made.values).astype(np.int32).tofile(tmp_path / "raw_vals.npy")
    raw = KNNSettings(k=4, datastore=str(tmp_path / "raw"), size=len(made), dim=made.dim)
    settings = {name: value for name, value in lm.hparams.items() if name != "compile"}
    said = []
    for model in (lm, TransformerLM(**settings).eval()):
        products = Products(Run(tmp_path), data, model, raw, root=str(tmp_path / "imported"))
        for _ in range(2):
            assert isinstance(products.open_fitting_datastore("train"), Datastore)
        said.append([line for line in capsys.readouterr().out.splitlines() if "warning" in line])
    assert said[0] == []
    assert len(said[1]) == 1
    assert "its keys seem to be those of another model" in said[1][0]


@pytest.mark.skipif(not ORIGINAL.exists(), reason="needs the original's outputs")
def test_the_originals_own(tmp_path, capsys):
    data = CorpusDataModule(str(ORIGINAL / "data-bin"), cache_dir=str(tmp_path))
    model, run = load_model(ORIGINAL / "checkpoint.pt"), Run(tmp_path)
    raw = {"datastore": str(ORIGINAL / "dstore_mini"), "size": 18958, "dim": model.width}
    products = Products(run, data, model, KNNSettings(k=4, **raw), root=str(tmp_path / "stores"))
    store = products.open_fitting_datastore("train")
    check_ids(model, data, run)
    assert "warning" not in capsys.readouterr().out
    assert confusion(model, "last_ffn_input", store, 128) < 0.01
    check_keys(model, "last_hidden", store, data, Run(tmp_path))  # another key type than it holds
    assert "than last_hidden of this one" in capsys.readouterr().out
