"""The n-gram memory by evaluate.py's own path, beside the neighbours."""

from collections import Counter

import numpy as np


def test_ngrams_vote_beside_the_neighbours(evaluated, words, workplace):
    results, scores = evaluated("--memories", "knn,ngram", "--knn.k", "8")
    train, test = words("train"), words("test")
    for t in range(0, len(test), 7):
        length = int(scores["ngram.suffix_length"][t])
        suffix, longer = test[t - length : t], test[max(t - length - 1, 0) : t]
        followers = Counter(
            train[i + length] for i in range(len(train) - length) if train[i : i + length] == suffix
        )
        assert followers.total() == scores["ngram.suffix_count"][t]
        p = np.exp(scores["ngram_log_prob"][t])
        np.testing.assert_allclose(p, followers[test[t]] / followers.total(), rtol=1e-6)
        ends = range(len(train) - len(longer))
        assert length == t or not any(train[i : i + len(longer)] == longer for i in ends)
    assert results["stage_seconds"]["tuning"] > 0  # of the temperature
    sources = ("lm_log_prob", "knn_log_prob", "ngram_log_prob")
    probs = np.exp(np.stack([scores[name] for name in sources], dtype=np.float64))
    weights = [results["mixture"][f"weight.{name}"] for name in ("lm", "knn", "ngram")]
    expected = np.exp(-np.log(np.array(weights) @ probs).mean())
    np.testing.assert_allclose(results["mixture"]["ppl"], expected, rtol=1e-5)
    assert (workplace / "datastores/words/train-suffix_array/suffixes.npy").is_file()
