"""Adaptive input and softmax against their formulas, one word at a time, in float64."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neighborlm.models import adaptive
from neighborlm.models.adaptive import AdaptiveInput, AdaptiveSoftmax, PlainSoftmax, band_edges

VOCAB, WIDTH, CUTOFFS, FACTOR = 23, 8, (5, 12, 19), 2


def double(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().cpu().double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum())


def naive_log_prob(softmax: AdaptiveSoftmax, hidden: np.ndarray) -> np.ndarray:
    """Log-probabilities of the whole vocabulary for one hidden vector: log p_head + log p_tail."""
    words, classes = [double(w) for w in softmax.words], double(softmax.classes)
    head = log_softmax(np.concatenate([words[0] @ hidden, classes @ hidden]))
    first = len(words[0])
    result = [*head[:first]]
    for tail in range(len(words) - 1):
        narrow = double(softmax.down[tail]).T @ hidden
        result += [*(head[first + tail] + log_softmax(words[tail + 1] @ narrow))]
    return np.array(result)


def make_softmax(kind: str) -> AdaptiveSoftmax | PlainSoftmax:
    torch.manual_seed(0)
    if kind == "plain":
        return PlainSoftmax(VOCAB, WIDTH, tied=None)
    embedding = None if kind == "untied" else AdaptiveInput(VOCAB, WIDTH, CUTOFFS, FACTOR)
    softmax = AdaptiveSoftmax(
        VOCAB, WIDTH, CUTOFFS, FACTOR, tied=embedding, tie_projections=kind == "projections tied"
    )
    nn.init.normal_(softmax.classes)
    return softmax


@pytest.mark.parametrize("kind", ["untied", "tied", "projections tied"])
def test_log_prob_is_the_formula(kind, device):
    softmax = make_softmax(kind).to(device)
    hidden = torch.randn(6, WIDTH).to(device)
    found = softmax.log_prob(hidden)
    assert found.shape == (6, VOCAB)
    expected = np.stack([naive_log_prob(softmax, h) for h in double(hidden)])
    np.testing.assert_allclose(double(found), expected, atol=2e-6)
    np.testing.assert_allclose(np.exp(expected).sum(axis=1), 1)


@pytest.mark.parametrize("kind", ["untied", "projections tied", "plain"])
def test_target_log_prob_is_its_column_also_in_parts(kind, monkeypatch):
    """The gradients are equal too, and no more rows are computed at once than allowed."""
    softmax = make_softmax(kind)
    targets = torch.tensor([*range(VOCAB), 0, 0, 22, 7])  # every edge of a band
    hidden = torch.randn(len(targets), WIDTH, requires_grad=True)
    upstream = torch.randn(len(targets))
    leaves = [hidden, *softmax.parameters()]

    expected = softmax.log_prob(hidden)[torch.arange(len(targets)), targets]
    gradients = torch.autograd.grad(expected, leaves, upstream)
    rows = []
    original = softmax._target_log_prob
    monkeypatch.setattr(
        softmax, "_target_log_prob", lambda h, t: rows.append(len(h)) or original(h, t)
    )
    for limit in (adaptive.LOGITS_AT_ONCE, 5 * softmax.columns, 1):
        monkeypatch.setattr(adaptive, "LOGITS_AT_ONCE", limit)
        rows.clear()
        found = softmax.target_log_prob(hidden, targets)
        assert max(rows) == min(max(limit // softmax.columns, 1), len(targets))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(
            torch.autograd.grad(found, leaves, upstream), gradients, strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        with torch.inference_mode():
            torch.testing.assert_close(softmax.target_log_prob(hidden, targets), expected.detach())


def test_parts_drop_the_same_in_both_passes(monkeypatch):
    """The recomputation in the backward pass uses the dropout of the forward pass."""
    softmax = AdaptiveSoftmax(VOCAB, WIDTH, CUTOFFS, FACTOR, dropout=0.5).train()
    hidden = torch.randn(VOCAB, WIDTH, requires_grad=True)
    targets = torch.arange(VOCAB)
    monkeypatch.setattr(adaptive, "LOGITS_AT_ONCE", 5 * softmax.columns)
    torch.manual_seed(1)
    found = softmax.target_log_prob(hidden, targets)
    torch.manual_seed(1)
    parts = zip(hidden.split(5), targets.split(5), strict=True)
    expected = torch.cat([softmax._target_log_prob(h, t) for h, t in parts])
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(x.sum(), hidden)[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs)
    undropped = softmax.eval().target_log_prob(hidden, targets)
    assert not torch.allclose(undropped, expected)
    torch.testing.assert_close(undropped, softmax.log_prob(hidden).diagonal())


def test_what_is_tied_is_one_parameter():
    embedding = AdaptiveInput(VOCAB, WIDTH, CUTOFFS, FACTOR)
    sizes = {"words": 5 * 8 + 7 * 4 + 7 * 2 + 4 * 1, "down": 8 * (4 + 2 + 1), "classes": 3 * 8}

    def of_its_own(tie_projections):
        softmax = AdaptiveSoftmax(
            VOCAB, WIDTH, CUTOFFS, FACTOR, tied=embedding, tie_projections=tie_projections
        )
        shared = set(embedding.parameters())
        assert all(w is e.weight for w, e in zip(softmax.words, embedding.embeddings, strict=True))
        return sum(p.numel() for p in softmax.parameters() if p not in shared)

    untied = AdaptiveSoftmax(VOCAB, WIDTH, CUTOFFS, FACTOR)
    assert sum(p.numel() for p in untied.parameters()) == sum(sizes.values())
    assert of_its_own(tie_projections=False) == sizes["down"] + sizes["classes"]
    assert of_its_own(tie_projections=True) == sizes["classes"]
    weight = nn.Parameter(torch.randn(VOCAB, WIDTH))
    assert PlainSoftmax(VOCAB, WIDTH, tied=weight).weight is weight


def test_input_is_a_loop_over_tokens():
    torch.manual_seed(0)
    embedding = AdaptiveInput(VOCAB, WIDTH, CUTOFFS, FACTOR)
    assert [e.embedding_dim for e in embedding.embeddings] == [8, 4, 2, 1]
    tokens = torch.arange(VOCAB).flip(0).repeat(2)[: VOCAB * 2 - 2].view(4, -1)
    found = embedding(tokens)
    assert found.shape == (*tokens.shape, WIDTH)
    edges = [0, *CUTOFFS]
    for place in np.ndindex(*tokens.shape):
        word = int(tokens[place])
        band = max(i for i, edge in enumerate(edges) if edge <= word)
        vector = double(embedding.embeddings[band].weight)[word - edges[band]]
        expected = double(embedding.projections[band].weight) @ vector
        np.testing.assert_allclose(double(found[place]), expected, atol=1e-6)


def test_cutoffs_beyond_the_vocabulary_are_left_out():
    assert band_edges([5, 23, 12, 900], VOCAB) == [0, 5, 12, 23]
    torch.manual_seed(0)
    hidden, targets = torch.randn(4, WIDTH), torch.tensor([0, 5, 12, 22])
    softmax = AdaptiveSoftmax(VOCAB, WIDTH, (5, 23, 900), FACTOR)
    assert [len(w) for w in softmax.words] == [5, 18]
    torch.testing.assert_close(softmax.log_prob(hidden).exp().sum(1), torch.ones(4))
    one_band = AdaptiveSoftmax(VOCAB, WIDTH, (900,), FACTOR)
    expected = F.log_softmax(hidden @ one_band.words[0].T, dim=1)
    torch.testing.assert_close(one_band.log_prob(hidden), expected)
    torch.testing.assert_close(
        one_band.target_log_prob(hidden, targets), expected[torch.arange(4), targets]
    )
    embedding = AdaptiveInput(VOCAB, WIDTH, (900,), FACTOR)
    expected = embedding.embeddings[0].weight[targets] @ embedding.projections[0].weight.T
    torch.testing.assert_close(embedding(targets), expected)
