"""The running text as a memory, against a plain loop in float64."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neighborlm.common.contracts import Scored
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories import recent_tuning
from neighborlm.retrieval.memories.recent import RecentMemory, RecentSettings

N, DIM, VOCAB, KEYS = 300, 6, 12, "last_ffn_input"
SETTINGS = [
    {"similarity": "ip"},
    {"similarity": "l2", "temperature": 0.3},
    {"similarity": "cosine", "temperature": 0.1},
    {"similarity": "l2", "document_end": 3},
    {"similarity": "ip", "size": 400},
    {"similarity": "ip", "size": 1},
    {"similarity": "l2", "temperature": 0.05},
]


@pytest.fixture
def text() -> Scored:
    """Tokens of a split from position 100 on, some of which are not scored."""
    return made_up_text(0)


def made_up_text(seed: int, n: int = N) -> Scored:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(100, 100 + 2 * n)[torch.rand(2 * n, generator=generator) < 0.9][:n]
    targets = torch.randint(0, VOCAB, (n,), generator=generator)
    keys = torch.randn(n, DIM, generator=generator) + torch.nn.functional.one_hot(targets % DIM)
    log_probs = -torch.rand(n, generator=generator) * 4 - 0.5
    return Scored(positions, targets, log_probs, {KEYS: keys})


def part_of(text: Scored, part: slice) -> Scored:
    keys = {name: key[part] for name, key in text.keys.items()}
    return Scored(text.positions[part], text.targets[part], text.log_probs[part], keys)


def memory_of(size: int | None = 50, temperature: float | None = 1.0, **options) -> RecentMemory:
    return RecentMemory(size, temperature, **{"similarity": "ip"} | options)


def ask(memory: RecentMemory, text: Scored, step: int):
    """What it says of a text that comes `step` tokens at a time."""
    memory.begin_pass(text.targets.numpy())
    opinions = []
    for first in range(0, len(text.positions), step):
        part = part_of(text, slice(first, first + step))
        opinions.append(memory.say(part))
        memory.observe(part.targets)
    log_probs = torch.cat([opinion.log_probs for opinion in opinions])
    features = {
        name: torch.cat([opinion.features[name] for opinion in opinions])
        for name in opinions[0].features
    }
    return log_probs, features


def plain(text: Scored, size=50, temperature=1.0, similarity="ip", document_end=None):
    """By a loop: p of every token of the vocabulary, float64 `[n, V]`, and the features."""
    keys = text.keys[KEYS].double().numpy()
    if similarity == "cosine":
        keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    targets = text.targets.numpy()
    table, nearest, seen = np.zeros((len(keys), VOCAB)), np.full(len(keys), np.nan), []
    begin = 0
    for t in range(len(keys)):
        if t and targets[t - 1] == document_end:
            begin = t
        window = range(max(begin, t - size), t)
        seen.append(len(window))
        if not window:
            continue
        scores = [
            -((keys[t] - keys[i]) ** 2).sum() if similarity == "l2" else keys[t] @ keys[i]
            for i in window
        ]
        nearest[t] = max(scores) * (-1 if similarity == "l2" else 1)
        for i, score in zip(window, scores, strict=True):
            table[t, targets[i]] += math.exp((score - max(scores)) / temperature)
        table[t] /= table[t].sum()
    return table, nearest, np.array(seen)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_equals_a_plain_loop(text, settings, device):
    log_probs, features = ask(memory_of(**settings, device=device), text, 128)
    table, nearest, seen = plain(text, **settings)
    expected = table[np.arange(N), text.targets]
    # A score has some 1e-6 of error, which the temperature divides.
    rtol = 1e-5 * max(1 / settings.get("temperature", 1.0), 2.0)
    np.testing.assert_allclose(log_probs.exp(), expected, rtol=rtol, atol=1e-30)
    assert (log_probs.isneginf().numpy() == (expected == 0)).all()
    np.testing.assert_array_equal(features["positions"], seen)
    some = seen > 0
    favourite = features["favourite"]
    np.testing.assert_allclose(favourite[some], table[some].max(axis=1), rtol=rtol)
    np.testing.assert_allclose(features["nearest_distance"][some], nearest[some], atol=1e-5)
    assert favourite[~some].isnan().all()
    assert features["nearest_distance"][~some].isinf().all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_is_over_the_whole_vocabulary_and_holds_the_target(text, settings, device):
    memory = memory_of(**settings, device=device)
    memory.say(part_of(text, slice(0, 70)))
    memory.observe(text.targets[:70])
    asked = part_of(text, slice(70, None))
    ids, weights = memory.distribution(asked)[:2]
    found = torch.zeros(len(ids), VOCAB).scatter_add_(1, ids, weights)
    table, _, seen = plain(text, **settings)
    np.testing.assert_allclose(found, table[70:], atol=1e-4)
    np.testing.assert_allclose(found.sum(dim=1), (seen[70:] > 0).astype(float), rtol=1e-5)
    of_target = memory.say(asked).log_probs.exp()
    np.testing.assert_allclose(of_target, found.gather(1, asked.targets[:, None])[:, 0], atol=1e-6)


def test_a_vote_that_is_far_from_the_best_is_counted():
    """exp(-200) is no number in fp32."""
    keys = torch.tensor([[1.0], [-199.0], [1.0], [1.0]])
    text = Scored(torch.arange(4), torch.tensor([5, 7, 5, 7]), torch.zeros(4), {KEYS: keys})
    log_probs, _ = ask(memory_of(similarity="ip"), text, 4)
    assert log_probs[0] == log_probs[1] == -torch.inf
    torch.testing.assert_close(log_probs[3].item(), -200 - math.log(2), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("step", [1, 7, 64, 100])
def test_how_many_come_at_a_time_changes_nothing(text, step):
    whole, features = ask(memory_of(similarity="l2", document_end=3), text, N)
    log_probs, others = ask(memory_of(similarity="l2", document_end=3), text, step)
    assert torch.equal(log_probs, whole)
    for name, column in features.items():
        torch.testing.assert_close(others[name], column, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("at", [0, 63, 64, 151, N - 1])
@pytest.mark.parametrize("size", [20, 120])
def test_nothing_depends_on_what_comes_later(text, at, size):
    """Another target and key from some token on: its own key may change what is said of it."""
    other = made_up_text(1)
    targets = torch.cat([text.targets[:at], (text.targets[at:] + 1) % VOCAB])
    keys = torch.cat([text.keys[KEYS][: at + 1], other.keys[KEYS][at + 1 :]])
    changed = text._replace(targets=targets, keys={KEYS: keys})
    given = {"size": size, "document_end": 3}
    before, features = ask(memory_of(**given), text, 90)
    after, others = ask(memory_of(**given), changed, 90)
    assert torch.equal(before[:at], after[:at])
    for name in features:
        assert torch.equal(
            features[name][: at + 1].nan_to_num(), others[name][: at + 1].nan_to_num()
        )
    # The whole distribution of the token at hand too, of which the target says one number.
    tables = []
    for asked in (text, changed):
        memory = memory_of(**given)
        ids, weights = memory.distribution(part_of(asked, slice(0, at + 1)))[:2]
        tables.append(torch.zeros(VOCAB).scatter_add_(0, ids[at], weights[at]))
    assert torch.equal(*tables)


def test_a_part_of_the_text_behind_its_warm_up_is_as_in_the_whole(text):
    """What each of several ranks says of its own part."""
    memory = memory_of(size=50)
    whole, features = ask(memory, text, 40)
    first = 131
    rank = part_of(text, slice(first - memory.warm_up, None))
    log_probs, others = ask(memory_of(size=50), rank, 33)
    torch.testing.assert_close(log_probs[50:], whole[first:], rtol=1e-5, atol=1e-6)
    assert torch.equal(others["positions"][50:], features["positions"][first:])


def test_a_new_pass_forgets_the_text(text):
    memory = memory_of()
    first, _ = ask(memory, text, 100)
    second, _ = ask(memory, text, 100)
    assert torch.equal(first, second)


def test_tokens_are_learnt_one_by_one_as_they_are_generated(text):
    """What was asked about may have had any target: what is observed counts."""
    memory = memory_of()
    for t in range(20):
        asked = part_of(text, slice(t, t + 1))
        ids, weights = memory.distribution(asked._replace(targets=torch.zeros(1).long()))[:2]
        memory.observe(asked.targets)
    found = torch.zeros(1, VOCAB).scatter_add_(1, ids, weights)
    np.testing.assert_allclose(found[0], plain(text)[0][19], rtol=2e-5, atol=1e-7)


def test_tokens_out_of_order_are_refused(text):
    memory = memory_of()
    memory.say(part_of(text, slice(100, 200)))
    memory.observe(text.targets[100:200])
    with pytest.raises(InputError, match=r"comes after token .* order"):
        memory.say(part_of(text, slice(0, 100)))
    memory.begin_pass(text.targets.numpy())
    backwards = text._replace(positions=text.positions.flip(0))
    with pytest.raises(InputError, match="order"):
        memory.say(backwards)
    memory.begin_pass(text.targets.numpy())
    memory.say(text)
    with pytest.raises(ValueError, match="3 tokens are observed, but 300"):
        memory.observe(text.targets[:3])


# -- tuning --------------------------------------------------------------------------------------


def heard(memory: RecentMemory, text: Scored) -> None:
    """Lets a memory listen."""
    for first in range(0, N, 77):
        part = part_of(text, slice(first, first + 77))
        opinion = memory.say(part)
        memory.observe(part.targets)
        assert opinion.log_probs.isneginf().all()


@pytest.mark.parametrize(("similarity", "nearly"), [("ip", 1e-3), ("l2", 1e-3), ("l2", 9.0)])
def test_tuning_finds_the_smallest_window_that_is_nearly_the_best(
    text, similarity, nearly, monkeypatch
):
    monkeypatch.setattr(recent_tuning, "NEARLY", nearly)
    monkeypatch.setattr(recent_tuning, "SIZES", (10, 40, 150))
    monkeypatch.setattr(recent_tuning, "TOKENS_AT_ONCE", 110)
    memory = memory_of(None, None, similarity=similarity, document_end=3)
    heard(memory, text)
    opinion = memory.tune()
    found = memory.tuning
    assert len(found.temperatures) == len(recent_tuning.OCTAVES) + 2
    lm = text.log_probs.double().exp().numpy()
    for row, size in enumerate(found.sizes):
        for column, temperature in enumerate(found.temperatures):
            table = plain(text, size, temperature, similarity, 3)[0]
            p = table[np.arange(N), text.targets]
            losses = [-np.log((1 - w) * lm + w * p).mean() for w in np.arange(20) / 20]
            np.testing.assert_allclose(found.losses[row, column], min(losses), rtol=1e-5)
    by_size = found.losses.min(axis=1)
    row = found.sizes.index(found.size)
    assert row == 0 or nearly < 1
    assert by_size[row] <= by_size.min() + nearly
    assert (by_size[:row] > by_size.min() + nearly).all()
    assert found.loss == by_size[row] == found.losses[row].min()
    assert found.temperature == found.temperatures[found.losses[row].argmin()]
    assert (memory.size, memory.temperature) == (found.size, found.temperature)
    log_probs, features = ask(memory, text, 100)
    assert torch.equal(opinion.log_probs, log_probs)
    assert torch.equal(opinion.features["positions"], features["positions"])


def test_what_is_given_is_not_tuned(text):
    memory = memory_of(30, None)
    heard(memory, text)
    memory.tune()
    assert memory.size == 30
    assert memory.tuning.sizes == [30]
    memory = memory_of(None, 2.0)
    heard(memory, text)
    memory.tune()
    assert memory.temperature == 2.0
    assert memory.tuning.temperatures == [2.0]


def test_without_tuning_there_is_no_distribution(text):
    with pytest.raises(InputError, match="size and temperature"):
        memory_of(None, 1.0).distribution(text)


def test_settings_are_checked():
    RecentSettings().check()
    for wrong in ({"size": 0}, {"temperature": 0.0}, {"temperature": math.inf}):
        with pytest.raises(InputError, match=f"--recent.{next(iter(wrong))}"):
            RecentSettings(**wrong).check()
    sections = SimpleNamespace(recent=RecentSettings(size=7, key_type="last_hidden"))
    memory = RecentMemory.of(SimpleNamespace(settings=sections, device=torch.device("cpu")))
    assert memory.want.keys == ("last_hidden",)
    assert memory.warm_up == 7
    assert memory.needs_tuning
