"""What the tool writes for fairseq is read again as it was."""

import numpy as np
from small import write_corpus

from neighborlm.datamodules.lm import LMDataModule
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.tools.convert import main


def test_a_corpus_as_a_data_bin(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "words")
    main(["to_databin", "words", str(tmp_path / "bin")])
    assert "data-bin" in capsys.readouterr().out
    text, databin = LMDataModule("words"), CorpusDataModule(str(tmp_path / "bin"))
    assert databin.dictionary.fingerprint == text.dictionary.fingerprint
    for split in ("train", "valid", "test"):
        assert databin.fingerprint(split) == text.fingerprint(split)
        np.testing.assert_array_equal(databin.stream(split).tokens, text.stream(split).tokens)
