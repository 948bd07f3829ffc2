"""`NextToken`: what a model and its memories together say of the next token, in several texts that
grow token by token.

It is the mixture of `mixers` for every token of the vocabulary: what an evaluation says of a text's
own tokens, this says of all that could stand in their places.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from neighborlm.common.contracts import Distribution, Memory, Mixer, Opinion, Scored, Want
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.mixers import LM, ConstantMixer, features_of

NOTHING = -1
"""In place of a token, where there is none."""


class Mixed(NamedTuple):
    """What the mixture says of the next token in n places.

    Attributes:
        log_probs: fp32 `[n, V]`, natural-log probability of every token.
        weights: fp64 `[m, sources]`, of the language model and of each memory, in those m of the
            places where a text has begun.
        said: by memory, what it said; empty where the language model has all the weight.
    """

    log_probs: Tensor
    weights: Tensor
    said: Mapping[str, Distribution]

    def nearest(self, count: int) -> tuple[Tensor, Tensor]:
        """The rows of the datastore with the largest shares of the mixture, int64 `[n, count]`, -1
        where there are fewer, and these shares, fp64 `[n, count]`."""
        n = len(self.weights)
        rows = [torch.full((n, count), NOTHING)]
        shares = [torch.zeros(n, count, dtype=torch.float64)]
        for weight, found in zip(self.weights.unbind(dim=1)[1:], self.said.values(), strict=False):
            if found.rows is not None and len(found.rows) == n:
                rows.append(found.rows)
                shares.append(weight[:, None] * found.probs)
        share, places = torch.cat(shares, dim=1).topk(count, dim=1)
        return torch.cat(rows, dim=1).gather(1, places), share


class NextToken:
    """Mixes what a model and memories say of the next tokens of S texts.

    Args:
        memories: by name.
        mixer: weighs them.

    Attributes:
        want: what the model must tell.
    """

    def __init__(self, memories: Mapping[str, Memory], mixer: Mixer) -> None:
        self.memories = memories
        self.mixer = mixer
        keys = reduce(Want.and_also, (memory.want for memory in memories.values()), Want())
        self.want = Want(keys=keys.keys)
        constant = isinstance(mixer, ConstantMixer) and mixer.shares is not None
        self.is_lm_alone = not memories or (constant and float(mixer.shares[0]) == 1)
        """Whether no memory has any weight; then none is asked."""

    def begin(self, texts: int, length: int) -> None:
        """Starts new texts, none of which will have more tokens than `length`."""
        self.text = np.full((texts, length + 1), NOTHING)
        self.lengths = torch.zeros(texts, dtype=torch.int64)
        self.asked: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        """By memory, text and place of the tokens that it was asked about last."""
        for memory in self.memories.values():
            memory.begin_pass(self.text)

    def extend(
        self,
        tokens: Tensor,
        keys: Mapping[str, Tensor],
        log_probs: Tensor,
        asked: Sequence[int] | slice = slice(-1, None),
    ) -> Mixed:
        """Adds T tokens to each text, and mixes what is said of those that follow some of them.

        Args:
            tokens: int64 `[S, T]`, -1 where there is none, as in front of the first one of a text.
            keys: `[S, T, d]` by key type, the vector of the context that ends with each token.
            log_probs: fp32 `[S * n, V]`, by the model, of what follows n of the tokens.
            asked: which n of the T tokens these are; by default the last one.

        Raises:
            InputError: the mixer has another number of weights than there are sources.
        """
        if self.is_lm_alone:
            weights = torch.zeros(len(log_probs), 1 + len(self.memories), dtype=torch.float64)
            weights[:, 0] = 1
            return Mixed(log_probs, weights, {})
        there = (tokens >= 0).cpu()
        places = self.lengths[:, None] + there.cumsum(dim=1)  # of the tokens that follow
        self.lengths = places[:, -1].clone()
        rows = torch.arange(len(tokens))[:, None].expand_as(places)
        self.text[rows[there], places[there] - 1] = tokens.cpu()[there]
        self._observe()
        wanted = torch.zeros_like(there)
        wanted[:, asked] = there[:, asked]
        said = {}
        for name, memory in self.memories.items():
            # One that reads a text in its order is asked about all of it.
            which = there if memory.in_order else wanted
            self.asked[name] = rows[which].numpy(), places[which].numpy()
            scored = self._scored(memory, which, keys, *self.asked[name])
            found = Distribution(*memory.distribution(scored))
            said[name] = found.some(wanted[which]) if memory.in_order else found
        return self._mix(log_probs, wanted[:, asked].reshape(-1).to(log_probs.device), said)

    def _observe(self) -> None:
        """Tells the memories the tokens that they were asked about, which are known now."""
        for name, where in self.asked.items():
            self.memories[name].observe(torch.from_numpy(self.text[where]))

    def _scored(
        self,
        memory: Memory,
        which: Tensor,
        keys: Mapping[str, Tensor],
        rows: np.ndarray,
        places: np.ndarray,
    ) -> Scored:
        """What a memory must know of some tokens; those that are not known yet are 0."""
        targets = torch.from_numpy(self.text[rows, places]).clamp(min=0)
        positions = torch.from_numpy(rows * self.text.shape[1] + places)
        own = {name: keys[name][which.to(keys[name].device)] for name in memory.want.keys}
        return Scored(positions, targets, keys=own).on_cpu()

    def _mix(self, log_probs: Tensor, which: Tensor, said: Mapping[str, Distribution]) -> Mixed:
        """Mixes in the places where memories were asked; elsewhere the model's own stays."""
        everywhere = bool(which.all())
        of_model = log_probs if everywhere else log_probs[which]
        opinions = {LM: Opinion(of_model[:, 0], self._model_features(of_model)), **said}
        weights = self.mixer.weights(features_of(opinions), len(of_model))
        if weights.shape[1] != len(opinions):
            raise InputError(
                f"the mixer has {weights.shape[1]} weights, but there are {len(opinions)} sources "
                f"({', '.join(opinions)}); expected one for each"
            )
        weights = of_those_that_speak(weights, list(said.values()))
        ids = torch.cat([found.ids for found in said.values()], dim=1)
        voted = torch.zeros(of_model.shape, dtype=torch.float64)
        for weight, found in zip(weights.unbind(dim=1)[1:], said.values(), strict=True):
            voted.scatter_add_(1, found.ids, weight[:, None] * found.probs)
        # Few tokens of a vocabulary have votes; of all others the model alone speaks.
        of_memories, ids = voted.gather(1, ids).to(log_probs).log_(), ids.to(log_probs.device)
        mixed = of_model + weights[:, :1].log().to(log_probs)
        mixed.scatter_(1, ids, torch.logaddexp(mixed.gather(1, ids), of_memories))
        if everywhere:
            return Mixed(mixed, weights, said)
        whole = log_probs.clone()
        whole[which] = mixed
        return Mixed(whole, weights, said)

    def _model_features(self, log_probs: Tensor) -> dict[str, Tensor]:
        """The features of the model itself that the mixer reads, as `mixers.lm_opinion` has
        them."""
        features = {}
        if self.mixer.want.entropy:
            features["entropy"] = -(log_probs.exp() * log_probs).sum(dim=-1).cpu()
        if self.mixer.want.top:
            features["top_prob"] = log_probs.amax(dim=-1).exp().cpu()
        return features

    def follow(self, texts: Tensor) -> None:
        """From now on text i is a copy of text `texts[i]`, int64 `[S]`; called after `extend`."""
        if self.is_lm_alone:
            return
        texts = texts.cpu()
        self.text[:] = self.text[texts]
        self.lengths = self.lengths[texts]
        for name, memory in self.memories.items():
            self.asked[name] = np.arange(len(texts)), self.lengths.numpy()
            memory.follow(texts)


def of_those_that_speak(weights: Tensor, said: Sequence[Distribution]) -> Tensor:
    """Weights fp64 `[n, sources]` without those of memories that have nothing to say in a place,
    such as the recent tokens of a text that begins: the others share them, so that the mixture
    sums to one. Where no source is left, it is the language model."""
    speaks = torch.stack([found.probs.sum(dim=1) > 0 for found in said], dim=1)
    if speaks.all():
        return weights
    weights = weights * torch.cat([torch.ones_like(speaks[:, :1]), speaks], dim=1)
    weights[:, 0].masked_fill_(weights.sum(dim=1) == 0, 1.0)
    return weights / weights.sum(dim=1, keepdim=True)
