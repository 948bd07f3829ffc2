"""`Window`: compares each token of a running text with the recent positions, by blocked matrix
products.

The text comes part by part, in its order. Each token is compared with the keys of the last `size`
positions before it, wherever the parts begin and end.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from neighborlm.common.contracts import Metric

BLOCK = 64
"""Tokens whose windows are multiplied together. Blocks begin at multiples of it and are always
full, so that the probability of a token does not depend on how the text is cut into parts."""


class Block(NamedTuple):
    """The positions that n tokens, at most `BLOCK`, look back at.

    Attributes:
        tokens: places of these tokens among those of the part.
        scores: fp32 `[n, size]`, of the positions before each token, the oldest first; -inf where
            there is none. For `l2` they lack the squared length of the query, a constant of a row.
        vocabulary: int64 `[v]`, the tokens that followed any of these positions, ascending.
        columns: int64 `[n, size]`, where in the vocabulary the token is that followed each
            position; any where there is no position.
        complete: whether no position is missing.
    """

    tokens: slice
    scores: Tensor
    vocabulary: Tensor
    columns: Tensor
    complete: bool

    def column_of(self, tokens: Tensor) -> Tensor:
        """Where tokens int64 `[n]` are in the vocabulary; -1 for those that are not in it."""
        column = torch.searchsorted(self.vocabulary, tokens).clamp_(max=len(self.vocabulary) - 1)
        return torch.where(self.vocabulary[column] == tokens, column, -1)


class Window:
    """The last positions of a text.

    Args:
        size: how many of them a token looks back at.
        similarity: inner product, cosine or `l2`, minus a squared distance.
        document_end: token that ends a document, which no later token looks back beyond; None where
            the text is one document.
        device: where keys lie and are compared.
        index: of the first token in the text; blocks begin at multiples of `BLOCK`.
    """

    def __init__(
        self,
        size: int,
        similarity: Metric,
        document_end: int | None = None,
        device: torch.device | str = "cpu",
        index: int = 0,
    ) -> None:
        self.size = size
        self.similarity = similarity
        self.document_end = document_end
        self.device = torch.device(device)
        self.index = self.document_start = index
        """Of the next token, and of the first of its document."""
        self.keys: Tensor | None = None
        """fp32 `[size + BLOCK, d]`, of the last positions; any where there is none."""
        self.followed = torch.zeros(size + BLOCK, dtype=torch.int64, device=self.device)

    def prepared(self, keys: Tensor) -> Tensor:
        """Keys `[n, d]`, of any type and on any device, as they are compared: fp32 `[n, d]`."""
        keys = keys.to(self.device, torch.float32)
        return torch.nn.functional.normalize(keys) if self.similarity == "cosine" else keys

    def seen(self, followed: Tensor) -> Tensor:
        """How many positions each of the next tokens int64 `[n]`, on the CPU, looks back at: int64
        `[n]`. The number depends on earlier tokens alone."""
        index = torch.arange(self.index, self.index + len(followed))
        starts = torch.full_like(index, self.document_start)
        if self.document_end is not None:
            after = torch.where(followed == self.document_end, index + 1, self.document_start)
            starts[1:] = after.cummax(dim=0).values[:-1]
        return (index - starts).clamp(max=self.size)

    def look(self, keys: Tensor, followed: Tensor) -> Iterator[Block]:
        """The blocks of the next tokens.

        Args:
            keys: as `prepared` gives them, `[n, d]`.
            followed: int64 `[n]`, on the CPU; each is seen by later tokens alone.
        """
        n, size, before = len(keys), self.size, len(self.followed)
        seen = self.seen(followed)
        complete = seen == size
        seen, age = seen.to(self.device), torch.arange(size, 0, -1, device=self.device)
        keys = torch.cat([self._kept(keys), keys, keys.new_zeros(BLOCK, keys.shape[1])])
        followed = followed.to(self.device)
        followed = torch.cat([self.followed, followed, followed.new_zeros(BLOCK)])
        if self.similarity == "l2":  # -|q - k|² = 2 qk - |k|² - |q|²
            factor, offset = 2.0, -keys.square().sum(dim=1)
        else:
            factor, offset = 1.0, keys.new_zeros(len(keys))
        for start in range(-(self.index % BLOCK), n, BLOCK):
            first, last, at = max(start, 0), min(start + BLOCK, n), before + start
            visible, queries = slice(at - size, at + BLOCK - 1), keys[at : at + BLOCK]
            scores = torch.addmm(offset[visible], queries, keys[visible].T, alpha=factor)
            # Row j looks at the columns j to j + size - 1: the window moves on with the token.
            rows = slice(first - start, last - start)
            scores = scores.as_strided((BLOCK, size), (scores.shape[1] + 1, 1))[rows]
            all_there = bool(complete[first:last].all())
            if not all_there:
                scores.masked_fill_(age > seen[first:last, None], -torch.inf)
            vocabulary, columns = followed[visible].unique(return_inverse=True)
            columns = columns.as_strided((BLOCK, size), (1, 1))[rows]
            yield Block(slice(first, last), scores, vocabulary, columns, all_there)

    def append(self, keys: Tensor, followed: Tensor) -> None:
        """Moves on by n tokens; see `look` for the arguments."""
        if self.document_end is not None:
            ends = torch.nonzero(followed == self.document_end)
            if len(ends):
                self.document_start = self.index + int(ends[-1]) + 1
        kept = len(self.followed)
        self.keys = torch.cat([self._kept(keys), keys])[-kept:].clone()
        followed = followed.to(self.device)
        self.followed = torch.cat([self.followed, followed])[-kept:].clone()
        self.index += len(keys)

    def _kept(self, keys: Tensor) -> Tensor:
        """The keys of the last positions; zeros as wide as these keys at first."""
        if self.keys is None:
            self.keys = keys.new_zeros(len(self.followed), keys.shape[1])
        return self.keys
