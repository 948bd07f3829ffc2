"""One token looked at: what came before it, what the model and each memory say of it, and the
stored contexts that are nearest to its own.
"""

from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from neighborlm.common.contracts import Memory, Opinion, Scored, Want
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.programs.subject import PLAIN, Evaluated, Subject
from neighborlm.retrieval.memories import KNNMemory
from neighborlm.retrieval.memories.mixers import LM, lm_opinion, weighed


@dataclass(frozen=True)
class StoredContext:
    """A neighbour of a token.

    Attributes:
        row: of the datastore, which is the token's number in the training text.
        context: the text before it.
        token: that followed.
        distance: to the token's own context, by what the memory compares.
        weight: its share of p_kNN.
    """

    row: int
    context: str
    token: str
    distance: float
    weight: float


@dataclass(frozen=True)
class InspectedToken:
    """A token of a split.

    Attributes:
        context: the text before it.
        target: the token itself.
        probabilities: of the target, under `lm`, each memory's name and `mixture`.
        neighbors: the nearest stored contexts, the nearest first; none without the memory `knn`.
    """

    context: str
    target: str
    probabilities: dict[str, float]
    neighbors: list[StoredContext]


@torch.inference_mode()
def inspect_token(
    subject: Subject,
    evaluated: Evaluated,
    split: str,
    position: int,
    neighbors: int = 5,
    context: int = 8,
) -> InspectedToken:
    """Looks at one token as an evaluation with memories has seen it.

    Args:
        subject: what was evaluated.
        evaluated: its memories and their mixer.
        split: of the corpus.
        position: the token's number in the split.
        neighbors: how many to give.
        context: tokens before the token and before each neighbour to give as text.
    """
    memories, text = evaluated.memories, subject.data.stream(split).tokens
    want = reduce(Want.and_also, (x.want for x in (*memories.values(), evaluated.mixer)), PLAIN)
    read = max((tokens_before(memory, position) for memory in memories.values()), default=0)
    scored = score_some(subject, split, position - read, position, want)
    asked = scored.some(slice(-1, None))
    opinions = {name: opinion_on_last(memory, scored, text) for name, memory in memories.items()}
    mixed, _ = weighed({LM: lm_opinion(asked), **opinions}, evaluated.mixer)
    log_probs = {LM: asked.log_probs}
    # Of several distributions the last is that of all that the memory has found.
    log_probs |= {name: opinion.log_probs[..., -1:] for name, opinion in opinions.items()}
    log_probs["mixture"] = mixed
    knn = memories.get("knn")
    return InspectedToken(
        text_before(subject.data, split, position, context),
        text_of(subject.data, split, position),
        {name: log_prob.double().exp().item() for name, log_prob in log_probs.items()},
        stored_contexts(subject.data, knn, asked, neighbors, context) if knn else [],
    )


def tokens_before(memory: Memory, position: int) -> int:
    """How many tokens of the text a memory must have read before one."""
    if not memory.in_order:
        return 0
    return position if memory.warm_up is None else min(memory.warm_up, position)


def opinion_on_last(memory: Memory, scored: Scored, text: np.ndarray) -> Opinion:
    """A memory's opinion on the last of some tokens; those before it are read where it remembers
    them."""
    memory.begin_pass(text)
    if memory.in_order and len(scored.positions) > 1:
        before = scored.some(slice(None, -1))
        memory.say(before)
        memory.observe(before.targets)
    return memory.say(scored.some(slice(-1, None)))


def score_some(subject: Subject, split: str, first: int, last: int, want: Want) -> Scored:
    """What a model says of the tokens of a split from one to another, in the order of the text."""
    positions = np.arange(len(subject.data.stream(split).tokens))
    subject.give_neighbors(split)
    wanted = (first <= positions) & (positions <= last)
    parts = []
    for batch in subject.data.evaluation_dataloader(split, wanted=wanted):
        own = batch.scored & (batch.positions >= first) & (batch.positions <= last)
        parts.append(subject.model.score(batch._replace(scored=own), want).on_cpu())
    scored = Scored.joined(parts)
    return scored.some(scored.positions.argsort())


def stored_contexts(
    data: LMDataModule, memory: KNNMemory, asked: Scored, count: int, context: int
) -> list[StoredContext]:
    """The nearest neighbours of one token."""
    said = memory.distribution(asked)
    rows, ids, shares = said.rows[0].tolist(), said.ids[0].tolist(), said.probs[0].tolist()
    sign = -1 if memory.similarity == "l2" else 1
    distances = (sign * said.scores[0]).tolist()
    order = torch.argsort(said.probs[0], descending=True, stable=True)[:count].tolist()
    return [
        StoredContext(
            rows[place],
            text_before(data, "train", rows[place], context),
            data.dictionary.decode([ids[place]]),
            distances[place],
            shares[place],
        )
        for place in order
        if rows[place] >= 0
    ]


def text_of(data: LMDataModule, split: str, position: int) -> str:
    """A token of a split."""
    return data.dictionary.decode([int(data.stream(split).tokens[position])])


def text_before(data: LMDataModule, split: str, position: int, count: int) -> str:
    """The tokens before one, as many as there are up to a count."""
    tokens = data.stream(split).tokens[max(position - count, 0) : position]
    return data.dictionary.decode(tokens.tolist())
