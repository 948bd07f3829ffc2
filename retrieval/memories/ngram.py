"""`NGramMemory`: counts the tokens that followed the longest suffix of the context in the training
text ("infini-gram", Liu et al., COLM 2024).

Let s be the longest suffix of the context that occurs in the training text, followed by a token.
Then, without smoothing,

    p(w) = count(s w) / count(s).

The context of a token is its whole split up to there, across the ends of lines. Where not even the
last token of the context occurs, s is empty and p is the unigram distribution.
"""

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.contracts import Distribution, Memory, Opinion, Resources, Scored, Want
from neighborlm.retrieval.memories.suffix_array import Matches, SuffixArray


class NGramMemory(Memory):
    """Counts the tokens that followed the longest suffix of each context.

    Args:
        suffix_array: that of the training text.
    """

    want = Want(log_probs=False)
    in_order = False

    def __init__(self, suffix_array: SuffixArray) -> None:
        self.suffix_array = suffix_array
        self.text = np.empty(0, dtype=suffix_array.tokens.dtype)

    @classmethod
    def of(cls, resources: Resources) -> "NGramMemory":
        """Makes the memory of the training split; builds its suffix array unless it is there."""
        return cls(
            SuffixArray.ensure(
                resources.folder("train-suffix_array"),
                resources.tokens("train"),
                resources.vocab_size,
                resources.made_from("train"),
            )
        )

    def prepare(self) -> None:
        """Loads the compiled loops, and where in the suffix array each token begins."""
        first = torch.zeros(1, dtype=torch.int64)
        self.say(Scored(positions=first, targets=first))

    def begin_pass(self, text: np.ndarray) -> None:
        """See `Memory.begin_pass`. Phrases end at -1, and so at the end of each of several
        texts."""
        self.text = text.reshape(-1)

    def say(self, asked: Scored) -> Opinion:
        """log p of the targets, fp64. Features are `suffix_length`, the number of tokens of s;
        `suffix_count`, its occurrences; `continuations`, the number of different tokens that follow
        it; and `favourite`, the probability of the most frequent of these."""
        matches = self._matches(asked)
        hits = self.suffix_array.count(matches, asked.targets.numpy())
        with np.errstate(divide="ignore"):
            log_probs = np.log(hits / matches.counts)
        return Opinion(torch.from_numpy(log_probs), self._features(matches))

    def _features(self, matches: Matches) -> dict[str, Tensor]:
        distinct, highest = self.suffix_array.summary(matches)
        features = {
            "suffix_length": matches.lengths,
            "suffix_count": matches.counts,
            "continuations": distinct,
            "favourite": highest / matches.counts,
        }
        return {name: torch.from_numpy(column) for name, column in features.items()}

    def distribution(self, asked: Scored) -> Distribution:
        """See `Memory.distribution`: all tokens that followed s. For an empty or a frequent s they
        are much of the vocabulary, so ask for a few tokens at a time."""
        matches = self._matches(asked)
        ids, counts = self.suffix_array.continuations(matches)
        probs = (counts / matches.counts[:, None]).astype(np.float32)
        features = self._features(matches)
        return Distribution(torch.from_numpy(ids), torch.from_numpy(probs), features)

    def occurrences(self, asked: Scored, most: int) -> Tensor:
        """Rows of the training text, and so of its datastore, that follow occurrences of s, in the
        order of the tokens there: int64 `[n, most]`, -1 where there are fewer."""
        return torch.from_numpy(self.suffix_array.occurrences(self._matches(asked), most))

    def frequencies(self, asked: Scored, most: int = 4) -> tuple[Tensor, Tensor]:
        """How often the last 1 to `most` tokens of each context occur in the training text,
        followed by a token, and how many different tokens follow them; each int64 `[n, most]`."""
        found = self.suffix_array.frequencies(self.text, asked.positions.numpy(), most)
        return tuple(map(torch.from_numpy, found))

    def _matches(self, asked: Scored) -> Matches:
        return self.suffix_array.longest(self.text, asked.positions.numpy())
