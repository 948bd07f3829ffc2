"""What all memories and mixers have in common: probabilities sum to one, and no token has a say in
what was predicted before it."""

from functools import cache

import numpy as np
import pytest
import torch

from neighborlm.common.contracts import Opinion, Scored
from neighborlm.programs.settings import KNNSettings, MemorySettings
from neighborlm.retrieval.memories import MEMORIES, MIXERS, KNNMemory
from neighborlm.retrieval.memories.adaptive import (
    AdaptiveSettings,
    ForetoldMixer,
    WhereSearchedMixer,
)
from neighborlm.retrieval.memories.automaton import AutomatonSettings
from neighborlm.retrieval.memories.cache_builder import RetrievalCacheBuilder
from neighborlm.retrieval.memories.mixers import lm_opinion, weighed
from neighborlm.retrieval.memories.recent import RecentSettings
from neighborlm.retrieval.search.retriever import FlatRetriever
from neighborlm.retrieval.store.datastore import DatastoreBuilder

VOCAB, DIM, K, TEMPERATURE, SIZE = 12, 6, 8, 2.0, 15
LENGTHS = {"train": 300, "valid": 200, "test": 28}
PLACES = (0, 2, 25)
"""Tokens of the test text that are replaced by every other one."""
BATCH = 7
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(VOCAB, DIM)).astype(np.float32)
LM = torch.from_numpy(RNG.normal(size=(VOCAB, VOCAB))).log_softmax(dim=1)
STEPS = {
    split: np.where(RNG.random(n) < 0.8, 1, RNG.integers(0, VOCAB, n))
    for split, n in LENGTHS.items()
}
TEXTS = {split: (np.cumsum(steps) % VOCAB).astype(np.uint8) for split, steps in STEPS.items()}
SETTINGS = MemorySettings(
    KNNSettings(k=K, temperature=TEMPERATURE),
    RecentSettings(size=SIZE, temperature=TEMPERATURE),
    AutomatonSettings(min_pointers=2, walk_length=16),
    AdaptiveSettings(skip=0.3),
)


def keys_of(text: np.ndarray) -> np.ndarray:
    """Of each token's context, from the three tokens before it."""
    padded = np.concatenate([np.zeros((3, DIM), np.float32), VECTORS[text]])
    return padded[2:-1] + padded[1:-2] / 2 + padded[:-3] / 4


def scored(text: np.ndarray) -> Scored:
    """What a bigram model says of a text."""
    targets = torch.from_numpy(text.astype(np.int64))
    log_probs = LM[torch.cat([torch.zeros(1, dtype=torch.int64), targets[:-1]])]
    top = log_probs.topk(3, dim=1)
    return Scored(
        torch.arange(len(text)),
        targets,
        log_probs.gather(1, targets[:, None])[:, 0].float(),
        {"last_ffn_input": torch.from_numpy(keys_of(text))},
        -(log_probs.exp() * log_probs).sum(dim=1).float(),
        top.indices,
        top.values.float(),
    )


class World:
    """The resources of memories of the training text."""

    vocab_size, settings, device = VOCAB, SETTINGS, torch.device("cpu")

    def __init__(self, root):
        self.root = root
        n = LENGTHS["train"]
        made = (root / "store", n, DIM, "fp32", VOCAB, {}, np.empty(0, np.int64))
        builder = DatastoreBuilder(*made)
        builder.write(np.arange(n), keys_of(TEXTS["train"]), TEXTS["train"])
        builder.sync()
        self.store = builder.finish()
        self.memory = cache(self.memory)
        self.heard = cache(self.heard)

    def tokens(self, split):
        return TEXTS[split]

    def made_from(self, split):
        return {"corpus": split}

    def folder(self, name):
        return self.root / name

    def datastore(self):
        return self.store

    def retriever(self):
        return FlatRetriever(self.store, "l2")

    def rescoring_datastore(self):
        return None

    def memory(self, name):
        """A memory, tuned on the validation text; `by_k` is knn as meta-k asks it."""
        memory = MEMORIES["knn" if name == "by_k" else name](self)
        if name == "by_k":
            MIXERS["meta_k"]().ask({"knn": memory})
        if memory.needs_tuning:
            valid = TEXTS["valid"]
            builder = RetrievalCacheBuilder(self.root / name, len(valid), K, VOCAB, {})
            memory.cache = builder
            ask(memory, valid, len(valid))
            memory.cache, memory.retrieved = None, builder.finish()
            memory.tune()
        return memory

    def heard(self, name):
        """By place, what a memory says of the test text for each token there; the text after it is
        another one for each."""
        memory, rng = self.memory(name), np.random.default_rng(1)
        said = {}
        for place in PLACES:
            for token in range(VOCAB):
                text = TEXTS["test"].copy()
                text[place] = token
                text[place + 1 :] = rng.integers(0, VOCAB, len(text) - place - 1)
                said[place, token] = ask(memory, text, BATCH)
        return said


