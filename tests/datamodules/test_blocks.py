"""Blocks against a greedy loop over lines, as fairseq's TokenBlockDataset makes them."""

from itertools import pairwise

import numpy as np
import pytest

from neighborlm.datamodules.blocks import make_batches, make_rows, make_windows

# tokens_per_sample, context_window, max_target_positions
SHAPES = [(1, 0, 1), (8, 0, 8), (8, 7, 8), (12, 5, 12), (12, 5, 30), (8, 0, 4), (500, 100, 900)]


def naive_blocks(line_lengths, mode, tokens_per_sample, context_window):
    """Lengths of the blocks before any is cut or dropped."""
    size = tokens_per_sample - context_window
    if mode == "none":
        total = sum(line_lengths)
        return [min(size, total - start) for start in range(0, total, size)]
    if mode == "eos":
        return list(line_lengths)
    blocks, current = [], 0
    for length in line_lengths:  # fairseq's _get_slice_indices, mode `complete`
        if current and current + length > size:
            blocks.append(current)
            current = 0
        current += length
    return [*blocks, current]


def naive_rows(line_lengths, mode, tokens_per_sample, context_window, max_target_positions):
    """Rows as a list of (context start, start, end)."""
    rows, start = [], 0
    longest = max(max_target_positions, tokens_per_sample - context_window)
    for block in naive_blocks(line_lengths, mode, tokens_per_sample, context_window):
        while block:
            length = min(block, longest)
            context = min(context_window, max(tokens_per_sample - length, 0), start)
            rows.append((start - context, start, start + length))
            start, block = start + length, block - length
    return rows


