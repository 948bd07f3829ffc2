"""A memory of one's own: how frequent each token is in the training text."""

from collections import Counter

import numpy as np
import torch

from neighborlm.common.contracts import Memory, Opinion, Want
from neighborlm.retrieval.memories import MEMORIES


class Unigram(Memory):
    want, in_order = Want(), False

    def __init__(self, resources):
        counts = np.bincount(resources.tokens("train"), minlength=resources.vocab_size)
        self.probs = torch.from_numpy(counts / counts.sum())

    def say(self, asked):
        return Opinion(self.probs[asked.targets].log())

    def distribution(self, asked):
        probs = self.probs.float().expand(len(asked.positions), -1)
        return torch.arange(len(self.probs)).expand_as(probs), probs


def test_unigrams_vote_beside_the_lm(evaluated, words, monkeypatch):
    monkeypatch.setitem(MEMORIES, "unigram", Unigram)
    counts = Counter(words("train"))

    def ppl(weight, split, scores):
        unigram = np.array([counts[word] for word in words(split)]) / counts.total()
        lm = np.exp(scores["lm_log_prob"].astype(np.float64))
        return np.exp(-np.log(lm + weight * (unigram - lm)).mean(axis=-1))

    results, on_test = evaluated("--memories", "unigram")
    grid = ppl(np.linspace(0, 1, 10001)[:, None], "valid", evaluated("--split", "valid")[1])
    weight, found = results["mixture"]["weight.unigram"], results["mixture"]["ppl"]
    assert abs(weight - grid.argmin() / 10000) < 2e-4
    np.testing.assert_allclose(found, ppl(weight, "test", on_test), rtol=1e-6)
