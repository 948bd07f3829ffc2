"""The sweep point by point, and the search against known mixtures."""

import numpy as np
import pytest
import torch

from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories import tuning as tuning_module
from neighborlm.retrieval.memories.cache import Retrieved
from neighborlm.retrieval.memories.knn import knn_log_prob
from neighborlm.retrieval.memories.mixers import mixture
from neighborlm.retrieval.memories.tuning import sweep, tune


def blocks_of(lm, scores, hits, size=1000):
    """Tokens as a cache gives them."""
    hits = hits & ~scores.isneginf()
    nothing = torch.zeros(len(lm), dtype=torch.int64)
    columns = (nothing, nothing, lm, scores, hits)
    return [Retrieved(*parts) for parts in zip(*(c.split(size) for c in columns), strict=True)]


def test_nothing_to_tune_on():
    nothing = blocks_of(torch.zeros(0), torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool))
    for blocks in ([], nothing):
        with pytest.raises(InputError, match="cannot be tuned on no tokens"):
            tune(blocks)
        with pytest.raises(InputError, match="cannot be tuned on no tokens"):
            sweep(blocks, [1], [1.0], [0.5])


def test_sweep_equals_every_point_on_its_own(monkeypatch):
    """Missing neighbours, tokens that find nothing and hits whose weights are no fp32 numbers
    included, in blocks and parts of uneven sizes."""
    monkeypatch.setattr(tuning_module, "PART", 1000)
    rng = np.random.default_rng(0)
    scores = -rng.gamma(1.0, 100.0, (203, 20)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    scores[::17] = -np.inf
    scores = torch.from_numpy(scores).sort(descending=True)[0] - 1e4
    hits = torch.from_numpy(rng.random((203, 20)) < np.linspace(0.3, 0.05, 20))
    lm = torch.from_numpy(rng.normal(-200, 80, 203).astype(np.float32)).clamp(max=-1.0)
    hits[:, 19] |= True  # so that lmbda 1 has a finite loss where there are 20
    scores[:, 19] = scores[:, 19].nan_to_num(neginf=-3e4)
    ks, temperatures, lmbdas = [1, 2, 7, 20], [0.01, 1.0, 30.0, 1e4], [0.0, 0.3, 1.0]
    losses = sweep(blocks_of(lm, scores, hits, 64), ks, temperatures, lmbdas)
    assert losses.shape == (4, 4, 3)
    hits &= ~scores.isneginf()
    for i, k in enumerate(ks):
        for j, temperature in enumerate(temperatures):
            of_knn = knn_log_prob(scores[:, :k].double(), hits[:, :k], temperature)
            for m, lmbda in enumerate(lmbdas):
                mixed = mixture([lm.double(), of_knn], [1 - lmbda, lmbda])
                expected = -mixed.mean().item()
                assert losses[i, j, m] == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(losses[3]).all()
    assert np.isinf(losses[0, :, 2]).all()


def planted(tokens, lmbda, temperature, k=16, vocab=5):
    """Tokens that were drawn from a mixture of known weight and temperature."""
    rng = np.random.default_rng(0)
    scores = -rng.gamma(2.0, 3 * temperature, (tokens, k))
    scores[:, 0] = -rng.random(tokens)
    values = rng.integers(0, vocab, (tokens, k))
    p_lm = rng.dirichlet(np.ones(vocab), tokens)
    weights = np.exp(scores / temperature)
    weights /= weights.sum(1, keepdims=True)
    p_knn = np.stack([(weights * (values == w)).sum(1) for w in range(vocab)], 1)
    p = lmbda * p_knn + (1 - lmbda) * p_lm
    targets = (p.cumsum(1) < rng.random((tokens, 1))).sum(1)
    lm = np.log(p_lm[np.arange(tokens), targets])
    return (
        torch.from_numpy(lm.astype(np.float32)),
        torch.from_numpy(scores.astype(np.float32)),
        torch.from_numpy(values == targets[:, None]),
    )


def test_tuning_finds_the_optimum_of_a_finer_grid():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(-rng.gamma(2.0, 20.0, (600, 16)).astype(np.float32))
    hits = torch.from_numpy(rng.random((600, 16)) < np.linspace(0.6, 0.05, 16))
    lm = torch.from_numpy(rng.normal(-3, 1, 600).astype(np.float32)).clamp(max=-0.01)
    tuned = tune(blocks_of(lm, scores, hits))
    assert tuned.losses[0, 0] == pytest.approx(-lm.double().mean().item(), abs=1e-5)
    finer = sweep(
        blocks_of(lm, scores, hits), [16], 2.0 ** np.arange(-3, 11, 0.125), np.arange(0, 1, 0.02)
    )
    assert tuned.loss <= finer.min() + 1e-3


def test_tuning_finds_what_was_planted():
    """Far from temperature 1, and although some tokens found nothing."""
    lm, scores, hits = planted(3000, lmbda=0.4, temperature=300.0)
    scores[::13] = -torch.inf
    tuned = tune(blocks_of(lm, scores, hits))
    assert abs(tuned.lmbda - 0.4) < 0.1
    assert 190 < tuned.temperature < 480
    steps = np.abs(np.log2(tuned.temperatures / tuned.temperature))
    assert np.isclose(steps, 0.25).sum() == 2  # both neighbours were tried
    assert tuned.loss == tuned.losses.min()
    assert tuned.losses.shape == (len(tuned.temperatures), len(tuned.lmbdas))
    assert np.isin([tuned.lmbda], tuned.lmbdas)


def test_tuning_table_equals_direct_computation():
    """Missing neighbours and tokens that found nothing included."""
    lm, scores, hits = planted(1100, lmbda=0.3, temperature=1.0, k=3)
    scores[::7, 1] = -torch.inf
    scores[::11] = -torch.inf
    tuned = tune(blocks_of(lm, scores, hits))
    wide, hits = scores.double().numpy(), (hits & ~scores.isneginf()).numpy()
    for i in (0, len(tuned.temperatures) // 2, len(tuned.temperatures) - 1):
        weights = np.exp(wide / tuned.temperatures[i])
        total = weights.sum(1)
        p_knn = np.divide((weights * hits).sum(1), total, where=total > 0, out=total * 0)
        p_lm = np.exp(lm.double().numpy())
        for j in (0, 1, 40, 99):
            expected = -np.log(tuned.lmbdas[j] * p_knn + (1 - tuned.lmbdas[j]) * p_lm).mean()
            assert tuned.losses[i, j] == pytest.approx(expected, rel=1e-5)


class Counted(list):
    """Blocks that note how often they are gone through to the end."""

    passes = 0

    def __iter__(self):
        yield from super().__iter__()
        self.passes += 1


def test_tuning_reads_its_blocks_three_times():
    blocks = Counted(blocks_of(*planted(200, lmbda=0.4, temperature=2.0), size=50))
    tune(blocks)
    assert blocks.passes == 3
