"""`RecentMemory`: the recent tokens of the running text vote for the next one (the continuous
cache; Grave et al., ICLR 2017).

Let h_i be the key of the context of position i, w_i the token that followed it, and T the
temperature. Over the last `size` positions i before t of the same text,

    p(w) is proportional to the sum over i with w_i = w of exp(score(h_t, h_i) / T).

The score is an inner product, as in the paper (theta = 1 / T), a cosine, or minus a squared
distance: eq. 2 of kNN-LM over a datastore that moves with the text.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.all_ranks import from_all_ranks
from neighborlm.common.contracts import (
    Distribution,
    Memory,
    Metric,
    Opinion,
    Resources,
    Scored,
    Want,
)
from neighborlm.common.errors import InputError
from neighborlm.retrieval.engine import LIGHTEST, SMALL
from neighborlm.retrieval.memories.recent_tuning import RecentTuning, parts_of, tune_recent
from neighborlm.retrieval.memories.window import Block, Window


@dataclass
class RecentSettings:
    """The memory of the running text.

    Args:
        size: number of recent tokens that vote. `auto` chooses one from 250 to 4000 on the
            validation split; give a number to save that pass or to bound the time of a token.
        temperature: divides the scores of the recent tokens. `auto` chooses it on the validation
            split.
        key_type: which vectors of the recent tokens are compared; see `--knn.key_type`.
        similarity: how keys are compared: `l2`, squared Euclidean distance; `ip`, inner product, as
            in the paper; or `cosine`.
        document_end: id of the token that ends a document; tokens before it have no vote after it.
            By default the whole text is one document.
    """

    size: int | Literal["auto"] = "auto"
    temperature: float | Literal["auto"] = "auto"
    key_type: str = "last_ffn_input"
    similarity: Metric = "l2"
    document_end: int | None = None

    def check(self) -> None:
        """Raises InputError where a value alone cannot be right."""
        if self.size != "auto" and self.size < 1:
            raise InputError(f"--recent.size is {self.size}; expected auto or at least 1")
        if self.temperature != "auto" and not 0 < self.temperature < math.inf:
            raise InputError(
                f"--recent.temperature is {self.temperature}; expected auto or a finite number, "
                "more than 0"
            )


class RecentMemory(Memory):
    """Remembers the last tokens that were asked about and then observed; it knows no others.

    Args:
        size: number of positions that vote; None to have `tune` find it.
        temperature: divides the scores; None to have `tune` find it.
        key_type: type of the keys.
        similarity: how keys are compared.
        document_end: token that ends a document; positions before it have no vote after it.
        device: where keys are compared; opinions lie on the CPU.

    Attributes:
        tuning: what `tune` found; None before.
    """

    in_order = True

    def __init__(
        self,
        size: int | None,
        temperature: float | None,
        key_type: str = "last_ffn_input",
        similarity: Metric = "l2",
        document_end: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.size = size
        self.temperature = temperature
        self.key_type = key_type
        self.similarity: Metric = similarity
        self.document_end = document_end
        self.device = device
        self.want = Want(keys=(key_type,))
        self.tuning: RecentTuning | None = None
        self.heard: list[Scored] = []
        """What it has collected for `tune`."""
        self._forget()

    @classmethod
    def of(cls, resources: Resources) -> "RecentMemory":
        """Makes the memory that the section `recent` of the settings describes."""
        settings = resources.settings.recent
        return cls(
            None if settings.size == "auto" else settings.size,
            None if settings.temperature == "auto" else settings.temperature,
            settings.key_type,
            settings.similarity,
            settings.document_end,
            resources.device,
        )

    @property
    def needs_tuning(self) -> bool:
        """Whether size or temperature is still unknown, so that it only collects the text."""
        return self.size is None or self.temperature is None

    @property
    def warm_up(self) -> int:
        """See `Memory`; 0 while the size is not known."""
        return self.size or 0

    def begin_pass(self, text: np.ndarray) -> None:
        """Forgets what was observed. It does not read the text itself. For each of several texts
        there is a copy of the memory."""
        self._forget()
        if text.ndim == 2:
            self.texts, self.length = [copy.copy(self) for _ in text], text.shape[1]

    def _forget(self) -> None:
        self.texts: list[RecentMemory] = []
        """Where there are several texts, the memory of each."""
        self.length = 0
        """Positions of each of them."""
        self.window: Window | None = None
        self.asked: tuple[Tensor, Tensor, Tensor] | None = None
        """Keys, positions and targets of the tokens that were asked about last."""
        self.last_position = -1

    def say(self, asked: Scored) -> Opinion:
        """log p of the targets by the votes of the recent positions. Features are
        `nearest_distance`, the squared distance of the nearest position, or its score for `ip` and
        `cosine`; `favourite`, the probability of the most probable token; and `positions`, the
        number of positions that vote.

        While it needs tuning, it collects the tokens and gives every target probability 0.

        Raises:
            InputError: the tokens are not in the order of the text.
        """
        if self.texts:
            said = [text.say(part) for text, part in self._by_text(asked)]
            return Opinion.joined(said)
        self._check_order(asked.positions)
        if self.needs_tuning:
            self.asked = asked.keys[self.key_type], asked.positions, asked.targets
            self.heard.append(asked._replace(keys={self.key_type: self.asked[0]}))
            return Opinion(torch.full((len(asked.positions),), -torch.inf))
        keys = self._begin(asked)
        votes = [block_votes for _, block_votes in self._votes(keys, asked.targets)]
        votes = WindowVotes.joined(votes)
        return Opinion(votes.log_probs.cpu(), self._features(keys, asked.targets, votes))

    def distribution(self, asked: Scored) -> Distribution:
        """See `Memory.distribution`: the tokens that followed the recent positions, and their
        weights; features as in `say`. They do not depend on the last target.

        Raises:
            InputError: it is not tuned, or the tokens are not in the order of the text.
        """
        if self.texts:
            said = [text.distribution(part) for text, part in self._by_text(asked)]
            ids, probs = (torch.cat(column) for column in zip(*(x[:2] for x in said), strict=True))
            return Distribution(ids, probs, features_of_all(said))
        self._check_order(asked.positions)
        if self.needs_tuning:
            raise InputError(
                "--memories recent: has no size and temperature yet; expected them given or tuned"
            )
        keys, ids, weights, votes = self._begin(asked), [], [], []
        for block, block_votes in self._votes(keys, asked.targets):
            ids.append(block.vocabulary[block.columns])
            weights.append((block.scores / self.temperature).softmax(dim=1).nan_to_num(0.0))
            votes.append(block_votes)
        features = self._features(keys, asked.targets, WindowVotes.joined(votes))
        return Distribution(torch.cat(ids).cpu(), torch.cat(weights).cpu(), features)

    def _votes(self, keys: Tensor, targets: Tensor) -> Iterator[tuple[Block, "WindowVotes"]]:
        """What the recent positions say of tokens, block by block."""
        of_device = targets.to(keys.device)
        for block in self.window.look(keys, targets):
            yield block, votes_of(block, of_device[block.tokens], self.temperature)

    def _features(self, keys: Tensor, targets: Tensor, votes: "WindowVotes") -> dict[str, Tensor]:
        nearest = votes.best
        if self.similarity == "l2":
            nearest = (keys.square().sum(dim=1) - nearest).clamp(min=0.0)
        return {
            "nearest_distance": nearest.cpu(),
            "favourite": votes.favourite.cpu(),
            "positions": self.window.seen(targets).float(),
        }

    def _by_text(self, asked: Scored) -> Iterator[tuple["RecentMemory", Scored]]:
        """The memory of each text that is asked about, and its tokens, which follow one another, at
        positions in that text."""
        of_text = torch.div(asked.positions, self.length, rounding_mode="floor")
        numbers, counts = of_text.unique_consecutive(return_counts=True)
        ends = counts.cumsum(dim=0)
        asked = asked._replace(positions=asked.positions - of_text * self.length)
        for number, first, end in zip(numbers, ends - counts, ends, strict=True):
            yield self.texts[number], asked.some(slice(first, end))

    def _begin(self, asked: Scored) -> Tensor:
        """The keys as `Window` compares them; opens the window at the first token of a pass."""
        if self.window is None:
            index = int(asked.positions[0])
            given = (self.size, self.similarity, self.document_end, self.device)
            self.window = Window(*given, index=index)
        keys = self.window.prepared(asked.keys[self.key_type])
        self.asked = keys, asked.positions, asked.targets
        return keys

    def _check_order(self, positions: Tensor) -> None:
        before = torch.cat([positions.new_tensor([self.last_position]), positions[:-1]])
        wrong = torch.nonzero(positions <= before)
        if len(wrong):
            at = int(wrong[0])
            raise InputError(
                f"--memories recent: token {int(positions[at])} comes after token "
                f"{int(before[at])}; expected the tokens of a text in their order"
            )

    def observe(self, tokens: Tensor) -> None:
        """Learns the tokens that were asked about last.

        Raises:
            ValueError: they are more or fewer.
        """
        if self.texts:
            waiting = [text for text in self.texts if text.asked is not None]
            parts = tokens.split([len(text.asked[1]) for text in waiting])
            for text, part in zip(waiting, parts, strict=True):
                text.observe(part)
            return
        asked = 0 if self.asked is None else len(self.asked[1])
        if len(tokens) != asked:
            raise ValueError(f"{len(tokens):,} tokens are observed, but {asked} were asked about")
        if asked:
            (keys, positions, _), self.asked = self.asked, None
            self.last_position = int(positions[-1])
            if not self.needs_tuning:
                self.window.append(keys, tokens)

    def follow(self, texts: Tensor) -> None:
        """See `Memory.follow`."""
        self.texts = [copy.copy(self.texts[text]) for text in texts.tolist()]
        for text in self.texts:
            text.window = copy.copy(text.window)
            keys, positions, targets = text.asked
            text.window.append(keys[:-1], targets[:-1])
            text.asked = keys[-1:], positions[-1:], targets[-1:]

    def tune(self) -> Opinion:
        """Finds the size and the temperature, where they are not given, that give the collected
        text the highest likelihood in a mixture with the language model by one weight. Every rank
        finds them by the whole text, whichever part of it each has collected.

        Returns:
            its opinion on all tokens of the text, which it then forgets.
        """
        heard = Scored.joined([part for of_rank in from_all_ranks(self.heard) for part in of_rank])
        order = np.unique(heard.positions.numpy(), return_index=True)[1]  # some in two warm-ups
        heard, self.heard = heard.some(torch.from_numpy(order)), []
        self._forget()

        def new_window(size: int) -> Window:
            given = (size, self.similarity, self.document_end, self.device)
            return Window(*given, index=int(heard.positions[0]))

        self.tuning = tune_recent(
            heard,
            self.key_type,
            new_window,
            None if self.size is None else [self.size],
            None if self.temperature is None else [self.temperature],
        )
        self.size, self.temperature = self.tuning.size, self.tuning.temperature
        opinions = []
        for part in parts_of(heard):
            opinions.append(self.say(part))
            self.observe(part.targets)
        self._forget()
        return Opinion.joined(opinions)

    def state(self) -> dict[str, np.ndarray]:
        """See `Memory.state`."""
        return {"size": np.array(self.size), "temperature": np.array(self.temperature)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See `Memory.restore`."""
        self.size, self.temperature = int(state["size"]), float(state["temperature"])


