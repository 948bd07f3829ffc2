"""Input embeddings and output softmaxes, adaptive (Baevski & Auli, ICLR 2019; Grave et al., ICML
2017) and plain.

The vocabulary is sorted by frequency and cut into bands: band 0 holds the most frequent words,
each later band rarer words, whose vectors are `factor` times narrower. Both softmaxes score targets
without holding the logits of all tokens at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 1 << 25
"""Most logits that are held at a time: 128 MiB in fp32."""


def band_edges(cutoffs: Sequence[int], vocab_size: int) -> list[int]:
    """Edges of the bands, 0 and `vocab_size` included, without cutoffs beyond the vocabulary.

    >>> band_edges([20, 60, 100], 80)
    [0, 20, 60, 80]
    """
    return [0, *(c for c in sorted(cutoffs) if 0 < c < vocab_size), vocab_size]


class AdaptiveInput(nn.Module):
    """Embeddings whose width depends on the word's frequency, projected to one width.

    Args:
        cutoffs: first id of every band but the first.
        factor: how much narrower each band is than the one before.
    """

    def __init__(self, vocab_size: int, width: int, cutoffs: Sequence[int], factor: float) -> None:
        super().__init__()
        self.edges = band_edges(cutoffs, vocab_size)
        self.width = width
        self.embeddings = nn.ModuleList()
        self.projections = nn.ModuleList()
        for i, (start, end) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
            band_width = int(width // factor**i)
            self.embeddings.append(nn.Embedding(end - start, band_width))
            self.projections.append(nn.Linear(band_width, width, bias=False))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings: normal with variance 1 / band width; projections: Xavier."""
        for embedding, projection in zip(self.embeddings, self.projections, strict=True):
            nn.init.normal_(embedding.weight, std=embedding.embedding_dim**-0.5)
            nn.init.xavier_uniform_(projection.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 `[...]` to `[..., width]`."""
        flat = tokens.reshape(-1)
        out = self.projections[0].weight.new_zeros(flat.shape[0], self.width)
        for i, (start, end) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
            where = ((flat >= start) & (flat < end)).nonzero().squeeze(1)
            band = self.projections[i](self.embeddings[i](flat[where] - start))
            out = out.to(band.dtype).index_copy(0, where, band)
        return out.view(*tokens.shape, self.width)


class OutputSoftmax(nn.Module):
    """What both softmaxes share: scoring targets a few rows at a time."""

    columns: int
    """Logits that are computed for every token."""

    def target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Natural-log probability of each target.

        Under autograd the logits of a long batch are not kept but recomputed in the backward pass.

        Args:
            hidden: `[N, width]`.
            targets: int64 `[N]`.

        Returns:
            fp32 `[N]`.
        """
        rows = max(LOGITS_AT_ONCE // self.columns, 1)
        if hidden.shape[0] <= rows:
            return self._target_log_prob(hidden, targets)
        parts = [
            checkpoint(self._target_log_prob, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return torch.cat(parts)

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the whole vocabulary, `[N, width]` to fp32 `[N, vocab_size]`."""
        raise NotImplementedError


class PlainSoftmax(OutputSoftmax):
    """One linear layer over the vocabulary.

    Args:
        tied: the input embedding `[vocab_size, width]` to share, or None for weights of its own.
    """

    def __init__(self, vocab_size: int, width: int, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.columns = vocab_size
        self.weight = tied if tied is not None else nn.Parameter(torch.empty(vocab_size, width))
        if tied is None:
            nn.init.normal_(self.weight, std=width**-0.5)
        self.bias: nn.Parameter | None = None

    def add_bias(self) -> None:
        """Gives the logits a bias to train, which starts at the one that they have or at zero."""
        start = self.weight.new_zeros(self.columns) if self.bias is None else self.bias.detach()
        self.bias = nn.Parameter(start.clone())

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias).float()

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(self._logits(hidden), targets, reduction="none")

    def log_prob(self, hidden: Tensor) -> Tensor:
        return self._logits(hidden).log_softmax(dim=-1)


class AdaptiveSoftmax(OutputSoftmax):
    """p(w) = p_head(w) in band 0, p_head(band i) p_i(w) in band i (Grave et al., 2017).

    Args:
        cutoffs: first id of every band but the first.
        factor: how much narrower each band is than the one before.
        dropout: on the input and on the narrower vectors of the tails.
        tied: the input embeddings whose weights to share (with the same bands), or None.
        tie_projections: share their projections too, transposed. The projection of band 0 is never
            shared: the head has none.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        cutoffs: Sequence[int],
        factor: float,
        dropout: float = 0.0,
        tied: AdaptiveInput | None = None,
        tie_projections: bool = False,
    ) -> None:
        super().__init__()
        self.edges = band_edges(cutoffs, vocab_size)
        self.dropout = dropout
        tails = len(self.edges) - 2
        self.columns = self.edges[1] + tails
        self.words = nn.ParameterList()
        self.down = nn.ParameterList()  # [width, band width] of each tail
        for i, (start, end) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
            band_width = int(width // factor**i)
            if tied is None:
                self.words.append(_xavier(end - start, band_width))
            else:
                self.words.append(tied.embeddings[i].weight)
            if i > 0:
                share = tied is not None and tie_projections
                down = tied.projections[i].weight if share else _xavier(width, band_width)
                self.down.append(down)
        self.classes = _xavier(tails, width)

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits of the words of band 0, then of the other bands as classes."""
        return F.linear(hidden, torch.cat([self.words[0], self.classes])).float()

    def _tail(self, i: int, hidden: Tensor) -> Tensor:
        """Logits of the words of band i > 0."""
        narrower = F.dropout(hidden @ self.down[i - 1], self.dropout, self.training)
        return F.linear(narrower, self.words[i]).float()

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        hidden = F.dropout(hidden, self.dropout, self.training)
        cutoffs = torch.tensor(self.edges[1:-1], device=targets.device)
        band = torch.bucketize(targets, cutoffs, right=True)
        column = torch.where(band == 0, targets, self.edges[1] + band - 1)
        log_prob = -F.cross_entropy(self._head(hidden), column, reduction="none")
        for i in range(1, len(self.edges) - 1):
            rows = (band == i).nonzero().squeeze(1)
            within = targets[rows] - self.edges[i]
            tail = -F.cross_entropy(self._tail(i, hidden[rows]), within, reduction="none")
            log_prob = log_prob.index_add(0, rows, tail)
        return log_prob

    def log_prob(self, hidden: Tensor) -> Tensor:
        head = self._head(hidden).log_softmax(dim=-1)
        first = self.edges[1]
        parts = [head[:, :first]]
        for i in range(1, len(self.edges) - 1):
            tail = self._tail(i, hidden).log_softmax(dim=-1)
            parts.append(tail + head[:, first + i - 1, None])
        return torch.cat(parts, dim=-1)


def _xavier(rows: int, columns: int) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(rows, columns))
    return nn.init.xavier_uniform_(weight) if rows else weight
