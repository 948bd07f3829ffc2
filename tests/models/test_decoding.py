"""Choosing tokens: drawing against closed forms, beams against all texts and against those of
transformers."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from neighborlm.common.errors import InputError
from neighborlm.models.decoding import Decoding, beam_search, draw, sample

VOCAB, END = 5, 3


class Table:
    """Texts whose next token depends on the last two."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = (2 * torch.randn(VOCAB, VOCAB, VOCAB, generator=generator)).log_softmax(-1)
        self.texts: torch.Tensor | None = None

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        before = tokens[:, :0] if self.texts is None else self.texts
        self.texts = torch.cat([before, tokens], dim=1)
        return self.table[self.texts[:, -2].clamp(min=0), self.texts[:, -1]]

    def select(self, texts: torch.Tensor) -> None:
        self.texts = self.texts[texts]

    def log_prob(self, prompt: list[int], text: tuple[int, ...]) -> float:
        whole, begin = [0, *prompt, *text], 1 + len(prompt)
        return sum(
            self.table[whole[t - 2], whole[t - 1], whole[t]].item()
            for t in range(begin, len(whole))
        )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, np.array([16, 9, 4, 1]) / 30),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.5}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_in_their_shares(settings, expected):
    """Evenly spaced random numbers give each token its share of them."""
    uniform = (torch.arange(9000).double() + 0.5) / 9000
    log_probs = torch.tensor([0.1, 0.3, 0.4, 0.2]).log().expand(9000, -1)
    drawn = draw(log_probs, Decoding(**settings), uniform)
    shares = drawn.bincount(minlength=4)[[2, 1, 3, 0]] / 9000
    np.testing.assert_allclose(shares, expected, atol=2e-4)


def test_the_largest_random_number_draws_a_token_that_is_possible():
    log_probs = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert draw(log_probs, Decoding(), torch.ones(1).double()).item() < 2


def test_a_text_ends_and_others_go_on():
    log_probs = torch.full((VOCAB, VOCAB, VOCAB), -20.0)
    for before, after in ((1, 2), (2, END), (0, 1), (4, 4)):
        log_probs[:, before, after] = 0
    texts, steps = Table(), []
    texts.table = log_probs
    decoding = Decoding(max_new_tokens=4, temperature=0)
    prompts, uniforms = torch.tensor([[-1, 1], [0, 4]]), torch.zeros(2, 4).double()
    chosen = sample(texts, prompts, decoding, uniforms, END, steps.append)
    assert chosen.tokens.tolist() == [[2, END, -1, -1], [4, 4, 4, 4]]
    assert chosen.log_probs.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(torch.stack(steps, dim=1), chosen.tokens)


@pytest.mark.parametrize("end", [None, END])
def test_enough_beams_find_the_most_probable_text(end):
    """Among all that have the full length, and all that end before."""
    prompts, decoding = torch.tensor([[-1, 1], [2, 4]]), Decoding(max_new_tokens=3, beams=130)
    chosen = beam_search(Table(), prompts, decoding, end)
    for number, prompt in enumerate(([1], [2, 4])):
        texts = {
            text[: text.index(END) + 1] if end in text else text
            for text in product(range(VOCAB), repeat=3)
        }
        best = max(texts, key=lambda text: Table().log_prob(prompt, text) / len(text))
        found = tuple(token for token in chosen.tokens[number].tolist() if token >= 0)
        assert found == best
        total = chosen.log_probs[number].sum().item()
        assert total == pytest.approx(Table().log_prob(prompt, best), abs=1e-5)


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (2, 1.0), (4, 0.3), (3, 2.0)])
@torch.inference_mode()
def test_beams_are_those_of_transformers(beams, penalty):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    torch.manual_seed(2)
    end = 6
    ids = {"eos_token_id": end, "bos_token_id": end, "pad_token_id": end}
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(vocab_size=12, **sizes, **ids, initializer_range=0.25)
    model = transformers.GPT2LMHeadModel(config).eval()

    class Texts:
        whole = torch.empty(12 * beams, 0, dtype=torch.int64)

        def extend(self, tokens):
            self.whole = torch.cat([self.whole, tokens], dim=1)
            mask = (self.whole >= 0).long()
            places = (mask.cumsum(dim=1) - 1).clamp(min=0)
            given = {"attention_mask": mask, "position_ids": places}
            return model(self.whole.clamp(min=0), **given).logits[:, -1].log_softmax(dim=-1)

        def select(self, texts):
            self.whole = self.whole[texts]

    prompts = torch.randint(7, 12, (12, 5))
    prompts[1, :2], prompts[2, :4] = -1, -1
    decoding = Decoding(8, beams=beams, length_penalty=penalty)
    if beams == 1:
        greedy = Decoding(8, temperature=0)
        chosen = sample(Texts(), prompts, greedy, torch.zeros(12, 8).double(), end)
    else:
        chosen = beam_search(Texts(), prompts, decoding, end)
    settings = {"num_beams": beams, "length_penalty": penalty, "do_sample": False}
    mask, ids = (prompts >= 0).long(), prompts.where(prompts >= 0, end)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, **settings)[:, 5:]
    found = chosen.tokens.where(chosen.tokens >= 0, end)
    width = max(found.shape[1], expected.shape[1])
    found, expected = (F.pad(x, (0, width - x.shape[1]), value=end) for x in (found, expected))
    assert torch.equal(found, expected)
    assert 0 < (chosen.tokens == end).any(dim=1).sum() < 12


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0; expected at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0; expected more than 0"),
        ({"beams": 2, "top_k": 5}, "top_k is 5, which has no effect with --beams 2"),
        ({"length_penalty": 2.0}, "length_penalty is 2.0, which has no effect"),
    ],
    ids=str,
)
def test_what_cannot_be_right_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Decoding(**settings).check()
