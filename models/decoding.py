"""Choosing tokens by the distribution of the next one: greedily, by sampling, or by beam search.

What is chosen from is any distribution over the vocabulary, such as a mixture of a model with
memories: temperature, top-k and top-p act on that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from neighborlm.common.errors import InputError


@dataclass
class Decoding:
    """How tokens are chosen. Temperature, top_k and top_p act on the distribution of the model, or
    on that of its mixture with memories, in this order.

    Args:
        max_new_tokens: tokens to generate at most.
        temperature: divides the log-probabilities before a token is drawn; below 1 probable tokens
            become more probable. 0 always takes the most probable one.
        top_k: draw from this many most probable tokens; 0, the default, for all.
        top_p: draw from the fewest most probable tokens that have this probability together; 1, the
            default, for all.
        beams: search for the most probable text with this many beams in place of drawing tokens; 1,
            the default, for no search.
        length_penalty: a text that a beam has ended counts by its log-probability divided by its
            length to this power.
    """

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0

    def check(self) -> None:
        """Raises InputError where a value cannot be right."""
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("beams", 1)):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"--{name} is {value}; expected at least {least}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature is {self.temperature}; expected at least 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p is {self.top_p}; expected more than 0 and at most 1")
        drawing = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        if self.beams > 1:
            given = [name for name, default in drawing.items() if getattr(self, name) != default]
        else:
            given = ["length_penalty"] if self.length_penalty != 1 else []
        if given:
            found = getattr(self, given[0])
            raise InputError(
                f"--{given[0]} is {found}, which has no effect with --beams "
                f"{self.beams}; expected no such flag, or "
                + ("1 beam" if self.beams > 1 else "more beams")
            )


class Texts(Protocol):
    """Texts that grow, in a batch of S."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Natural-log probabilities fp32 `[S, V]` of what follows after tokens int64 `[S, T]`,
        which are added to the texts; -1 in front of the first token of a text."""
        ...

    def select(self, texts: Tensor) -> None:
        """From now on text i is a copy of text `texts[i]`, int64 `[S]`."""
        ...


class Chosen(NamedTuple):
    """Tokens that were chosen for some texts, `[..., T]` each.

    Attributes:
        tokens: int64, -1 after the end of a text.
        log_probs: fp32, natural-log probability of each before temperature, top_k and top_p; 0
            after the end of a text.
        origins: int64, the place in the batch of the text after which each was chosen.
    """

    tokens: Tensor
    log_probs: Tensor
    origins: Tensor

    def with_one(self, *more: Tensor) -> "Chosen":
        """With another token, the columns `[...]` of which are given."""
        return Chosen(*(torch.cat([x, y[..., None]], -1) for x, y in zip(self, more, strict=True)))

    def widened(self, width: int) -> "Chosen":
        """With room for so many tokens."""
        missing = (0, width - self.tokens.shape[-1])
        return Chosen(*(F.pad(x, missing, value=y) for x, y in zip(self, (-1, 0, 0), strict=True)))

    def beside(self, others: "Chosen") -> "Chosen":
        """These texts and others of each of n groups."""
        return Chosen(*(torch.cat(columns, dim=1) for columns in zip(self, others, strict=True)))

    def at(self, places: Tensor) -> "Chosen":
        """Of n groups of texts `[n, m, T]` those in some places int64 `[n, k]`."""
        groups = torch.arange(len(places), device=places.device)[:, None]
        return Chosen(*(column[groups, places] for column in self))


def draw(log_probs: Tensor, decoding: Decoding, uniform: Tensor) -> Tensor:
    """A token for each row, int64 `[S]`.

    Args:
        log_probs: fp32 `[S, V]`, natural-log probabilities.
        decoding: temperature, top_k and top_p.
        uniform: fp64 `[S]`, random numbers from 0 to 1 that decide.
    """
    if decoding.temperature == 0:
        return log_probs.argmax(dim=1)
    ordered, ids = (log_probs.double() / decoding.temperature).sort(dim=1, descending=True)
    probs = ordered.softmax(dim=1)
    if decoding.top_k:
        probs[:, decoding.top_k :] = 0
        probs = probs / probs.sum(dim=1, keepdim=True)
    before = probs.cumsum(dim=1) - probs
    probs = probs.masked_fill(before >= decoding.top_p, 0)
    sums = probs.cumsum(dim=1)
    # The first place whose sum exceeds the number: one that has a probability.
    place = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    last = (probs > 0).sum(dim=1, keepdim=True) - 1
    return ids.gather(1, place.minimum(last))[:, 0]


def sample(
    texts: Texts,
    prompts: Tensor,
    decoding: Decoding,
    uniforms: Tensor,
    end: int | None = None,
    on_step: Callable[[Tensor], None] | None = None,
) -> Chosen:
    """Draws tokens one after another, or takes the most probable one where the temperature is 0.

    Args:
        texts: as many as prompts.
        prompts: int64 `[S, T]`, padded on the left by -1.
        uniforms: fp64 `[S, max_new_tokens]`, random numbers from 0 to 1.
        end: token after which a text ends.
        on_step: called with the tokens int64 `[S]` of each step, -1 after the end of a text.
    """
    log_probs, ended = texts.extend(prompts), torch.zeros_like(prompts[:, 0], dtype=torch.bool)
    tokens, scores = [], []
    for step in range(decoding.max_new_tokens):
        chosen = draw(log_probs, decoding, uniforms[:, step])
        scores.append(log_probs.gather(1, chosen[:, None])[:, 0].masked_fill(ended, 0))
        tokens.append(chosen.masked_fill(ended, -1))
        if on_step is not None:
            on_step(tokens[-1])
        if end is not None:
            ended = ended | (chosen == end)
            if bool(ended.all()):
                break
        if step + 1 < decoding.max_new_tokens:
            log_probs = texts.extend(chosen[:, None])
    chosen = torch.stack(tokens, dim=1)
    origins = torch.arange(len(prompts), device=prompts.device)[:, None].expand_as(chosen)
    return Chosen(chosen, torch.stack(scores, dim=1), origins)


def beam_search(
    texts: Texts, prompts: Tensor, decoding: Decoding, end: int | None = None
) -> Chosen:
    """The most probable text for each of n prompts that `beams` beams find.

    Of all continuations of its beams, each prompt keeps the `beams` most probable ones that do not
    end; those that end, and rank among the first, are candidates for the answer. A prompt is done
    once it has as many candidates as beams, none of which its best beam could surpass at its
    present length.

    Args:
        texts: `beams` for each prompt, one prompt's after another's.
        prompts: int64 `[n, T]`, padded on the left by -1.
        end: token after which a text ends.
    """
    n, beams, device = len(prompts), decoding.beams, prompts.device
    batch = torch.arange(n * beams, device=device).view(n, beams)
    log_probs = texts.extend(prompts.repeat_interleave(beams, dim=0))
    scores = torch.full((n, beams), -torch.inf, device=device)
    best, scores[:, 0] = scores.clone(), 0  # all beams of a prompt are the same at first
    empty = batch[:, :, None][:, :, :0]
    paths = Chosen(empty, empty.to(scores.dtype), empty)
    found, done = paths.widened(decoding.max_new_tokens), best[:, 0].isfinite()
    for length in range(1, decoding.max_new_tokens + 1):
        of_beams = log_probs.view(n, beams, -1)
        top, places = (scores[:, :, None] + of_beams).flatten(1).topk(2 * beams, dim=1)
        parents, tokens = places // of_beams.shape[2], places % of_beams.shape[2]
        own = of_beams.flatten(1).gather(1, places)
        paths = paths.at(parents).with_one(tokens, own, batch.gather(1, parents))
        ends = tokens == (-1 if end is None else end)
        last = length == decoding.max_new_tokens
        ending = ends | last
        ending[:, beams:] = False
        ending &= ~done[:, None]
        counted = (top / length**decoding.length_penalty).masked_fill(~ending, -torch.inf)
        best, which = torch.cat([best, counted], dim=1).topk(beams, dim=1)
        found = found.beside(paths.widened(decoding.max_new_tokens)).at(which)
        scores, which = top.masked_fill(ends, -torch.inf).topk(beams, dim=1)
        paths = paths.at(which)
        done = done | (best[:, -1] >= scores[:, 0] / length**decoding.length_penalty)
        if last or bool(done.all()):
            break
        texts.select(paths.origins[:, :, -1].flatten())
        log_probs = texts.extend(paths.tokens[:, :, -1].reshape(-1, 1))
    return Chosen(*(column[:, 0] for column in found))