@pytest.mark.parametrize("mode", ["none", "complete", "eos"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(mode, shape):
    tokens_per_sample, context_window, max_target_positions = shape
    generator = np.random.default_rng(7)
    for lines in (1, 2, 40, 41, 42):
        for longest_line in (1, 6, 40):
            lengths = generator.integers(1, longest_line + 1, lines)
            line_starts = np.concatenate([[0], np.cumsum(lengths)])
            rows = make_rows(line_starts, mode, *shape)
            found = list(
                zip(
                    *(a.tolist() for a in (rows.context_starts, rows.starts, rows.ends)),
                    strict=True,
                )
            )
            assert found == naive_rows(lengths.tolist(), mode, *shape)
            assert {rows.context_starts.dtype, rows.starts.dtype, rows.ends.dtype} == {
                np.dtype(np.int64)
            }

            # What any way of cutting must keep to.
            scored = np.concatenate([np.arange(a, b) for _, a, b in found])
            np.testing.assert_array_equal(scored, np.arange(lengths.sum()))
            assert rows.lengths.max() <= max(tokens_per_sample, max_target_positions)
            assert len(rows) == len(found)
            for begin, start, end in found:
                room = max(tokens_per_sample - (end - start), 0)
                assert start - begin == min(context_window, room, start)
            if mode != "none" and max_target_positions >= longest_line:
                assert {end for _, _, end in found} <= set(line_starts.tolist())


@pytest.mark.parametrize("mode", ["none", "complete", "eos"])
@pytest.mark.parametrize(
    "shape", [(8, 0, 8), (12, 5, 12), (7, 3, 4), (12, 5, 30), (1, 0, 1)], ids=str
)
def test_long_lines_dropped(mode, shape):
    """Rows are those of a text without the long lines, except that offsets count them."""
    tokens_per_sample, context_window, max_target_positions = shape
    longest = max(max_target_positions, tokens_per_sample - context_window)
    lengths = np.random.default_rng(5).integers(1, 25, 60)
    line_starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = make_rows(line_starts, mode, *shape, drop_long_lines=True)

    blocks = naive_blocks(lengths.tolist(), mode, tokens_per_sample, context_window)
    kept, dropped, left, start = [], [], [], 0
    for block in blocks:
        (kept if block <= longest else dropped).extend(range(start, start + block))
        left += [block] * (block <= longest)
        start += block
    assert rows.dropped(start).tolist() == dropped
    assert (len(dropped) > 0) == (mode != "none" and longest < 24)
    assert rows.scored_by(np.arange(len(rows))).tolist() == kept
    np.testing.assert_array_equal(rows.ends - rows.starts, left)
    for number, block in enumerate(left):
        room = max(tokens_per_sample - block, 0)
        begin, start = rows.context_starts[number], rows.starts[number]
        assert start - begin == min(context_window, room, start)
    scored = rows.scored_by(np.array([2, 0]))
    assert scored.tolist() == [kept[i] for r in (2, 0) for i in range(rows.starts[r], rows.ends[r])]


@pytest.mark.parametrize("min_context", [0, 1, 4, 100])
@pytest.mark.parametrize("drop", [False, True])
def test_behind_less_context(min_context, drop):
    lengths = np.random.default_rng(5).integers(1, 25, 60)
    line_starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = make_rows(line_starts, "complete", 12, 5, 12, drop_long_lines=drop)
    offsets = range(line_starts[-1]) if rows.kept is None else rows.kept.tolist()
    expected = [
        offsets[place]
        for begin, start, end in zip(rows.context_starts, rows.starts, rows.ends, strict=True)
        for place in range(start, end)
        if place - begin < min_context
    ]
    assert rows.behind_less_context(min_context).tolist() == expected


def test_a_text_of_long_lines_only():
    rows = make_rows(np.array([0, 9, 18]), "eos", 4, 0, 4, drop_long_lines=True)
    assert len(rows) == 0
    assert rows.dropped(18).tolist() == list(range(18))


def test_lines_without_tokens_make_no_rows():
    """A fairseq data-bin may hold empty lines."""
    line_starts = np.array([0, 0, 3, 3, 5, 5])
    for mode in ("complete", "eos"):
        rows = make_rows(line_starts, mode, 4, 0, 4)
        assert list(zip(rows.starts, rows.ends, strict=True)) == [(0, 3), (3, 5)]
    for drop in (False, True):
        assert len(make_rows(np.array([0]), "complete", 4, 0, 4, drop_long_lines=drop)) == 0


@pytest.mark.parametrize("max_tokens", [1, 7, 40, 64, 10_000])
def test_batches(max_tokens):
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 41, 200)
    order = generator.permutation(200)
    batches = make_batches(lengths, order, max_tokens)
    rows = np.concatenate(batches)
    assert sorted(rows.tolist()) == list(range(200))
    place = np.argsort(order)  # of each row in the given order
    assert all((lengths[a], place[a]) < (lengths[b], place[b]) for a, b in pairwise(rows))
    for batch, following in pairwise(batches):
        assert len(batch) * lengths[batch].max() <= max_tokens or len(batch) == 1
        # Not even one more row would have fitted.
        assert (len(batch) + 1) * lengths[following[0]] > max_tokens
    assert len(batches[-1]) * lengths[batches[-1]].max() <= max_tokens or len(batches[-1]) == 1


def test_no_rows_make_no_batches():
    assert make_batches(np.empty(0, np.int64), np.empty(0, np.int64), 8) == []


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 3), (8, 8), (4, 1)])
def test_windows_are_those_of_knn_transformers(window, stride):
    lengths = np.array([8, 21, 0, 5, 16])
    starts = np.append(0, np.cumsum(lengths))
    expected = []
    for first, length in zip(starts[:-1], lengths, strict=True):
        for i in range(0, length, stride):  # as its run_clm.py walks through a group
            begin, end = max(i + stride - window, 0), min(i + stride, length)
            if max(i, begin + 1) < end:
                expected.append((first + begin + 1, first + max(i, begin + 1), first + end))
    rows = make_windows(starts, window, stride)
    found = zip(rows.context_starts, rows.starts, rows.ends, strict=True)
    assert list(found) == expected
    scored = np.concatenate([np.arange(start, end) for _, start, end in expected])
    assert rows.dropped(50).tolist() == np.delete(np.arange(50), scored).tolist()
