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
        ids = torch.arange(len(self.probs)).expand(len(asked.positions), -1)
        return ids, self.probs.float().expand_as(ids)


def test_unigrams_vote_beside_the_lm(evaluated, words, monkeypatch):
    monkeypatch.setitem(MEMORIES, "unigram", Unigram)
    counts = Counter(words("train"))

    def probs(split, scores):
        of_words = [counts[word] / counts.total() for word in words(split)]
        return np.exp(scores["lm_log_prob"].astype(np.float64)), np.array(of_words)

    lm, unigram = probs("valid", evaluated("--split", "valid")[1])
    weights = np.linspace(0, 1, 10001)[:, None]
    likelihoods = np.log((1 - weights) * lm + weights * unigram).mean(axis=1)
    results, scores = evaluated("--memories", "unigram")
    weight = results["mixture"]["weight.unigram"]
    assert abs(weight - weights[likelihoods.argmax(), 0]) < 2e-4
    lm, unigram = probs("test", scores)
    expected = np.exp(-np.log((1 - weight) * lm + weight * unigram).mean())
    np.testing.assert_allclose(results["mixture"]["ppl"], expected, rtol=1e-6)
