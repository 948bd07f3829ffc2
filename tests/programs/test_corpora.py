"""What the programs take as --data.corpus, each by its reader."""

import sys

import numpy as np
import pytest
from small import SMALL, write_corpus

from neighborlm.common.errors import InputError
from neighborlm.datamodules.binarized import BinarizedCorpus
from neighborlm.originals.databin import DataBin, write_databin
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.programs.train import TrainCLI, checkpoint_to_continue


def test_text_and_the_databin_of_it_give_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"tokens_per_sample": 24, "max_tokens": 96, "cache_dir": str(tmp_path / "cache")}
    write_corpus(tmp_path / "words")
    text = CorpusDataModule("words", **settings)
    assert isinstance(text.corpus, BinarizedCorpus)
    for split in ("train", "valid", "test"):
        write_databin(text.stream(split), tmp_path / "bin" / split, text.vocab_size)
    text.dictionary.save(tmp_path / "bin" / "dict.txt")
    databin = CorpusDataModule("bin/", **settings)
    assert isinstance(databin.corpus, DataBin)
    assert databin.fingerprints == text.fingerprints
    for ours, theirs in zip(text.val_dataloader(), databin.val_dataloader(), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours[:4], theirs[:4], strict=True))


@pytest.mark.parametrize("name", ["", "nowhere", "file"])
def test_what_is_no_corpus(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--data\.corpus .*; expected a folder"):
        CorpusDataModule(name).dictionary  # noqa: B018


@pytest.mark.parametrize("name", ["words/", "./words"])
def test_a_run_goes_on_under_another_name_of_the_same_folder(workplace, monkeypatch, name):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--data.corpus", name])
    assert checkpoint_to_continue(TrainCLI()) == "runs/words/checkpoints/last.ckpt"