def ask(memory, text: np.ndarray, batch: int) -> Opinion:
    """A memory's opinion on a text."""
    memory.begin_pass(text)
    opinions, asked = [], scored(text)
    for first in range(0, len(text), batch):
        part = asked.some(slice(first, first + batch))
        opinions.append(memory.say(part))
        memory.observe(part.targets)
    memory.end_pass()
    return Opinion.joined(opinions)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def plain_knn(text: np.ndarray, place: int) -> np.ndarray:
    keys, query = keys_of(TEXTS["train"]).astype(float), keys_of(text)[place].astype(float)
    distances = ((keys - query) ** 2).sum(1)
    nearest = np.argsort(distances, kind="stable")[:K]
    weights = np.exp(-(distances[nearest] - distances.min()) / TEMPERATURE)
    return np.bincount(TEXTS["train"][nearest], weights / weights.sum(), VOCAB)


def plain_ngram(text: np.ndarray, place: int) -> np.ndarray:
    train = TEXTS["train"].tolist()
    for length in range(place, -1, -1):
        suffix = text[place - length : place].tolist()
        ends = range(len(train) - length)
        next_tokens = [train[i + length] for i in ends if train[i : i + length] == suffix]
        if next_tokens:
            return np.bincount(next_tokens, minlength=VOCAB) / len(next_tokens)
    raise AssertionError("the empty suffix occurs")


def plain_recent(text: np.ndarray, place: int) -> np.ndarray:
    if place == 0:
        return np.zeros(VOCAB)
    recent = slice(max(place - SIZE, 0), place)
    keys = keys_of(text).astype(float)
    weights = np.exp(-((keys[recent] - keys[place]) ** 2).sum(1) / TEMPERATURE)
    return np.bincount(text[recent], weights / weights.sum(), VOCAB)


PLAIN = {"knn": plain_knn, "ngram": plain_ngram, "recent": plain_recent}
"""The distribution of the token at a place; that of the automaton is compared in its own tests."""


@pytest.mark.parametrize("name", MEMORIES)
def test_a_distribution_of_every_memory(world, name):
    """Sums to one or to zero, is what `say` says of each token, and looks at none from there on."""
    memory, said = world.memory(name), world.heard(name)
    for place in PLACES:
        opinions = [said[place, token] for token in range(VOCAB)]
        probs = torch.stack([opinion.log_probs[place] for opinion in opinions]).double().exp()
        assert probs.sum().item() == pytest.approx(round(probs.sum().item()), abs=1e-5)
        for opinion in opinions[1:]:
            torch.testing.assert_close(opinion.log_probs[:place], opinions[0].log_probs[:place])
            for feature, column in opinion.features.items():
                expected = opinions[0].features[feature][: place + 1]
                torch.testing.assert_close(column[: place + 1], expected, equal_nan=True)
        text = TEXTS["test"]
        memory.begin_pass(text)
        asked = scored(text)
        for first in range(place):
            before = asked.some(slice(first, first + 1))
            memory.say(before)
            memory.observe(before.targets)
        found = memory.distribution(asked.some(slice(place, place + 1)))
        spread = torch.zeros(VOCAB).index_add(0, found.ids[0], found.probs[0].float())
        for feature, column in found.features.items():
            expected = opinions[0].features[feature][place : place + 1]
            torch.testing.assert_close(column, expected, equal_nan=True)
        torch.testing.assert_close(spread.double(), probs, atol=1e-5, rtol=1e-4)
        if name in PLAIN:
            np.testing.assert_allclose(probs, PLAIN[name](text, place), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MEMORIES if not name.startswith("auto")])
