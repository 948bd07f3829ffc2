"""The n-gram memory against counting in plain Python."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from small import without_digests

from neighborlm.common.contracts import Scored
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories import suffix_array as building
from neighborlm.retrieval.memories.ngram import NGramMemory
from neighborlm.retrieval.memories.suffix_array import SuffixArray, sort_suffixes

MADE_FROM = {"corpus": "one", "dictionary": "two"}


def memory_of(tokens, vocab_size: int, path: Path, text=()) -> NGramMemory:
    """A memory of some tokens, in a pass over a text."""
    dtype = np.min_scalar_type(vocab_size - 1)
    array = SuffixArray.ensure(path, np.array(tokens, dtype), vocab_size, MADE_FROM)
    memory = NGramMemory(array)
    memory.begin_pass(np.array(text, dtype))
    return memory


def asking(text, positions=None) -> Scored:
    """Asks for the tokens of a text, by default for all."""
    positions = np.arange(len(text)) if positions is None else np.asarray(positions)
    targets = np.asarray(text, dtype=np.int64)[positions]
    return Scored(torch.from_numpy(positions), torch.from_numpy(targets))


def followers(tokens: list, phrase: list) -> Counter:
    """What follows a phrase, and how often."""
    n = len(phrase)
    return Counter(
        tokens[i + n] for i in range(len(tokens) - n) if list(tokens[i : i + n]) == list(phrase)
    )


def longest_suffix(tokens: list, context: list) -> list:
    """The longest suffix of a context that is followed by a token somewhere."""
    suffixes = (context[start:] for start in range(len(context) + 1))
    return next(suffix for suffix in suffixes if followers(tokens, suffix))


def related_texts(vocab_size: int, seed: int, n: int = 120) -> tuple[list, list]:
    """Two texts, the second of words of the first, of passages of it up to its very end, and of
    words that it does not have."""
    rng = np.random.default_rng(seed)
    words = rng.choice(vocab_size, 4, replace=False)
    tokens = rng.choice(words, n)
    text = np.concatenate(
        [
            tokens[30:60],
            rng.choice(words, 30),
            tokens[-20:],
            tokens[:5],
            rng.choice(vocab_size, 10),
            tokens[-1:],
        ]
    )
    return tokens.tolist(), text.tolist()


CASES = [(5, 0), (5, 1), (256, 2), (257, 3), (300_000, 4)]


@pytest.mark.parametrize(("vocab_size", "seed"), CASES)
def test_equals_counting(vocab_size, seed, tmp_path):
    tokens, text = related_texts(vocab_size, seed)
    memory = memory_of(tokens, vocab_size, tmp_path, text)
    asked = asking(text)
    opinion = memory.say(asked)
    ids, probs = memory.distribution(asked)[:2]
    for t, target in enumerate(text):
        suffix = longest_suffix(tokens, text[:t])
        counts = followers(tokens, suffix)
        total = sum(counts.values())
        features = {name: column[t].item() for name, column in opinion.features.items()}
        assert features["suffix_length"] == len(suffix)
        assert features["suffix_count"] == total
        assert features["continuations"] == len(counts)
        assert features["favourite"] == pytest.approx(max(counts.values()) / total, rel=1e-12)
        p = opinion.log_probs[t].exp().item()
        assert p == pytest.approx(counts[target] / total, rel=1e-12)
        given = probs[t] > 0
        found = dict(zip(ids[t][given].tolist(), probs[t][given].tolist(), strict=True))
        assert found == pytest.approx({w: count / total for w, count in counts.items()}, rel=1e-6)
        assert probs[t].sum().item() == pytest.approx(1, abs=1e-6)
    lengths = opinion.features["suffix_length"]
    assert lengths[29] == 29  # a passage as it stands there
    assert (lengths == 0).sum() > 1


@pytest.mark.parametrize(("vocab_size", "seed"), CASES)
def test_last_tokens_and_occurrences(vocab_size, seed, tmp_path):
    tokens, text = related_texts(vocab_size, seed)
    memory = memory_of(tokens, vocab_size, tmp_path, text)
    asked = asking(text)
    counts, distinct = memory.frequencies(asked, most=4)
    rows = memory.occurrences(asked, most=7)
    for t in range(len(text)):
        for n in range(1, 5):
            after = followers(tokens, text[t - n : t]) if n <= t else Counter()
            assert counts[t, n - 1] == sum(after.values())
            assert distinct[t, n - 1] == len(after)
        suffix = longest_suffix(tokens, text[:t])
        given = rows[t][rows[t] >= 0].tolist()
        assert len(given) == len(set(given)) == min(7, sum(followers(tokens, suffix).values()))
        assert all(tokens[row - len(suffix) : row] == suffix for row in given)


def test_nothing_shows_what_is_to_come(tmp_path):
    tokens, text = related_texts(50, seed=5)
    memory = memory_of(tokens, 50, tmp_path, text)
    before = memory.say(asking(text))
    for t in (0, 1, 40, 75, len(text) - 1):
        changed = text[:t] + np.random.default_rng(t).integers(0, 50, len(text) - t).tolist()
        memory.begin_pass(np.array(changed, np.uint8))
        after = memory.say(asking(changed))
        assert torch.equal(before.log_probs[:t], after.log_probs[:t])
        for name, column in before.features.items():
            assert torch.equal(column[: t + 1], after.features[name][: t + 1])


def test_figures_do_not_depend_on_what_is_asked_together(tmp_path):
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, 12, 20_000)
    text = np.concatenate([rng.integers(0, 12, 3000), tokens[5000:7000], rng.integers(0, 12, 2000)])
    memory = memory_of(tokens, 12, tmp_path, text)
    together = memory.say(asking(text))
    for threads, size, in_order in ((1, 1000, True), (2, 7000, False), (3, 333, False)):
        faiss.omp_set_num_threads(threads)
        positions = np.arange(len(text)) if in_order else rng.permutation(len(text))
        positions = np.append(positions, positions[:9])  # some are asked for twice
        for first in range(0, len(positions), size):
            part = positions[first : first + size]
            opinion = memory.say(asking(text, part))
            assert torch.equal(opinion.log_probs, together.log_probs[part])
            for name, column in together.features.items():
                assert torch.equal(opinion.features[name], column[part])


@pytest.mark.parametrize("vocab_size", [2, 255, 256, 257, 65536, 65537, 300_000])
def test_suffixes_are_in_order(vocab_size):
    rng = np.random.default_rng(vocab_size)
    few = np.array([0, vocab_size // 2, vocab_size - 1])
    tokens = rng.choice(few, 300).astype(np.min_scalar_type(vocab_size - 1))
    suffixes = np.zeros(300, np.uint32)
    sort_suffixes(tokens, vocab_size, suffixes)
    assert suffixes.tolist() == sorted(range(300), key=lambda i: tokens[i:].tolist())


def test_offsets_of_eight_bytes(tmp_path):
    tokens, text = related_texts(30, seed=7)
    memory = memory_of(tokens, 30, tmp_path, text)
    wide = replace(memory.suffix_array, suffixes=memory.suffix_array.suffixes.astype(np.uint64))
    other = NGramMemory(wide)
    other.begin_pass(memory.text)
    ours, theirs = (m.say(asking(text)) for m in (memory, other))
    assert torch.equal(ours.log_probs, theirs.log_probs)
    assert all(torch.equal(ours.features[name], theirs.features[name]) for name in ours.features)


def test_a_text_of_one_token(tmp_path):
    memory = memory_of([3], 5, tmp_path, [3, 3, 1])
    opinion = memory.say(asking([3, 3, 1]))
    assert opinion.log_probs.exp().tolist() == [1, 1, 0]
    assert opinion.features["suffix_length"].tolist() == [0, 0, 0]
    ids, probs = memory.distribution(asking([3, 3, 1]))[:2]
    assert ids.tolist() == [[3]] * 3
    assert probs.tolist() == [[1]] * 3


def test_one_token_repeated(tmp_path):
    """Of n tokens before it all are found, or all but one of the training text's, behind which no
    more stand."""
    memory = memory_of([2] * 1000, 3, tmp_path, [2] * 1500)
    features = memory.say(asking([2] * 1500)).features
    lengths = np.minimum(np.arange(1500), 999)
    assert features["suffix_length"].tolist() == lengths.tolist()
    assert features["suffix_count"].tolist() == (1000 - lengths).tolist()


def test_nothing_asked(tmp_path):
    memory = memory_of([1, 2, 1], 3, tmp_path)
    asked = asking([])._replace(targets=torch.empty(0, dtype=torch.int64))
    assert len(memory.say(asked).log_probs) == 0
    assert memory.distribution(asked)[0].shape == (0, 0)


def test_a_token_outside_the_vocabulary_ends_what_can_match(tmp_path):
    memory = memory_of([0, 1, 2, 0, 1, 2, 0], 3, tmp_path)
    for outside in (-1, 3, 1000):
        text = np.array([0, 1, outside, 2, 0, 1])
        memory.begin_pass(text)
        positions = torch.arange(7)
        opinion = memory.say(Scored(positions, torch.full((7,), 2)))
        assert opinion.features["suffix_length"].tolist() == [0, 1, 2, 0, 1, 2, 3]


def test_positions_outside_the_text_are_refused(tmp_path):
    memory = memory_of([1, 2, 1], 3, tmp_path, [1])
    for position in (-1, 2):
        with pytest.raises(ValueError, match=f"from {position} to {position} in a text of 1 "):
            memory.say(Scored(torch.tensor([position]), torch.tensor([0])))


def test_a_killed_build_begins_anew(tmp_path, monkeypatch):
    tokens, _ = related_texts(300, seed=8)
    expected = memory_of(tokens, 300, tmp_path / "at once").suffix_array.suffixes

    def killed(tokens, vocab_size, suffixes):
        suffixes[: len(suffixes) // 2] = 7
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(building, "sort_suffixes", killed)
        with pytest.raises(KeyboardInterrupt):
            memory_of(tokens, 300, tmp_path / "killed")
    with pytest.raises(InputError, match="no such file; expected the manifest of a suffix"):
        SuffixArray.open(tmp_path / "killed", np.array(tokens, np.uint16), 300, MADE_FROM)
    assert not list((tmp_path / "killed").glob("suffixes*"))
    resumed = memory_of(tokens, 300, tmp_path / "killed").suffix_array.suffixes
    assert resumed.tolist() == expected.tolist()


def test_what_is_there_is_not_built_again(tmp_path, monkeypatch):
    memory_of([1, 2, 1], 3, tmp_path)
    monkeypatch.delattr(building, "sort_suffixes")
    assert memory_of([1, 2, 1], 3, tmp_path).suffix_array.suffixes.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("made_from", "tokens", "vocab_size", "message"),
    [
        ({**MADE_FROM, "corpus": "x"}, [1, 2, 1], 3, "its corpus is one, but x is expected here"),
        ({**MADE_FROM, "dictionary": "x"}, [1, 2, 1], 3, "its dictionary is two, but x is"),
        (MADE_FROM, [1, 2], 3, "its rows is 3, but 2 is expected here"),
        (MADE_FROM, [1, 2, 1], 4, "its vocab size is 3, but 4 is expected here"),
    ],
)
def test_an_array_of_something_else_is_refused(made_from, tokens, vocab_size, message, tmp_path):
    memory_of([1, 2, 1], 3, tmp_path)
    for ways in (SuffixArray.open, SuffixArray.ensure):
        with pytest.raises(InputError, match=message):
            ways(tmp_path, np.array(tokens, np.uint8), vocab_size, made_from)


def test_a_damaged_array_is_refused(tmp_path):
    tokens = np.random.default_rng(9).integers(0, 50, 500)
    memory_of(tokens, 50, tmp_path)
    suffixes = np.load(tmp_path / "suffixes.npy", mmap_mode="r+")
    without_digests(tmp_path / "manifest.json")
    suffixes[200:300] = 0
    suffixes.flush()
    with pytest.raises(InputError, match="does not order the suffixes of its text"):
        memory_of(tokens, 50, tmp_path)
    suffixes[200:300] = 500
    suffixes.flush()
    with pytest.raises(InputError, match="does not order the suffixes of its text"):
        memory_of(tokens, 50, tmp_path)


def test_an_empty_text_is_refused(tmp_path):
    with pytest.raises(InputError, match="the text has no tokens; expected at least one"):
        memory_of([], 3, tmp_path)


def test_made_from_what_there_is(tmp_path):
    """The memory's array lies where the resources say, and serves a second time."""

    class Resources:
        vocab_size = 3

        def tokens(self, split):
            return np.array([1, 2, 1], np.uint8) if split == "train" else None

        def made_from(self, split):
            return MADE_FROM | {"split": split}

        def folder(self, name):
            return tmp_path / name

    for _ in range(2):
        memory = NGramMemory.of(Resources())
        memory.prepare()
        memory.begin_pass(np.array([1, 2, 1], np.uint8))
        opinion = memory.say(asking([1, 2, 1]))
        assert opinion.log_probs.exp().tolist() == pytest.approx([2 / 3, 1, 1])
    assert (tmp_path / "train-suffix_array" / "suffixes.npy").is_file()
