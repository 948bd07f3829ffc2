"""Architectures by name: a model of no kind of ours by the ordinary path of evaluate.py, and the
flags of those that are trained."""

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small import write_corpus

from neighborlm.common.contracts import Scored, Want
from neighborlm.datamodules.dictionary import EOS
from neighborlm.datamodules.lm import LMBatch, LMDataModule
from neighborlm.models.optimization import Optimization
from neighborlm.programs import evaluate, train
from neighborlm.programs.architectures import ARCHITECTURES, Architecture


class Bigram:
    """p(w | v) is the share of w among what follows v in the training split, with one added to
    every count; v is its key."""

    max_target_positions, fingerprint = 1 << 20, "bigram"

    def __init__(self, data: LMDataModule) -> None:
        self.vocab_size = data.vocab_size
        text = torch.from_numpy(data.stream("train").tokens.astype(np.int64))
        before = torch.cat([torch.tensor([EOS]), text[:-1]])
        self.counts = torch.zeros(data.vocab_size, data.vocab_size)
        self.counts.index_put_((before, text), torch.ones(()), accumulate=True)

    def key_width(self, key_type: str) -> int:
        return self.vocab_size

    def score(self, batch: LMBatch, want: Want) -> Scored:
        tokens, targets = batch.tokens[batch.scored], batch.targets[batch.scored]
        keys = {name: 20 * torch.eye(self.vocab_size)[tokens] for name in want.keys}
        shares = (self.counts + 1) / (self.counts + 1).sum(dim=1, keepdim=True)
        log_probs = shares[tokens, targets].log() if want.log_probs else None
        return Scored(batch.positions[batch.scored], targets, log_probs, keys)


@pytest.fixture
def words(tmp_path, monkeypatch) -> LMDataModule:
    """A corpus in the working directory, and the architecture `bigram`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ARCHITECTURES, "bigram", Architecture(lambda source: Bigram(source.data)))
    return LMDataModule(str(write_corpus(tmp_path / "words")))


def run(program, monkeypatch, *flags: object) -> None:
    """Calls the main function of a program."""
    monkeypatch.setattr(sys, "argv", ["program.py", "--data.corpus", "words", *map(str, flags)])
    program.main()


def test_a_model_registered_in_one_line(words, monkeypatch):
    """Alone, and with a memory that has counted what it has: the whole datastore, of which
    neighbours with another key have no weight."""
    model = Bigram(words)
    tokens = words.stream("test").tokens.astype(np.int64)
    before, counts = np.append(EOS, tokens[:-1]), model.counts.double().numpy()
    p = ((counts + 1) / (counts + 1).sum(1, keepdims=True))[before, tokens]
    flags = ("--arch", "bigram", "--trainer.enable_progress_bar", "false")
    run(evaluate, monkeypatch, *flags, "--output", "plain.json")
    plain = json.loads(Path("plain.json").read_text())
    assert (plain["tokens"], plain["checkpoint"]) == (len(tokens), None)
    assert plain["ppl"] == pytest.approx(np.exp(-np.log(p).mean()), rel=1e-6)

    k = int(counts.sum())
    knn = ("--knnlm", "--knn.k", k, "--knn.index", "flat", "--knn.lmbda", 0.5)
    run(evaluate, monkeypatch, *flags, *knn, "--output", "knn.json")
    mixed = json.loads(Path("knn.json").read_text())
    assert mixed["ppl"] == plain["ppl"]
    p_knn = (counts / np.maximum(counts.sum(1, keepdims=True), 1))[before, tokens]
    assert (counts.sum(1)[before] > 0).all()
    expected = np.exp(-np.log((p + p_knn) / 2).mean())
    assert mixed["knn"]["ppl"] == pytest.approx(expected, rel=1e-5)


def test_what_is_only_evaluated_is_not_trained(words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(train, monkeypatch, "--arch", "bigram")
    assert stop.value.code == 2
    assert (
        "--arch bigram is not trained here; expected one of lm, gnn_lm" in capsys.readouterr().err
    )


@pytest.mark.parametrize("arch", ["lm", "gnn_lm"])
def test_settings_of_the_optimiser_are_flags_of_every_model(arch, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(train, monkeypatch, "--arch", arch, "--help")
    explained = " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        run(train, monkeypatch, "--arch", arch, "--model.lr", 0.5, "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)["model"]
    for field in fields(Optimization):
        expected = 0.5 if field.name == "lr" else field.default
        assert config[field.name] == (list(expected) if field.name == "adam_betas" else expected)
        words = Optimization.__doc__.split(f" {field.name}: ")[1].split()[:2]
        flag = rf"--model\.{field.name} (\S+|\[ITEM,\.\.\.\]) {re.escape(' '.join(words))}"
        assert re.search(flag, explained), field.name
