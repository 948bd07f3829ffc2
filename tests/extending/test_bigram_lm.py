"""A language model of one's own, no subclass of ours: how often each token followed another."""

from collections import Counter
from itertools import pairwise

import numpy as np
import torch

from neighborlm.common.contracts import Scored
from neighborlm.programs.architectures import ARCHITECTURES, Architecture


class Bigram:
    max_target_positions, fingerprint = 10**6, "bigram"

    def __init__(self, tokens, vocab_size, eos=2):
        self.vocab_size = vocab_size
        pairs = np.append(eos, tokens[:-1]).astype(np.int64) * vocab_size + tokens
        counts = 1 + np.bincount(pairs, minlength=vocab_size**2)  # add-one smoothing
        counts = torch.from_numpy(counts).view(vocab_size, vocab_size)
        self.log_probs = (counts / counts.sum(dim=1, keepdim=True)).log()

    def key_width(self, key_type):
        return self.vocab_size

    def score(self, batch, want):
        before, targets = batch.tokens[batch.scored], batch.targets[batch.scored]
        keys = {key_type: self.log_probs[before] for key_type in want.keys}
        return Scored(batch.positions[batch.scored], targets, self.log_probs[before, targets], keys)


def test_bigrams_are_evaluated(evaluated, words, monkeypatch):
    bigram = Architecture(load=lambda s: Bigram(s.data.stream("train").tokens, s.data.vocab_size))
    monkeypatch.setitem(ARCHITECTURES, "bigram", bigram)
    results, _ = evaluated("--arch", "bigram")
    train, test = ["</s>", *words("train")], ["</s>", *words("test")]
    pairs, first = Counter(pairwise(train)), Counter(train[:-1])
    symbols = -(-(len(set(train)) - 1 + 4) // 8) * 8  # with special ones, in multiples of 8
    log_probs = [np.log((pairs[p] + 1) / (first[p[0]] + symbols)) for p in pairwise(test)]
    np.testing.assert_allclose(results["ppl"], np.exp(-np.mean(log_probs)), rtol=1e-5)