def test_opinions_do_not_depend_on_batches(world, name):
    memory = world.memory(name)
    found = [ask(memory, TEXTS["test"], batch) for batch in (28, 1)]
    torch.testing.assert_close(found[0].log_probs, found[1].log_probs)
    torch.testing.assert_close(found[0].features, found[1].features, equal_nan=True)


MIXED = {name: ("knn", "ngram", "recent", "automaton") for name in MIXERS}
MIXED |= dict.fromkeys(("drozdov", "nest"), ("knn",))
MADE = MIXERS | {"foretold": ForetoldMixer, "where_searched": WhereSearchedMixer}
MIXED |= dict.fromkeys(("foretold", "where_searched"), ("adaptive",))


@pytest.mark.parametrize("kind", MADE)
def test_a_mixture_of_every_mixer(world, kind):
    """Sums to one, but for the weight of memories that say nothing, and looks at no token from
    there on; weights neither at that token."""
    mixer, names = MADE[kind](), {name: name for name in MIXED[kind]}
    if kind == "meta_k":
        names["knn"] = "by_k"
    memories = {name: world.memory(of_world) for name, of_world in names.items()}
    valid = TEXTS["valid"]
    opinions = {name: ask(memory, valid, len(valid)) for name, memory in memories.items()}
    mixer.fit({"lm": lm_opinion(scored(valid)), **opinions})
    for place in PLACES:
        mixtures, all_weights, sums = [], [], 0.0
        for token in range(VOCAB):
            text = TEXTS["test"].copy()
            text[place] = token
            sources = {"lm": lm_opinion(scored(text)).some(slice(place + 1))}
            for name, of_world in names.items():
                sources[name] = world.heard(of_world)[place, token].some(slice(place + 1))
            mixed, weights = weighed(sources, mixer)
            mixtures.append(mixed)
            all_weights.append(torch.stack(list(weights.values())))
            sums += mixed[place].exp().item()
        total = all_weights[0].sum(dim=0)
        torch.testing.assert_close(total, torch.ones_like(total))
        for mixed, weights in zip(mixtures, all_weights, strict=True):
            torch.testing.assert_close(mixed[:place], mixtures[0][:place])
            torch.testing.assert_close(weights, all_weights[0])
        silent = [name for name in names if is_silent(world.heard(names[name]), place)]
        lost = sum(all_weights[0][1 + list(names).index(name), place].item() for name in silent)
        assert sums == pytest.approx(1 - lost, abs=1e-5)


def is_silent(said: dict, place: int) -> bool:
    """Whether a memory gives no token at a place a probability."""
    return all(said[place, token].log_probs[place].isneginf().all() for token in range(VOCAB))


def test_the_gate_is_not_asked_for_what_it_skips(world, monkeypatch):
    """And with nothing skipped the memory is the plain one."""
    memory, knn = world.memory("adaptive"), world.memory("knn")
    queries = []
    search = memory.retriever.search

    def counted(wanted, *args):
        queries.append(len(wanted))
        return search(wanted, *args)

    monkeypatch.setattr(memory.retriever, "search", counted)
    said = ask(memory, TEXTS["test"], BATCH)
    searched = said.features["searched"].bool()
    assert 0 < sum(queries) == memory.searches == searched.sum() < len(searched)
    assert said.log_probs[~searched].isneginf().all()
    assert said.features["lmbda"][searched].min() > said.features["lmbda"][~searched].max()
    monkeypatch.setattr(memory, "threshold", -np.inf)
    every = ask(memory, TEXTS["test"], BATCH)
    plain = ask(knn, TEXTS["test"], BATCH)
    torch.testing.assert_close(every.log_probs, plain.log_probs)
    torch.testing.assert_close(said.log_probs[searched], plain.log_probs[searched])


def test_neighbors_of_a_cache_say_the_same(world, tmp_path):
    """Also for each number of neighbours."""
    for by_k in (False, True):
        memory = KNNMemory.of(world)
        memory.by_k = by_k
        builder = RetrievalCacheBuilder(tmp_path / str(by_k), LENGTHS["test"], K, VOCAB, {})
        memory.cache = builder
        said = ask(memory, TEXTS["test"], BATCH)
        again = memory.opinion_on(builder.finish())
        torch.testing.assert_close(again.log_probs, said.log_probs)
        torch.testing.assert_close(again.features, said.features)
