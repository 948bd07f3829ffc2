"""Learning rates against fairseq's scheduler, transcribed, and figures worked out by hand."""

import math
from itertools import pairwise

import pytest

from neighborlm.models.schedules import cosine, inverse_sqrt
from neighborlm.models.transformer_lm import TransformerLM

WARM = {"peak": 0.8, "warmup_updates": 40, "warmup_init": 0.1}
ANNEAL = {**WARM, "floor": 0.02, "period": 100}


class FairseqCosine:
    """fairseq/optim/lr_scheduler/cosine_lr_scheduler.py, version 0.9, less its optimiser."""

    def __init__(self, peak, warmup_updates, warmup_init, floor, period, t_mult, shrink):
        self.min_lr, self.max_lr = floor, peak
        self.t_mult, self.period, self.lr_shrink = t_mult, period, shrink
        self.warmup_updates, self.warmup_init_lr = warmup_updates, warmup_init
        self.lr_step = (peak - warmup_init) / warmup_updates if warmup_updates > 0 else 1

    def step_update(self, num_updates):
        if num_updates < self.warmup_updates:
            return self.warmup_init_lr + num_updates * self.lr_step
        curr_updates = num_updates - self.warmup_updates
        if self.t_mult != 1:
            i = math.floor(
                math.log(1 - curr_updates / self.period * (1 - self.t_mult), self.t_mult)
            )
            t_i = self.t_mult**i * self.period
            t_curr = curr_updates - (1 - self.t_mult**i) / (1 - self.t_mult) * self.period
        else:
            i = math.floor(curr_updates / self.period)
            t_i = self.period
            t_curr = curr_updates - (self.period * i)
        lr_shrink = self.lr_shrink**i
        min_lr = self.min_lr * lr_shrink
        max_lr = self.max_lr * lr_shrink
        return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * t_curr / t_i))


@pytest.mark.parametrize("warmup_updates", [0, 40])
@pytest.mark.parametrize("t_mult", [1, 2, 1.5])
@pytest.mark.parametrize("shrink", [1, 0.75])
def test_cosine_is_fairseqs(warmup_updates, t_mult, shrink):
    settings = {
        **ANNEAL,
        "warmup_updates": warmup_updates,
        "t_mult": t_mult,
        "shrink": shrink,
    }
    theirs = FairseqCosine(**settings)
    for update in range(0, 1000):
        assert cosine(update, **settings) == pytest.approx(theirs.step_update(update), abs=1e-12)


@pytest.mark.parametrize(
    ("update", "rate"),
    [
        (0, 0.1),
        (20, 0.45),
        (40, 0.8),
        (65, 0.41 + 0.39 * math.sqrt(0.5)),
        (90, 0.41),
        (140, 0.4),  # the second period: 200 updates, from 0.4 to 0.01
        (240, 0.205),
        (340, 0.2),  # the third
    ],
)
def test_cosine_by_hand(update, rate):
    assert cosine(update, **ANNEAL, t_mult=2, shrink=0.5) == pytest.approx(rate)


def test_cosine_starts_anew_where_fairseqs_logarithm_rounds_down():
    """math.log(243, 3) is 4.999…: fairseq gives the floor for that one update."""
    settings = {**ANNEAL, "warmup_updates": 0, "period": 10, "t_mult": 3, "shrink": 1}
    restarts = [0, 10, 40, 130, 400, 1210]
    assert [cosine(update, **settings) for update in restarts] == pytest.approx([0.8] * 6)
    assert cosine(1209, **settings) == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("t_mult", [1, 2])
def test_cosine_jumps_nowhere_but_at_restarts(t_mult):
    rates = [cosine(u, **ANNEAL, t_mult=t_mult, shrink=0.5) for u in range(500)]
    restarts = [b for b in range(1, 500) if rates[b] > rates[b - 1] and b > 40]
    assert restarts == ([140, 340] if t_mult == 2 else [140, 240, 340, 440])
    for number, restart in enumerate(restarts):
        assert rates[restart] == pytest.approx(0.8 * 0.5 ** (number + 1))
        assert rates[restart - 1] == pytest.approx(0.02 * 0.5**number, rel=0.03)
    steps = [abs(b - a) for u, (a, b) in enumerate(pairwise(rates)) if u + 1 not in restarts]
    assert max(steps) < 0.02


def test_inverse_sqrt():
    rates = [inverse_sqrt(u, **WARM) for u in range(400)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[20] == pytest.approx(0.45)
    assert rates[40] == pytest.approx(0.8)
    assert rates[160] == pytest.approx(0.4)
    assert rates[360] == pytest.approx(0.8 / 3)
    assert max(abs(b - a) for a, b in pairwise(rates)) < 0.02
    assert inverse_sqrt(0, peak=0.8, warmup_updates=0, warmup_init=0.1) == 0.8


@pytest.mark.parametrize("optimizer", ["nag", "adam"])
@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("cosine", 0.02 + 0.39 * (1 + math.cos(math.pi * 3 / 6))),
        ("inverse_sqrt", 0.8 * (4 / 7) ** 0.5),
        ("constant", 0.8),
    ],
)
def test_the_optimiser_follows_the_schedule(optimizer, schedule, after):
    model = TransformerLM(
        *(8, 4, 4, 1, 1),
        optimizer=optimizer,
        schedule=schedule,
        lr=0.8,
        warmup_updates=4,
        warmup_init_lr=0.1,
        min_lr=0.02,
        lr_period_updates=6,
    )
    configured = model.configure_optimizers()
    scheduler = configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(8):
        rates += [group["lr"] for group in configured["optimizer"].param_groups]
        configured["optimizer"].step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.1, 0.275, 0.45, 0.625, 0.8])
    assert rates[7] == pytest.approx(after)
    assert configured["lr_scheduler"]["interval"] == "step"
