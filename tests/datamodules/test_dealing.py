"""How the batches of a split are shared out to ranks."""

import numpy as np
import pytest

from neighborlm.datamodules import dealing
from neighborlm.datamodules.blocks import make_batches, make_rows
from neighborlm.datamodules.dealing import DealtBatches, PartOfText


def dealt(sampler: DealtBatches | PartOfText, ranks: int, monkeypatch) -> list[list[list[int]]]:
    """Every rank's batches of row numbers."""
    of_ranks = []
    for rank in range(ranks):
        monkeypatch.setattr(dealing, "rank_and_ranks", lambda rank=rank: (rank, ranks))
        of_ranks.append([batch.tolist() for batch in sampler])
        assert len(sampler) == len(of_ranks[-1])
    assert len({len(batches) for batches in of_ranks}) == 1
    return of_ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_evaluation_is_dealt_without_repeats(ranks, monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 9, 31)  # seven batches
    batches = [batch.tolist() for batch in make_batches(lengths, np.arange(31), 27)]
    assert len(batches) == 7
    of_ranks = dealt(DealtBatches(lengths, 27), ranks, monkeypatch)
    in_order = [batch for step in zip(*of_ranks, strict=True) for batch in step]
    assert in_order[: len(batches)] == batches
    assert in_order[len(batches) :] == [[]] * (-len(batches) % ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_training_is_dealt_whole(ranks, monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 9, 31)  # seven batches
    alone = dealt(DealtBatches(lengths, 27, shuffle_seed=5), 1, monkeypatch)[0]
    of_ranks = dealt(DealtBatches(lengths, 27, shuffle_seed=5), ranks, monkeypatch)
    in_order = [batch for step in zip(*of_ranks, strict=True) for batch in step]
    assert sorted(np.concatenate(alone)) == list(range(31))
    assert in_order[: len(alone)] == alone
    assert in_order[len(alone) :] == alone[: -len(alone) % ranks]


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("warm_up", [0, 1, 30, 10_000])
def test_parts_of_a_text_join_behind_their_warm_up(warm_up, drop, monkeypatch):
    """Rows as the data module makes them, also where some lines are neither scored nor read."""
    line_starts = np.append(0, np.cumsum(np.random.default_rng(1).integers(1, 12, 40)))
    rows = make_rows(line_starts, "eos", 14, 5, 9, drop_long_lines=drop)
    assert (rows.kept is not None) == drop
    batches = [
        batch.tolist() for batch in make_batches(rows.lengths, np.arange(len(rows)), 27, False)
    ]
    scored = [rows.scored_by(np.array(batch)) for batch in batches]
    for ranks in (1, 2, 3, len(batches) + 2):
        sampler, found, sizes = PartOfText(rows, 27, warm_up), [], []
        for rank, of_rank in enumerate(dealt(sampler, ranks, monkeypatch)):
            mine = [batch for batch in of_rank if batch]
            if not mine:
                continue
            start = batches.index(mine[0])
            assert mine == batches[start : start + len(mine)]
            position = sampler.first_position(rank, ranks)
            before = [
                offsets for offsets in scored[start : start + len(mine)] if offsets[0] < position
            ]
            first = start + len(before)
            assert scored[first][0] == position  # a batch is of the warm-up or of the part
            assert sum(map(len, before)) >= warm_up or start == 0
            assert sum(map(len, before[1:])) < max(
                warm_up, 1
            )  # and it is no longer than it must be
            found += batches[first : start + len(mine)]
            sizes.append(sum(map(len, scored[first : start + len(mine)])))
        assert found == batches
        if ranks <= 3:
            assert max(sizes) - min(sizes) <= 2 * max(map(len, scored))
