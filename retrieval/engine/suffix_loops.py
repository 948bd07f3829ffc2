"""Compiled loops over a suffix array: the longest suffix of a context that occurs in a text, and
what follows its occurrences there.

A *suffix array* holds the offsets of a text's suffixes in lexicographic order, so that the
occurrences of any phrase are one range of it, found by binary search. Here a phrase's *range* has
only occurrences that are followed by a token: one at the very end of the text comes first in the
phrase's order and is left out.

As in `loops`, nothing is checked, not even an index, and no function of another file is called:
numba looks at this file alone to tell whether the machine code that it keeps is up to date.

Arguments that all functions share: `tokens`, unsigned `[N]`, is the text; `suffixes`, unsigned
`[N]`, its suffix array; `bounds`, int64 `[V + 1]`, where in the array the suffixes begin that start
with each token.
"""

import numpy as np

from neighborlm.retrieval.engine.loops import compiled


@compiled
def match_longest(tokens, suffixes, bounds, text, positions, lengths, begins, ends):
    """Finds the longest suffix of the text before each position that occurs in the tokens.

    The length grows by at most one from a position to the next, and where it does, the range lies
    in the one before: binary search in that takes one token of each suffix. Elsewhere lengths are
    doubled from 1 and then bisected, since with a suffix every shorter one occurs.

    Args:
        text: integers, what positions are offsets into; ids outside the vocabulary match nothing.
        positions: int64 `[n]`, ascending.
        lengths, begins, ends: int64 `[n]`, get the suffix's length and its range.
    """
    for i in range(len(positions)):
        position = positions[i]
        shortest_missing = position + 1
        if i > 0:
            before, length = positions[i - 1], lengths[i - 1]
            if position == before:
                lengths[i], begins[i], ends[i] = length, begins[i - 1], ends[i - 1]
                continue
            shortest_missing = min(position, length + position - before) + 1
            if position == before + 1:
                begin, end = _narrow(
                    tokens, suffixes, begins[i - 1], ends[i - 1], length, np.int64(text[before])
                )
                length += 1
                if begin < end and np.int64(suffixes[begin]) + length == len(tokens):
                    begin += 1
                if begin < end:
                    lengths[i], begins[i], ends[i] = length, begin, end
                    continue
                shortest_missing = length
        length, begin = 0, 0
        while shortest_missing - length > 1:
            trial = max(1, min(2 * length, (length + shortest_missing) // 2))
            found = _find(tokens, suffixes, bounds, text, position - trial, trial)
            if found < 0:
                shortest_missing = trial
            else:
                length, begin = trial, found
        lengths[i], begins[i] = length, begin
        ends[i] = _find_end(tokens, suffixes, bounds, text, position - length, length, begin)


@compiled
def match_last(tokens, suffixes, bounds, text, positions, begins, ends):
    """Finds the ranges of the last one, two, ... tokens before each position.

    Args:
        text: see `match_longest`.
        positions: int64 `[n]`.
        begins, ends: int64 `[n, most]`, get the range of the last j + 1 tokens in column j, an
            empty one where they do not occur or are not there.
    """
    begins[:], ends[:] = 0, 0
    for i in range(len(positions)):
        for length in range(1, min(begins.shape[1], positions[i]) + 1):
            start = positions[i] - length
            begin = _find(tokens, suffixes, bounds, text, start, length)
            if begin < 0:
                break
            begins[i, length - 1] = begin
            ends[i, length - 1] = _find_end(tokens, suffixes, bounds, text, start, length, begin)


@compiled
def count_targets(tokens, suffixes, lengths, begins, ends, targets, counts):
    """Counts the occurrences in each range that are followed by a target.

    Args:
        lengths, begins, ends: int64 `[n]`, of phrases.
        targets: int64 `[n]`.
        counts: int64 `[n]`, to be written.
    """
    for i in range(len(targets)):
        begin, end = _narrow(tokens, suffixes, begins[i], ends[i], lengths[i], targets[i])
        counts[i] = end - begin


@compiled
def summarise_continuations(tokens, suffixes, lengths, begins, ends, distinct, highest):
    """Counts the different tokens that follow each phrase, and how often the most frequent does.

    Args:
        lengths, begins, ends: int64 `[n]`, of phrases.
        distinct, highest: int64 `[n]`, to be written.
    """
    for i in range(len(lengths)):
        distinct[i], highest[i], place = 0, 0, begins[i]
        while place < ends[i]:
            end = _end_of_run(tokens, suffixes, place, ends[i], lengths[i])
            distinct[i] += 1
            highest[i] = max(highest[i], end - place)
            place = end


@compiled
def list_continuations(tokens, suffixes, lengths, begins, ends, ids, counts):
    """Lists the tokens that follow each phrase, ascending, and how often they do.

    Args:
        lengths, begins, ends: int64 `[n]`, of phrases.
        ids, counts: int64 `[n, m]`, to be written where a phrase has a continuation; m is no less
            than any has different ones.
    """
    for i in range(len(lengths)):
        column, place = 0, begins[i]
        while place < ends[i]:
            end = _end_of_run(tokens, suffixes, place, ends[i], lengths[i])
            ids[i, column] = tokens[np.int64(suffixes[place]) + lengths[i]]
            counts[i, column] = end - place
            column, place = column + 1, end


@compiled
def _narrow(tokens, suffixes, begin, end, length, token):
    """The part of a range of phrases of a length that a token follows; empty where none does."""
    low, high = begin, end
    while low < high:
        middle = (low + high) >> 1
        if np.int64(tokens[np.int64(suffixes[middle]) + length]) < token:
            low = middle + 1
        else:
            high = middle
    if low == end or np.int64(tokens[np.int64(suffixes[low]) + length]) != token:
        return low, low
    return low, _end_of_run(tokens, suffixes, low, end, length)


@compiled
def _end_of_run(tokens, suffixes, begin, end, length):
    """Where in a range the suffixes end that have the same token after `length` ones as the suffix
    at `begin`; found by doubling steps, then bisection."""
    token = tokens[np.int64(suffixes[begin]) + length]
    low, step = begin, 1
    while low + step < end and tokens[np.int64(suffixes[low + step]) + length] == token:
        low += step
        step *= 2
    high = min(low + step, end)
    while high - low > 1:
        middle = (low + high) >> 1
        if tokens[np.int64(suffixes[middle]) + length] == token:
            low = middle
        else:
            high = middle
    return high


@compiled
def _find(tokens, suffixes, bounds, text, start, length):
    """Where the range of `text[start : start + length]`, at least one token, begins; -1 where it is
    empty.

    What lies between two suffixes in their order shares with the phrase what both share with it, so
    that is not compared again (Manber and Myers, SIAM J. Computing 1993).
    """
    first = np.int64(text[start])
    if not 0 <= first < len(bounds) - 1:
        return -1
    low, high = bounds[first], bounds[first + 1]
    end, shared_low, shared_high = high, 1, 1
    while low < high:
        middle = (low + high) >> 1
        suffix, shared = np.int64(suffixes[middle]), min(shared_low, shared_high)
        left = min(length, len(tokens) - suffix)
        while shared < left and tokens[suffix + shared] == text[start + shared]:
            shared += 1
        if shared < length and (shared == left or tokens[suffix + shared] < text[start + shared]):
            low, shared_low = middle + 1, shared
        else:
            high, shared_high = middle, shared
    if low == end or shared_high < length:
        return -1
    if np.int64(suffixes[low]) + length == len(tokens):
        low += 1
        if low == end or not _begins_with(tokens, suffixes[low], text, start, length):
            return -1
    return low


@compiled
def _find_end(tokens, suffixes, bounds, text, start, length, begin):
    """Where the range of `text[start : start + length]` ends that begins at `begin`."""
    if length == 0:
        return len(tokens)
    end = bounds[np.int64(text[start]) + 1]
    if length == 1:
        return end
    low, step = begin, 1
    while low + step < end and _begins_with(tokens, suffixes[low + step], text, start, length):
        low += step
        step *= 2
    high = min(low + step, end)
    while high - low > 1:
        middle = (low + high) >> 1
        if _begins_with(tokens, suffixes[middle], text, start, length):
            low = middle
        else:
            high = middle
    return high


@compiled
def _begins_with(tokens, suffix, text, start, length):
    """Whether the suffix of the tokens begins with `text[start : start + length]`."""
    suffix = np.int64(suffix)
    if suffix + length > len(tokens):
        return False
    shared = 0
    while shared < length and tokens[suffix + shared] == text[start + shared]:
        shared += 1
    return shared == length
