"""A GPT-2 and a tokenizer of its own, small enough for tests that run the programs."""

from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

END = "<|end|>"


def write_tokenizer(folder: Path, texts: list[str], size: int = 300) -> Path:
    """A byte-level BPE of some texts, with an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    whole.save_pretrained(folder)
    return folder


def write_gpt2(folder: Path, texts: list[str], **settings) -> Path:
    """A GPT-2 with random weights, and its tokenizer."""
    write_tokenizer(folder, texts)
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 304}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**{**sizes, **ends, **settings})
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():  # random ones give all tokens the same probability
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder
