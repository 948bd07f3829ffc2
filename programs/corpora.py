"""Which reader a corpus gets: `--data.corpus` names text, token files or a data-bin alike, and
a tokenizer reads raw text."""

from pathlib import Path

from neighborlm.common.contracts import Corpus
from neighborlm.common.extras import module_of_extra
from neighborlm.datamodules.binarized import BinarizedCorpus, CorpusSettings
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.originals.databin import DataBin, is_databin


def open_corpus(settings: CorpusSettings) -> Corpus:
    """The corpus that settings name."""
    if settings.tokenizer is not None:
        flag = f"--data.tokenizer {settings.tokenizer}"
        tokenized = module_of_extra("neighborlm.datamodules.tokenized", "hf", flag)
        return tokenized.TokenizedCorpus(settings)
    named = bool(settings.corpus) and is_databin(Path(settings.corpus).expanduser())
    return DataBin(settings) if named else BinarizedCorpus(settings)


class CorpusDataModule(LMDataModule):
    """Blocks of tokens of a corpus, which may be a data-bin, with left context for evaluation."""

    open_corpus = staticmethod(open_corpus)
