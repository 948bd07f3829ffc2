"""A running text is told from its own lines shuffled."""

import numpy as np
import pytest

from neighborlm.retrieval.memories.text_order import lines_are_shuffled


def text_of(topics_last: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lines of common words and some of a topic, which lasts for some lines."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(2000):
        topic = np.random.default_rng(number // topics_last).integers(1000, 1300, 40)
        length = int(rng.integers(0, 40))
        common = rng.integers(0, 150, length)
        lines.append(np.where(rng.random(length) < 0.4, rng.choice(topic, length), common))
    return together(lines)


def together(lines: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(lines), np.cumsum([0, *(len(line) for line in lines)])


@pytest.mark.parametrize("topics_last", [5, 50])
def test_shuffled_lines_are_told(topics_last):
    tokens, starts = text_of(topics_last)
    assert not lines_are_shuffled(tokens.astype(np.uint16), starts)
    lines = np.split(tokens, starts[1:-1])
    order = np.random.default_rng(1).permutation(len(lines))
    assert lines_are_shuffled(*together([lines[i] for i in order]))


def test_where_it_cannot_be_told_nothing_is_said():
    tokens, starts = text_of(1)
    assert not lines_are_shuffled(tokens[: starts[50]], starts[:51])
    assert not lines_are_shuffled(np.arange(50_000), np.arange(0, 50_001, 10))
    assert not lines_are_shuffled(np.zeros(0, np.uint16), np.zeros(1, np.int64))
    assert not lines_are_shuffled(tokens, np.array([0, len(tokens)]))
