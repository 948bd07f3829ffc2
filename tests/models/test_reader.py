"""Texts longer than a row of the model, against the rows that an evaluation reads."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from neighborlm.common.contracts import Want
from neighborlm.datamodules.blocks import make_rows
from neighborlm.models.reader import Reader, padded
from neighborlm.models.transformer_lm import TransformerLM

VOCAB, WINDOW, KEYS = 20, 8, "last_ffn_input"


@pytest.fixture(scope="module")
def model() -> TransformerLM:
    torch.manual_seed(0)
    sizes = {"width": 8, "ffn_width": 12, "layers": 2, "heads": 2}
    return TransformerLM(VOCAB, **sizes, max_target_positions=WINDOW).eval()


def row_by_row(
    model, text: list[int], context: int, first: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities `[T, V]` and keys `[T, d]` after each token of a text, the first row of
    which is full, while the next ones begin with context; the first token of a row is `first`, if
    there is one."""
    log_probs, keys, begin, start = [], [], 0, 0
    while start < len(text):
        end = begin + WINDOW
        row = text[begin:end] if first is None else [first, *text[begin + 1 : end]]
        hidden, features = model.hidden(torch.tensor([row]), (KEYS,))
        log_probs.append(model.log_prob(hidden[0, start - begin :]))
        keys.append(features[KEYS][0, start - begin :])
        begin, start = end - context, end
    return torch.cat(log_probs), torch.cat(keys)


def test_the_rows_are_those_of_an_evaluation(model):
    text = torch.randint(VOCAB, (21,))
    rows = make_rows(np.array([0, 21]), "none", WINDOW, WINDOW // 2, WINDOW)
    expected = [
        model.log_prob(model.hidden(text[None, begin:end])[0][0, start - begin :])
        for begin, start, end in zip(rows.context_starts, rows.starts, rows.ends, strict=True)
    ]
    found, _ = row_by_row(model, text.tolist(), WINDOW // 2)
    assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("context", "first"), [(0, None), (3, None), (5, None), (3, 7), (7, 7)])
@pytest.mark.parametrize("cuts", [[21], [1] * 21, [9, 1, 1, 10]], ids=["at once", "one by one", ""])
@torch.inference_mode()
def test_texts_in_a_batch_are_read_row_by_row(model, context, first, cuts):
    texts = [torch.randint(VOCAB, (length,)).tolist() for length in (21, 14, 2)]
    if first is not None:
        texts = [[first, *text[1:]] for text in texts]
    reader, read = Reader(model, Want(keys=(KEYS,)), WINDOW, context, first), 0
    for tokens in padded(texts).split(cuts, dim=1):
        log_probs, keys = reader.read(tokens)
        read += tokens.shape[1]
        for number, text in enumerate(texts):
            there = read - 21 + len(text)
            if there > 0:
                expected, expected_keys = row_by_row(model, text, context, first)
                newest = min(tokens.shape[1], there)
                close = {"atol": 1e-5, "rtol": 0}
                assert_close(log_probs[number], expected[there - 1], **close)
                assert_close(
                    keys[KEYS][number, -newest:], expected_keys[there - newest : there], **close
                )


@torch.inference_mode()
def test_texts_become_copies_of_others(model):
    texts = [torch.randint(VOCAB, (length,)).tolist() for length in (7, 3)]
    reader = Reader(model, Want(), WINDOW, 4)
    reader.read(padded(texts))
    for parents in ([1, 0], [0, 0], [1, 1]):  # the longer text is dropped on the way
        reader.select(torch.tensor(parents))
        new = torch.randint(VOCAB, (2, 2))
        texts = [texts[parent] + more for parent, more in zip(parents, new.tolist(), strict=True)]
        log_probs = reader.read(new).log_probs
        for number, text in enumerate(texts):
            expected = row_by_row(model, text, 4)[0][-1]
            assert_close(log_probs[number], expected, atol=1e-5, rtol=0)
