"""What all memories together say of every next token, of several texts at once, against what each
says of the tokens of one text."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from neighborlm.common.contracts import Memory, Mixer, Opinion, Scored, Want
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.automaton import AutomatonMemory, AutomatonSettings
from neighborlm.retrieval.memories.buckets import BucketMixer
from neighborlm.retrieval.memories.knn_memory import KNNMemory
from neighborlm.retrieval.memories.mixers import ConstantMixer, mixture
from neighborlm.retrieval.memories.next_token import NextToken
from neighborlm.retrieval.memories.ngram import NGramMemory
from neighborlm.retrieval.memories.recent import RecentMemory
from neighborlm.retrieval.memories.suffix_array import SuffixArray
from neighborlm.retrieval.search.retriever import FlatRetriever

VOCAB, DIM, KEYS, LONGEST = 6, 4, "last_ffn_input", 40
SHARES = {"lm": 0.4, "knn": 0.2, "ngram": 0.1, "recent": 0.1, "automaton": 0.2}


def vectors_of(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A made-up model: keys `[T, d]` and log-probabilities `[T, V]` after each token of a text, by
    the last two tokens."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCAB, VOCAB, DIM, generator=generator)
    head = torch.randn(DIM, VOCAB, generator=generator)
    keys = table[F.pad(text, (1, 0))[:-1], text]
    return keys, (keys @ head).log_softmax(dim=1)


@pytest.fixture
def memories(new_builder, tmp_path) -> dict[str, Memory]:
    """One of each kind, of the same training text."""
    text = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, 200))
    builder = new_builder(tmp_path / "store", len(text) - 1, DIM)
    builder.write(np.arange(len(text) - 1), vectors_of(text)[0][:-1].numpy(), text[1:].numpy())
    builder.sync()
    store = builder.finish()
    flat = FlatRetriever(store, "l2")
    array = SuffixArray.ensure(tmp_path / "array", text.numpy().astype(np.uint8), VOCAB, {})
    walking = AutomatonSettings(walk_length=7, min_pointers=2)
    return {
        "knn": KNNMemory(store, flat, 8, 2.0),
        "ngram": NGramMemory(array),
        "recent": RecentMemory(12, 1.0),
        "automaton": AutomatonMemory(store, flat, 8, 2.0, walking),
    }


def of_targets(memories: dict[str, Memory], mixer: Mixer, text: torch.Tensor) -> torch.Tensor:
    """log p of each token of a text but the first, as an evaluation mixes it."""
    keys, log_probs = vectors_of(text)
    targets = text[1:]
    asked = Scored(torch.arange(1, len(text)), targets, keys={KEYS: keys[:-1]})
    opinions = {"lm": Opinion(log_probs[:-1].gather(1, targets[:, None])[:, 0])}
    for name, memory in memories.items():
        memory.begin_pass(text.numpy())
        opinions[name] = memory.say(asked)
    features = {f"{m}.{f}": x for m, o in opinions.items() for f, x in o.features.items()}
    weights = mixer.weights(features, len(targets)).clone()
    if "recent" in memories:  # which has nothing to say of the first token; the others share
        weights[0, list(opinions).index("recent")] = 0
        weights[0] /= weights[0].sum()
    columns = [opinion.log_probs.double() for opinion in opinions.values()]
    return mixture(columns, weights.unbind(dim=1))


def extend(mixed: NextToken, texts: list[torch.Tensor], new: int, last: int = 1) -> torch.Tensor:
    """What is said after the newest tokens of each text, `[texts, last, V]`."""
    tokens, keys, log_probs = [], [], []
    for text in texts:
        own_keys, own_log_probs = vectors_of(text)
        missing = max(new - len(text), 0)
        tokens.append(F.pad(text[-new:], (missing, 0), value=-1))
        keys.append(F.pad(own_keys[-new:], (0, 0, missing, 0)))
        log_probs.append(F.pad(own_log_probs, (0, 0, last, 0))[-last:])
    of_all = torch.cat(log_probs)
    found = mixed.extend(torch.stack(tokens), {KEYS: torch.stack(keys)}, of_all, slice(-last, None))
    return found.log_probs.view(len(texts), last, VOCAB)


def check_against_each_alone(memories, mixer, texts, found, places) -> None:
    """`found` `[texts, V]` is what is said of the token at `places` of each text."""
    for text, log_probs, place in zip(texts, found, places, strict=True):
        expected = of_targets(memories, mixer, text[: place + 1])[-1]
        np.testing.assert_allclose(log_probs[text[place]], expected, atol=2e-5)


def random_texts(*lengths: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(1)
    return [torch.from_numpy(rng.integers(0, VOCAB, length)) for length in lengths]


@pytest.mark.parametrize(
    "names", ["knn", "ngram", "recent", "automaton", "knn,ngram,recent,automaton"]
)
@torch.inference_mode()
def test_texts_in_a_batch_are_as_each_alone_and_as_in_an_evaluation(memories, names):
    chosen = {name: memories[name] for name in names.split(",")}
    shares = [SHARES["lm"], *(SHARES[name] for name in chosen)]
    mixer = ConstantMixer([share / sum(shares) for share in shares])
    texts, prompts = random_texts(25, 21, 18), (8, 4, 1)
    mixed = NextToken(chosen, mixer)
    mixed.begin(3, LONGEST)
    results = []
    for step in range(17):
        read = [text[: prompt + step] for text, prompt in zip(texts, prompts, strict=True)]
        results.append(extend(mixed, read, 1 if step else 8)[:, 0])
    for step in (0, 1, 5, 16):
        np.testing.assert_allclose(results[step].exp().sum(dim=1), 1, atol=1e-5)
        places = [prompt + step for prompt in prompts]
        check_against_each_alone(chosen, mixer, texts, results[step], places)


@torch.inference_mode()
def test_texts_follow_others(memories):
    """As beams do: each goes on as a copy of any, whatever was read and asked before."""
    mixer, mixed = (
        ConstantMixer(list(SHARES.values())),
        NextToken(memories, ConstantMixer(list(SHARES.values()))),
    )
    mixed.begin(3, LONGEST)
    texts = random_texts(9, 6, 3)
    extend(mixed, texts, 9)
    rng = np.random.default_rng(2)
    for _ in range(12):
        parents = rng.integers(0, 3, 3)
        mixed.follow(torch.from_numpy(parents))
        new = torch.from_numpy(rng.integers(0, VOCAB, (3, 1)))
        texts = [
            torch.cat([texts[parent], more]) for parent, more in zip(parents, new, strict=True)
        ]
        found = extend(mixed, texts, 1)[:, 0]
    after = [torch.cat([text, text.new_tensor([4])]) for text in texts]
    check_against_each_alone(memories, mixer, after, found, [len(text) for text in texts])


@torch.inference_mode()
def test_several_places_of_a_text_are_mixed_at_once(memories):
    mixer = ConstantMixer(list(SHARES.values()))
    texts = random_texts(12, 2)
    mixed = NextToken(memories, mixer)
    mixed.begin(2, LONGEST)
    found = extend(mixed, texts, 12, last=4)
    for back in (2, 3, 4):
        check_against_each_alone(memories, mixer, texts[:1], found[:1, -back], [13 - back])
    # Where a text has not begun, what the model says is left as it is.
    assert torch.equal(found[1, :2], torch.zeros(2, VOCAB))


@torch.inference_mode()
def test_features_weigh_as_in_an_evaluation(memories):
    text = random_texts(30)[0]
    keys, log_probs = vectors_of(text)
    asked = Scored(torch.arange(1, 30), text[1:], keys={KEYS: keys[:-1]})
    opinions = {"lm": Opinion(log_probs[:-1].gather(1, text[1:, None])[:, 0])}
    for name in ("knn", "ngram"):
        memories[name].begin_pass(text.numpy())
        opinions[name] = memories[name].say(asked)
    chosen = {name: memories[name] for name in ("knn", "ngram")}
    mixer = BucketMixer(["knn.nearest_distance", "ngram.suffix_length"], buckets=3)
    mixer.fit(opinions)
    mixed = NextToken(chosen, mixer)
    mixed.begin(1, LONGEST)
    found = [extend(mixed, [text[: 20 + t]], 1 if t else 20)[0, 0] for t in range(5)]
    assert (
        len(
            {
                tuple(w)
                for w in mixer.weights(
                    {f"{m}.{f}": x for m, o in opinions.items() for f, x in o.features.items()}, 29
                ).tolist()
            }
        )
        > 1
    )
    for t, log_probs in enumerate(found):
        check_against_each_alone(chosen, mixer, [text], log_probs[None], [20 + t])


class Half(Mixer):
    """Half the weight for the model, by what it is asked for itself."""

    needs_fitting, want = False, Want(entropy=True, top=1)

    def weights(self, features, n):
        self.seen = features
        return torch.full((n, 2), 0.5, dtype=torch.float64)


@torch.inference_mode()
def test_the_models_own_features_are_known(memories):
    text, mixer = random_texts(5)[0], Half()
    mixed = NextToken({"knn": memories["knn"]}, mixer)
    mixed.begin(1, LONGEST)
    extend(mixed, [text], 5)
    p = vectors_of(text)[1][-1].exp()
    np.testing.assert_allclose(mixer.seen["lm.entropy"], -(p * p.log()).sum(), rtol=1e-5)
    np.testing.assert_allclose(mixer.seen["lm.top_prob"], p.max(), rtol=1e-5)


@pytest.mark.parametrize("mixer", [ConstantMixer([1.0, 0.0]), None], ids=["asks none", "asks"])
@torch.inference_mode()
def test_without_weight_a_memory_changes_nothing(memories, mixer):
    class AllToModel(Half):
        def weights(self, features, n):
            return torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(n, 2)

    text = random_texts(5)[0]
    mixed = NextToken({"knn": memories["knn"]}, mixer or AllToModel())
    mixed.begin(1, LONGEST)
    assert torch.equal(extend(mixed, [text], 5)[0, 0], vectors_of(text)[1][-1])


@torch.inference_mode()
def test_another_number_of_weights_than_of_sources_is_refused(memories):
    mixed = NextToken({"knn": memories["knn"], "ngram": memories["ngram"]}, Half())
    mixed.begin(1, LONGEST)
    with pytest.raises(InputError, match=r"2 weights, but there are 3 sources .lm, knn, ngram"):
        extend(mixed, random_texts(5), 5)