def features_of_all(said: Sequence[Distribution]) -> dict[str, Tensor]:
    """The features of all tokens, from what is said of some after others."""
    return {name: torch.cat([part.features[name] for part in said]) for name in said[0].features}


class WindowVotes(NamedTuple):
    """The votes of the positions in a window, fp32 `[n]` each.

    Attributes:
        log_probs: log p of the targets, -inf where no position carries it.
        best: score of the nearest position, -inf where there is none.
        favourite: probability of the most probable token; NaN where there is no position.
    """

    log_probs: Tensor
    best: Tensor
    favourite: Tensor

    @staticmethod
    def joined(parts: list["WindowVotes"]) -> "WindowVotes":
        """The votes of one or more blocks as one."""
        return WindowVotes(*(torch.cat(column) for column in zip(*parts, strict=True)))


def votes_of(block: Block, targets: Tensor, temperature: float) -> WindowVotes:
    """The votes of a block for targets int64 `[n]`."""
    best = block.scores.amax(dim=1)
    offset = best.nan_to_num(neginf=0.0)[:, None]
    weights = block.scores.sub(offset).div_(temperature).clamp_(min=LIGHTEST).exp_()
    if not block.complete:
        weights.masked_fill_(block.scores.isneginf(), 0.0)
    total = weights.sum(dim=1)
    by_token = weights.new_zeros(len(weights), len(block.vocabulary))
    by_token.scatter_add_(1, block.columns, weights)
    column = block.column_of(targets)
    of_target = by_token.gather(1, column.clamp(min=0)[:, None])[:, 0]
    of_target = of_target.masked_fill_(column < 0, 0.0).log_()
    small = torch.nonzero((of_target < SMALL) & ~of_target.isneginf())[:, 0]
    if len(small):
        others = block.columns[small] != column[small, None]
        below = block.scores[small].sub(offset[small]).div_(temperature)
        of_target[small] = below.masked_fill_(others, -torch.inf).logsumexp(dim=1)
    log_probs = torch.where(total > 0, of_target - total.log(), -torch.inf)
    return WindowVotes(log_probs, best, by_token.amax(dim=1) / total)
