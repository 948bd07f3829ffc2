"""Made-up opinions of two memories whose worth depends on what is known of each token."""

import torch

from neighborlm.common.contracts import Opinion


def made_up(n: int = 4000, seed: int = 0) -> dict[str, Opinion]:
    """Of n tokens: `knn` is right where its nearest distance is small, `ngram` where its suffix is
    long; neither has an opinion of some tokens, whose features are infinite or NaN."""
    generator = torch.Generator().manual_seed(seed)

    def random() -> torch.Tensor:
        return torch.rand(n, generator=generator)

    distance, length = 10 * random(), torch.floor(6 * random())
    knn = torch.where(random() < torch.exp(-distance / 3), 0.9, 0.01) * (0.5 + random() / 2)
    ngram = torch.where(random() < length / 6, 0.8, 0.0)
    nowhere, nothing = random() < 0.05, random() < 0.05
    knn[nowhere], ngram[nothing] = 0.0, 0.0
    distance[nowhere], length[nothing] = torch.inf, torch.nan
    entropy = 5 * random()
    lm = 0.02 + 0.3 * random() * torch.exp(-entropy)
    return {
        "lm": Opinion(lm.log(), {"entropy": entropy}),
        "knn": Opinion(knn.log(), {"nearest_distance": distance, "kth_distance": distance + 1}),
        "ngram": Opinion(ngram.log(), {"suffix_length": length}),
    }


def only(opinions: dict[str, Opinion], *sources: str) -> dict[str, Opinion]:
    """Those of some sources."""
    return {source: opinions[source] for source in sources}


def part_of(opinions: dict[str, Opinion], part: slice) -> dict[str, Opinion]:
    """Those on some tokens."""
    return {
        source: Opinion(
            opinion.log_probs[part], {name: x[part] for name, x in opinion.features.items()}
        )
        for source, opinion in opinions.items()
    }
