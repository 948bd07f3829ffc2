"""Which rank gets which batches of a split.

Batches are composed for the whole split and then shared out, so that a batch holds the same rows
however many ranks there are, and all ranks take the same number of steps.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from neighborlm.common.all_ranks import rank_and_ranks
from neighborlm.datamodules.blocks import Rows, make_batches

NO_ROWS = np.empty(0, dtype=np.int64)
"""The batch of a rank that has run out."""


class DealtBatches(Sampler[np.ndarray]):
    """Batches of row numbers, dealt round-robin to the ranks.

    In evaluation the order is fixed, and ranks that run out get empty batches, so that all take the
    same number of steps and nothing is repeated. In training, rows and batches are shuffled again
    each epoch, and the first batches are repeated where the ranks do not divide them evenly.

    Args:
        lengths: int64 `[rows]`, tokens of each row.
        max_tokens: most tokens in a batch, padding included.
        shuffle_seed: seed of the shuffling; None for evaluation.
        in_text_order: whether evaluation takes rows in the order of the text, not by length.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        max_tokens: int,
        shuffle_seed: int | None = None,
        in_text_order: bool = False,
    ) -> None:
        self.lengths = lengths
        self.max_tokens = max_tokens
        self.shuffle_seed = shuffle_seed
        self.in_text_order = in_text_order
        self.dealt = True  # if False, each rank gets all batches
        self.epoch = 0
        self.first = 0  # batches of this rank to skip in an epoch that is resumed
        self.batches = self._compose()

    def _compose(self) -> list[np.ndarray]:
        order = np.arange(len(self.lengths))
        if self.shuffle_seed is None:
            return make_batches(self.lengths, order, self.max_tokens, not self.in_text_order)
        generator = np.random.default_rng((self.shuffle_seed, self.epoch))
        batches = make_batches(self.lengths, generator.permutation(order), self.max_tokens)
        return [batches[i] for i in generator.permutation(len(batches))]

    def start_at(self, epoch: int, first: int) -> None:
        """Lets the next iteration begin at batch `first` of this rank's in `epoch`."""
        self.first = first
        if epoch != self.epoch:
            self.epoch = epoch
            self.batches = self._compose()

    def _rank_and_ranks(self) -> tuple[int, int]:
        return rank_and_ranks() if self.dealt else (0, 1)

    def __len__(self) -> int:
        _, ranks = self._rank_and_ranks()
        return -(-len(self.batches) // ranks)

    def __iter__(self) -> Iterator[np.ndarray]:
        rank, ranks = self._rank_and_ranks()
        first, self.first = self.first, 0
        for step in range(first, len(self)):
            number = step * ranks + rank
            if number < len(self.batches):
                yield self.batches[number]
            elif self.shuffle_seed is None:
                yield NO_ROWS
            else:
                yield self.batches[number % len(self.batches)]


class PartOfText(Sampler[np.ndarray]):
    """Batches of row numbers in the order of the text, of which each rank gets a contiguous part,
    behind those batches before it that hold its warm-up.

    Args:
        rows: of the split.
        max_tokens: most tokens in a batch, padding included.
        warm_up: how many tokens before its part a rank scores at least, or all that there are.
    """

    def __init__(self, rows: Rows, max_tokens: int, warm_up: int) -> None:
        self.rows = rows
        self.warm_up = warm_up
        order = np.arange(len(rows))
        self.batches = make_batches(rows.lengths, order, max_tokens, by_length=False)
        scored = np.cumsum(rows.ends - rows.starts)
        self.tokens = np.append(0, scored[[batch[-1] for batch in self.batches]])
        """Scored before each batch, and in all, int64 `[batches + 1]`."""

    def part(self, rank: int, ranks: int) -> tuple[int, int, int]:
        """Numbers of the first batch of a rank's warm-up, of the first of its part, and of the
        first after its part. The parts have as many tokens as batches allow."""
        shares = self.tokens[-1] * np.arange(1, ranks) / ranks
        edges = [0, *np.searchsorted(self.tokens, shares).tolist(), len(self.batches)]
        first, end = edges[rank], edges[rank + 1]
        if first == end:
            return first, first, end
        left_out = self.tokens[first] - self.warm_up
        begin = int(np.searchsorted(self.tokens, left_out, side="right")) - 1
        return max(begin, 0), first, end

    def first_position(self, rank: int, ranks: int) -> int:
        """Offset in the split of the first token of a rank's part, 0 where that has none; tokens
        before it are those of its warm-up."""
        _, first, end = self.part(rank, ranks)
        if first == end:
            return 0
        offset = self.rows.starts[self.batches[first][0]]
        return int(offset if self.rows.kept is None else self.rows.kept[offset])

    def __len__(self) -> int:
        _, ranks = rank_and_ranks()
        parts = [self.part(rank, ranks) for rank in range(ranks)]
        return max(end - begin for begin, _, end in parts)

    def __iter__(self) -> Iterator[np.ndarray]:
        begin, _, end = self.part(*rank_and_ranks())
        yield from self.batches[begin:end]
        for _ in range(len(self) - (end - begin)):
            yield NO_ROWS
