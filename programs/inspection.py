"""One token looked at: what came before it, what the model and each memory say of it, and the
stored contexts that are nearest to its own.
"""

from dataclasses import dataclass

import numpy as np
import torch

from neighborlm.common.contracts import Scored, Want
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.programs.subject import PLAIN, Evaluated, Subject
from neighborlm.retrieval.memories import KNNMemory
from neighborlm.retrieval.memories.mixers import features_of, mixture


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
    memories = evaluated.memories
    want = PLAIN
    for memory in memories.values():
        want = want.and_also(memory.want)
    asked = score_one(subject, split, position, want)
    opinions = {name: memory.say(asked) for name, memory in memories.items()}
    log_probs = {"lm": asked.log_probs.double()}
    log_probs |= {name: opinion.log_probs.double() for name, opinion in opinions.items()}
    weights = evaluated.mixer.weights(features_of(opinions), 1).unbind(dim=1)
    log_probs["mixture"] = mixture(list(log_probs.values()), weights)
    knn = memories.get("knn")
    return InspectedToken(
        text_before(subject.data, split, position, context),
        text_of(subject.data, split, position),
        {name: log_prob.exp().item() for name, log_prob in log_probs.items()},
        stored_contexts(subject.data, knn, asked, neighbors, context) if knn else [],
    )


def score_one(subject: Subject, split: str, position: int, want: Want) -> Scored:
    """What a model says of one token of a split."""
    wanted = np.arange(len(subject.data.stream(split).tokens)) == position
    subject.give_neighbors(split)
    (batch,) = subject.data.evaluation_dataloader(split, wanted=wanted)
    scored = batch.scored & (batch.positions == position)
    return subject.model.score(batch._replace(scored=scored), want).on_cpu()


def stored_contexts(
    data: LMDataModule, memory: KNNMemory, asked: Scored, count: int, context: int
) -> list[StoredContext]:
    """The nearest neighbours of one token."""
    found, weights = memory.neighbors(asked), memory.distribution(asked)[1]
    order = torch.argsort(weights[0], descending=True, stable=True)[:count].tolist()
    return [
        StoredContext(
            row := int(found.rows[0, place]),
            text_before(data, "train", row, context),
            data.dictionary.decode([int(found.values[0, place])]),
            float(found.distances[0, place]),
            weights[0, place].item(),
        )
        for place in order
        if found.rows[0, place] >= 0
    ]


def text_of(data: LMDataModule, split: str, position: int) -> str:
    """A token of a split."""
    return data.dictionary.decode([int(data.stream(split).tokens[position])])


def text_before(data: LMDataModule, split: str, position: int, count: int) -> str:
    """The tokens before one, as many as there are up to a count."""
    tokens = data.stream(split).tokens[max(position - count, 0) : position]
    return data.dictionary.decode(tokens.tolist())
