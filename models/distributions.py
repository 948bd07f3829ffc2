"""What a model says of a batch, by its hidden vectors. The entropy and the most probable tokens of
its distributions are computed a few rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from neighborlm.common.contracts import Backbone, Batch, Scored, Want
from neighborlm.models.adaptive import LOGITS_AT_ONCE


def scored_by_hidden(model: Backbone, batch: Batch, want: Want) -> Scored:
    """What is wanted of a batch's scored tokens, by a model whose hidden vectors decide on all of
    it; see `common.contracts.LanguageModel.score`."""
    hidden, keys = model.hidden(batch.tokens, want.keys)
    hidden, targets = hidden[batch.scored], batch.targets[batch.scored]
    return Scored(
        batch.positions[batch.scored],
        targets,
        model.target_log_prob(hidden, targets) if want.log_probs else None,
        {key_type: keys[key_type][batch.scored] for key_type in want.keys},
        **entropy_and_top(model.log_prob, want, model.vocab_size, hidden),
    )


def entropy_and_top(
    log_prob: Callable[..., Tensor], want: Want, vocab_size: int, *vectors: Tensor
) -> dict[str, Tensor]:
    """Those of the fields `entropy`, `top_ids` and `top_log_probs` of `Scored` that are wanted.

    Args:
        log_prob: from m rows of each of `vectors` to natural-log probabilities of the whole
            vocabulary, fp32 `[m, vocab_size]`. It is called with so few rows that these take at
            most 128 MiB.
        want: its `top` is cut to the size of the vocabulary.
        vectors: `[n, ...]` each.
    """
    if not want.entropy and not want.top:
        return {}
    top = min(want.top, vocab_size)
    at_once = max(LOGITS_AT_ONCE // vocab_size, 1)
    entropies, best = [], []
    for rows in zip(*(vector.split(at_once) for vector in vectors), strict=True):
        log_probs = log_prob(*rows)
        if want.entropy:
            entropies.append(-(log_probs.exp() * log_probs).sum(dim=-1))
        if top:
            best.append(log_probs.topk(top, dim=-1))
    found = {"entropy": torch.cat(entropies)} if want.entropy else {}
    if top:
        found["top_ids"] = torch.cat([part.indices for part in best])
        found["top_log_probs"] = torch.cat([part.values for part in best])
    return found
