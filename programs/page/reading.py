"""Has the model and memories read a text of its own, such as a generated one, for a page."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from neighborlm.common.contracts import Scored
from neighborlm.programs.generation import reader_of, ready
from neighborlm.programs.kept_mixture import Mixture
from neighborlm.programs.page.looking import joined, part_of
from neighborlm.programs.page.tokens import MODEL_TOP, PageTokens
from neighborlm.programs.subject import Subject
from neighborlm.retrieval.memories.next_token import NextToken


@torch.inference_mode()
def page_of_text(
    subject: Subject, mixture: Mixture, ids: Sequence[int], neighbors: int
) -> PageTokens:
    """What a page shows of the tokens of a text, each after those before it.

    Args:
        subject: the model and its corpus.
        mixture: the memories, and what weighs them.
        ids: of the text; the first is only read.
        neighbors: of a token, at most.
    """
    mixed = NextToken(*mixture)
    reader, parts = reader_of(subject, mixed.want), []
    with ready(subject, mixture):
        mixed.begin(1, len(ids))
        for place, (token, target) in enumerate(pairwise(ids), start=1):
            row = torch.tensor([[token]])
            read = reader.read(row.to(subject.run.device))
            found = mixed.extend(row, read.keys, read.log_probs)
            top = read.log_probs.topk(min(MODEL_TOP, read.log_probs.shape[1]))
            asked = Scored(
                torch.tensor([place]),
                torch.tensor([target]),
                read.log_probs[:, target],
                {name: key[0] for name, key in read.keys.items()},
                torch.special.entr(read.log_probs.exp()).sum(dim=1),
                top.indices,
                top.values,
            ).on_cpu()
            weights = dict(zip(("lm", *mixture.memories), found.weights.T, strict=True))
            said = (asked, found.said, neighbors, weights)
            parts.append(part_of(mixture.memories, mixture.mixer, *said))
    page = joined(parts)
    page = replace(page, positions=np.arange(len(page.targets)))
    return page.in_classes(subject.data, None)
