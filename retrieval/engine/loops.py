"""Loops over numbers, compiled when they first run and kept beside this file.

numpy goes through memory once for every step of a computation; a compiled loop takes all steps
while a number is in a register. Other threads run meanwhile.

All are in this file: numba tells by it alone, its time and size, whether what was kept is still
what the file says, and would not see that a function elsewhere has changed. Nothing is checked, an
index is not either; `NUMBA_BOUNDSCHECK=1` with an empty `NUMBA_CACHE_DIR` has them checked.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numba import njit
from numba.extending import register_jitable

FARTHEST = np.finfo(np.float32).max
"""The distance of missing neighbours."""
SMALLEST = np.float32(2**-100)
"""The largest number of a vector counts as no less, so that one over its scale is finite."""
LOG2_E = 1.4426950408889634
LIGHTEST = np.float32(-80)
"""Logarithm of the least weight, relative to the largest: no sum in fp32 changes by those below it,
whose exponentials would take many times as long."""
SMALL = np.float32(-50)
"""Logarithm of what all hits weigh, below which `LIGHTEST` is not light beside it."""


def compiled(function: Callable, **options) -> Callable:
    """The function, of arrays and numbers, as machine code.

    Args:
        options: see `numba.njit`.
    """
    try:
        return njit(function, nogil=True, cache=True, **options)
    except RuntimeError:  # nothing can be kept here, nor among the user's own files
        return njit(function, nogil=True, **options)


summing = partial(compiled, fastmath={"reassoc", "contract"})
"""For sums: the order of their terms is the compiler's, so that it can add several at a time."""


# The smallest numbers of a row


@compiled
def choose_of_rows(values, columns):
    """Finds the smallest of each row of fp32 `[n, w]`: their columns, int64 `[n, k]`."""
    k = columns.shape[1]
    chosen = np.empty(values.shape[1], dtype=np.int32)
    for i in range(len(values)):
        choose(values[i], k, chosen)
        columns[i] = chosen[:k]


@compiled
def choose(row, k, chosen):
    """Finds the k smallest of a row; of those that equal the k-th the first.

    Args:
        row: fp32 `[w]`; where it has NaN, some k of it are chosen.
        k: at most w.
        chosen: int32, at least `[w]`; gets their k columns, in ascending order.
    """
    if k == 0:
        return
    if k == len(row):
        for j in range(k):
            chosen[j] = j
        return
    limit = kth_smallest(row, k)
    if _choose_up_to(row, limit, chosen) != k:
        _choose_equals(row, k, limit, chosen)


@compiled
def _choose_up_to(row, limit, chosen):
    """The columns of those that are not above the limit, and how many they are."""
    n = 0
    for j in range(len(row)):  # without a branch, which nobody could predict
        chosen[n] = j
        n += row[j] <= limit
    return n


@compiled
def _choose_equals(row, k, limit, chosen):
    """As `choose`, where others equal the k-th smallest, which is the limit."""
    equal = k
    for j in range(len(row)):
        equal -= row[j] < limit
    n = 0
    for j in range(len(row)):
        below = row[j] < limit
        if n < k and (below or (equal > 0 and not row[j] > limit)):
            chosen[n] = j
            n += 1
            equal -= not below


@compiled
def kth_smallest(row, k):
    """A number that just k of a row do not exceed, or the k-th smallest where others equal it.

    Looks for a zero of how many numbers are below, less k: by straight lines between two ends (the
    Illinois method; Dowell and Jarratt, BIT 1971), and by halving the range of bits where that
    fails. To count what is below a number takes a processor a small part of the time that moving
    numbers takes.

    Args:
        row: fp32 `[w]`, without NaN.
        k: from 1 to w.
    """
    low, high = _extremes(row)
    if k == len(row):
        return _number(high)
    low -= 1
    lacking, left_over = np.float64(k), np.float64(len(row) - k)
    steps, moved = 0, 0
    while high - low > 1:
        middle = (low + high) >> 1
        steps += 1
        if steps % 4:
            begin, end = np.float64(_number(low)), np.float64(_number(high))
            guess = begin + (end - begin) * (lacking / (lacking + left_over))
            bits = np.int64(ascending(np.float32(guess).view(np.int32)))
            if low < bits < high:  # so it is a number
                middle = bits
        n = _count(row, _number(middle))
        if n == k:
            return _number(middle)
        if n > k:
            high, left_over = middle, np.float64(n - k)
            lacking *= 0.5 if moved > 0 else 1.0
            moved = 1
        else:
            low, lacking = middle, np.float64(k - n)
            left_over *= 0.5 if moved < 0 else 1.0
            moved = -1
    return _number(high)


@compiled
def _extremes(row):
    """The smallest and the largest number of a row, as ascending bits."""
    bits = row.view(np.int32)
    low = high = ascending(bits[0])
    for j in range(len(bits)):
        here = ascending(bits[j])
        low = np.int32(min(low, here))
        high = np.int32(max(high, here))
    return np.int64(low), np.int64(high)


@compiled
def _count(row, limit):
    n = np.int32(0)
    for j in range(len(row)):
        n = np.int32(n + np.int32(row[j] <= limit))
    return n


@compiled
def _number(bits):
    return np.int32(ascending(np.int32(bits))).view(np.float32)


@register_jitable
def ascending(bits):
    """Bits of fp32 numbers as int32 of the same order, and back: for negative numbers they would
    ascend with the size."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


# Lists and what they hold


@compiled
def choose_lists(far, fewest, slack, columns):
    """Chooses those that are no more than `slack` farther than the nearest one, or at least the
    `fewest` nearest, and at most as many as there is room for.

    Args:
        far: fp32 `[n, lists]`, without NaN.
        columns: int64 `[n, most]`, to be written, the nearest one first; -1 where there are fewer.
    """
    most = columns.shape[1]
    chosen = np.empty(far.shape[1], dtype=np.int32)
    for i in range(len(far)):
        row = far[i]
        limit = np.float32(_number(_extremes(row)[0]) + slack)
        n = max(_count(row, limit), np.int32(fewest))
        if n > most or n == fewest:
            n = min(n, np.int32(most))
            choose(row, n, chosen)
        else:
            _choose_up_to(row, limit, chosen)
        nearest = 0
        for j in range(most):
            columns[i, j] = chosen[j] if j < n else -1
            if j < n and row[chosen[j]] < row[chosen[nearest]]:
                nearest = j
        columns[i, 0], columns[i, nearest] = columns[i, nearest], columns[i, 0]


@compiled
def lay_out(lists, sizes):
    """Puts the visits to each list together, and the distances that they give one after another.

    Args:
        lists: int64 `[Q, probes]`; visits to lists without vectors are left out.
        sizes: int64 `[nlist]`, vectors of each list.

    Returns:
        the queries that visit the first list, then those of the next one, int64; where each list's
        begin, and the last one's end, int64 `[nlist + 1]`; where the distances that a list gives
        begin, a row for each of its visitors, int64 `[nlist]`; and where those of each visit,
        int64 `[Q, probes]`.
    """
    bounds = np.zeros(len(sizes) + 1, dtype=np.int64)
    begins = np.zeros(len(sizes), dtype=np.int64)
    for number in lists.ravel():
        bounds[number + 1] += sizes[number] > 0
    for number in range(1, len(sizes)):
        begins[number] = begins[number - 1] + bounds[number] * sizes[number - 1]
        bounds[number] += bounds[number - 1]
    bounds[-1] += bounds[-2]
    visitors = np.empty(bounds[-1], dtype=np.int64)
    rows = np.zeros(lists.shape, dtype=np.int64)
    visited, row = bounds.copy(), begins.copy()
    for i in range(lists.shape[0]):
        for j in range(lists.shape[1]):
            number = lists[i, j]
            rows[i, j] = row[number]
            row[number] += sizes[number]
            if sizes[number] > 0:
                visitors[visited[number]] = i
                visited[number] += 1
    return visitors, bounds, begins, rows


@summing
def shift_halves(halves, begins, step, bounds, shifts, vectors, squares):
    """Adds something to the half-precision vectors of some lists.

    Args:
        halves: uint16, bits of all that a file has.
        begins: int64 `[lists]`, where the first vector of each begins.
        step: from there to the next one.
        bounds, shifts, vectors, squares: as `shift_lists`.
    """
    d = shifts.shape[1]
    for number in range(len(shifts)):
        first, end = bounds[number], bounds[number + 1]
        at = begins[number]
        for i in range(first, end):
            squares[i] = _shift_half(halves[at : at + d], shifts[number], vectors[i])
            at += step


@summing
def _shift_half(halves, shift, vector):
    """As `shift_halves`, of one vector; its squared length."""
    square = np.float32(0)
    for j in range(len(halves)):
        vector[j] = _number_of_half(halves[j]) + shift[j]
        square += vector[j] * vector[j]
    return square


@register_jitable
def _number_of_half(half):
    """The number of which `half` are the bits, uint16."""
    half = np.int32(half)
    bits = np.int32(np.int32(half & np.int32(0x7FFF)) << np.int32(13))
    finite = bits.view(np.float32) * np.float32(2.0**112)  # exponents have another middle
    other = np.int32(bits | np.int32(0x7F800000)).view(np.float32)
    number = finite if bits < np.int32(0x0F800000) else other
    return number if half < np.int32(0x8000) else -number


@summing
def shift_lists(stored, bounds, shifts, vectors, squares):
    """Adds something to what is stored in some lists.

    Args:
        stored: fp32 `[n, d]`.
        bounds: int64 `[lists + 1]`, where each list's begin, and the last one's end.
        shifts: fp32 `[lists, d]`, of each.
        vectors: fp32 `[n, at least d]`, gets the sums.
        squares: fp32 `[n]`, gets their squared lengths.
    """
    for number in range(len(shifts)):
        of_list = shifts[number]
        for i in range(bounds[number], bounds[number + 1]):
            here, vector = stored[i], vectors[i]
            square = np.float32(0)
            for j in range(len(here)):
                vector[j] = here[j] + of_list[j]
                square += vector[j] * vector[j]
            squares[i] = square


# What a query visits


@compiled
def measure_halves(halves, begins, sizes, queries, numbers, similar, rows, buffer):
    """Measures how far queries are from the half-precision vectors of lists.

    Args:
        halves: uint16, bits of all that a file has.
        begins, sizes: int64 `[visits]`, where the first vector of a list begins there, and how
            many there are.
        queries: fp32 `[Q, d]`.
        numbers: int64 `[visits]`, which of them visits the list.
        similar: whether to write negative products, not squared distances.
        rows: int64 `[visits]`, where the list's distances begin in the buffer.
        buffer: fp32, to be written.
    """
    d = queries.shape[1]
    for visit in range(len(begins)):
        query, at = queries[numbers[visit]], begins[visit]
        row = buffer[rows[visit] : rows[visit] + sizes[visit]]
        # In place of an infinite half there is 2**16 or more, 2**15 away from the query.
        is_small = not similar and np.abs(query).max() <= np.float32(2**15)
        for j in range(len(row)):
            vector = halves[at : at + d]
            if similar:
                row[j] = -_product(vector, query)
            else:
                row[j] = _distance_to_finite(vector, query) if is_small else np.float32(np.inf)
                if row[j] >= np.float32(2**30):
                    row[j] = _squared_distance(vector, query)
            at += d


@summing
def _product(halves, query):
    found = np.float32(0)
    for j in range(len(query)):
        found += _number_of_half(halves[j]) * query[j]
    return found


@summing
def _distance_to_finite(halves, query):
    """As `_squared_distance`, in two thirds of the time."""
    found = np.float32(0)
    for j in range(len(query)):
        half = np.int32(np.int16(halves[j]))
        bits = np.int32(np.int32(half << np.int32(13)) & np.int32(0x8FFFE000 - 2**32))
        difference = bits.view(np.float32) * np.float32(2.0**112) - query[j]
        found += difference * difference
    return found


@summing
def _squared_distance(halves, query):
    found = np.float32(0)
    for j in range(len(query)):
        difference = _number_of_half(halves[j]) - query[j]
        found += difference * difference
    return found


@compiled
def _gather(buffer, rows, sizes, distances):
    """Writes the distances of a query to the vectors of all lists it visits one after another,
    infinite where they are no numbers.

    Args:
        buffer: fp32.
        rows, sizes: int64 `[probes]`, where those to a list begin in the buffer, and how many.
        distances: fp32 `[sum of sizes]`.
    """
    n = 0
    for visit in range(len(rows)):
        row = buffer[rows[visit] : rows[visit] + sizes[visit]]
        place = distances[n : n + len(row)]
        for j in range(len(row)):
            place[j] = row[j] if row[j] == row[j] else np.float32(np.inf)
        n += len(row)


@compiled
def farthest_of_visits(buffer, rows, sizes, k, distances):
    """Finds a distance that the k nearest of some queries do not exceed, fp32 `[n]`; infinite where
    there are fewer.

    Args:
        buffer, rows, sizes: fp32, int64 and int64 `[n, probes]`, see `_gather`.
    """
    for i in range(len(rows)):
        found = np.empty(sizes[i].sum(), dtype=np.float32)
        _gather(buffer, rows[i], sizes[i], found)
        distances[i] = kth_smallest(found, k) if 0 < k <= len(found) else np.inf


@compiled
def nearest_of_visits(buffer, rows, sizes, ids_at, ids_of_lists, lengths, distances, ids):
    """Finds the k nearest of some queries.

    Args:
        buffer, rows, sizes: fp32, int64 and int64 `[n, probes]`, see `_gather`.
        ids_at: int64 `[n, probes]`, where the ids of a list's vectors begin among all.
        ids_of_lists: int64, of all lists.
        lengths: fp32 `[n]`, to be added to distances.
        distances, ids: fp32 and int64 `[n, k]`, to be written; `FARTHEST` and -1 where missing.
    """
    k = distances.shape[1]
    for i in range(len(rows)):
        found = np.empty(sizes[i].sum(), dtype=np.float32)
        chosen = np.empty(len(found), dtype=np.int32)
        _gather(buffer, rows[i], sizes[i], found)
        n = min(k, len(found))
        choose(found, n, chosen)
        for j in range(n):
            distances[i, j] = found[chosen[j]] + lengths[i]
        j = begin = 0
        for visit in range(sizes.shape[1]):
            first = ids_at[i, visit] - begin
            begin += sizes[i, visit]
            while j < n and chosen[j] < begin:
                ids[i, j] = ids_of_lists[chosen[j] + first]
                j += 1
        distances[i, n:] = np.inf
        for j in range(k):
            if distances[i, j] == np.inf:
                distances[i, j], ids[i, j] = FARTHEST, -1


@compiled
def votes_of_visits(
    buffer,
    rows,
    sizes,
    values_at,
    values_of_lists,
    counts_of_lists,
    lengths,
    least,
    targets,
    k,
    temperature,
    log_probs,
    nearest,
    farthest,
):
    """What the k nearest of some queries say of their targets.

    Neighbours are neither put together nor looked up: all that is visited gets a weight, zero if it
    is not among the k, and weights are added up where they are.

    Args:
        buffer, rows, sizes: fp32, int64 and int64 `[n, probes]`, see `_gather`.
        values_at: int64 `[n, probes]`, where the values of a list's vectors begin among all.
        values_of_lists: int32, of all lists.
        counts_of_lists: fp32, for how many entries each stands; empty where each is one.
        lengths: fp32 `[n]`, to be added to distances.
        least: fp32, no distance is less.
        targets: int32 `[n]`.
        k: neighbours.
        temperature: fp32, of the weights.
        log_probs, nearest, farthest: fp32 `[n]` each, to be written, see `contracts.Votes`.
    """
    for i in range(len(rows)):
        log_probs[i], nearest[i], farthest[i] = -np.inf, -np.inf, np.inf
        found = np.empty(sizes[i].sum(), dtype=np.float32)
        if len(found) == 0:
            continue
        _gather(buffer, rows[i], sizes[i], found)
        n = min(k, len(found))
        limit = min(kth_smallest(found, n), FARTHEST)
        if _count(found, limit) > n:
            _leave_out_equals(found, n, limit)
        low, high = _ends(found, limit)
        if low > limit:  # none is a number
            continue
        nearest[i] = -max(low + lengths[i], least)
        farthest[i] = -max(high + lengths[i], least)
        of_lists = (sizes[i], values_at[i], values_of_lists, counts_of_lists)
        log_probs[i] = _log_prob(found, limit, low, *of_lists, targets[i], temperature)


@compiled
def votes_of_neighbors(
    distances, rows, values, counts, similar, targets, temperature, log_probs, nearest, farthest
):
    """What neighbours that have been put together say of their queries' targets.

    Args:
        distances: fp32 `[n, k]`.
        rows: int64 `[n, k]`, -1 where missing.
        values: int32 `[n, k]`.
        counts: fp32 `[n, k]`, for how many entries each stands; `[n, 0]` where each is one.
        similar: whether large is near.
        targets: int32 `[n]`.
        temperature: fp32, of the weights.
        log_probs, nearest, farthest: fp32 `[n]` each, to be written, see `contracts.Votes`.
    """
    k = distances.shape[1]
    one_list, from_the_first = np.array([k]), np.array([0])
    found = np.empty(k, dtype=np.float32)
    for i in range(len(distances)):
        log_probs[i], nearest[i], farthest[i] = -np.inf, -np.inf, np.inf
        for j in range(k):
            distance = -distances[i, j] if similar else distances[i, j]
            there = rows[i, j] >= 0 and distance == distance
            found[j] = distance if there else np.float32(np.inf)
        low, high = _ends(found, FARTHEST)
        if not low <= FARTHEST:  # all are missing
            continue
        nearest[i], farthest[i] = -low, -high
        of_list = (one_list, from_the_first, values[i], counts[i])
        log_probs[i] = _log_prob(found, FARTHEST, low, *of_list, targets[i], temperature)


@compiled
def _log_prob(
    row, limit, nearest, sizes, values_at, values_of_lists, counts_of_lists, target, temperature
):
    """log p_kNN of a target (Khandelwal et al., ICLR 2020, eq. 2): the logarithm of what its hits
    weigh, less that of what all weigh. One that stands for several entries weighs as much as they.

    Args:
        row: fp32, distances; those above the limit have no part. Is overwritten.
        limit: fp32.
        nearest: fp32, the smallest distance, relative to which all are weighed.
        sizes, values_at, values_of_lists, counts_of_lists: see `votes_of_visits`.
        target: int32.
        temperature: fp32.
    """
    weights = np.empty_like(row)
    _weigh(row, limit, nearest, temperature, weights)
    _multiply_lists(weights, sizes, values_at, counts_of_lists)
    total, of_hits = _add_up_lists(weights, sizes, values_at, values_of_lists, target)
    if of_hits <= 0:
        return np.float32(-np.inf)
    result = np.float32(np.log(of_hits) - np.log(total))
    if result < SMALL:  # relative to the nearest hit they can be told apart
        first = _leave_out_others(row, sizes, values_at, values_of_lists, target, limit)
        _weigh(row, limit, first, temperature, weights)
        _multiply_lists(weights, sizes, values_at, counts_of_lists)
        of_hits, _ = _add_up_lists(weights, sizes, values_at, values_of_lists, target)
        result = np.float32((nearest - first) / temperature + np.log(of_hits) - np.log(total))
    return result


@compiled
def _leave_out_equals(row, k, limit):
    """Makes those that equal the k-th smallest infinite, except for the first."""
    left = k
    for j in range(len(row)):
        left -= row[j] < limit
    for j in range(len(row)):
        if row[j] == limit:
            if left == 0:
                row[j] = np.inf
            else:
                left -= 1


@compiled
def _ends(row, limit):
    """The smallest number of a row, and the largest that is not above the limit."""
    bits = row.view(np.int32)
    low, high = np.int32(2**31 - 1), np.int32(-(2**31))
    for j in range(len(bits)):
        here = ascending(bits[j])
        low = np.int32(min(low, here))
        high = np.int32(max(high, here if row[j] <= limit else np.int32(-(2**31))))
    return _number(low), _number(high)


@partial(compiled, fastmath={"contract"})
def _weigh(row, limit, nearest, temperature, weights):
    """What distances weigh, e^((nearest - distance) / temperature), and zero above the limit.

    2^x is 2^n 2^r with a whole n and r within a half of zero, for which a polynomial of degree six
    is right to the last digits (coefficients: Cephes, Moshier 1989).
    """
    scale, least = np.float32(LOG2_E / temperature), np.float32(LOG2_E * LIGHTEST)
    for j in range(len(row)):
        x = (nearest - row[j]) * scale
        x = x if x > least else least
        n = np.int32(x - np.float32(0.5))  # cut off: x is not positive
        r = x - np.float32(n)
        series = np.float32(1.535336188319500e-4) * r + np.float32(1.339887440266574e-3)
        series = series * r + np.float32(9.618437357674640e-3)
        series = series * r + np.float32(5.550332471162809e-2)
        series = series * r + np.float32(2.402264791363012e-1)
        series = series * r + np.float32(6.931472028550421e-1)
        power = np.int32(np.int32(n + np.int32(127)) << np.int32(23)).view(np.float32)
        weight = (series * r + np.float32(1)) * power
        weights[j] = weight if row[j] <= limit else np.float32(0)


@compiled
def _multiply_lists(weights, sizes, values_at, counts_of_lists):
    """Multiplies weights by the counts of their entries, if there are any, see `votes_of_visits`.
    No count is so large that `LIGHTEST` would be seen beside `SMALL`: it has 32 bits."""
    if len(counts_of_lists) == 0:
        return
    begin = 0
    for visit in range(len(sizes)):
        at = values_at[visit] - begin
        for j in range(begin, begin + sizes[visit]):
            weights[j] *= counts_of_lists[at + j]
        begin += sizes[visit]


@compiled
def _add_up_lists(weights, sizes, values_at, values_of_lists, target):
    """Sums of all weights, and of those of the target's value, see `votes_of_visits`."""
    total = of_hits = np.float32(0)
    begin = 0
    for visit in range(len(sizes)):
        at, end = values_at[visit], begin + sizes[visit]
        found = _add_up(weights[begin:end], values_of_lists[at : at + sizes[visit]], target)
        total += found[0]
        of_hits += found[1]
        begin = end
    return total, of_hits


@summing
def _add_up(weights, values, target):
    total = of_hits = np.float32(0)
    for j in range(len(weights)):
        total += weights[j]
        of_hits += weights[j] * np.float32(values[j] == target)
    return total, of_hits


@compiled
def _leave_out_others(row, sizes, values_at, values_of_lists, target, limit):
    """Makes all infinite whose value is not the target's; gives the nearest of those that are, if
    it is not above the limit."""
    nearest = np.float32(np.inf)
    begin = 0
    for visit in range(len(sizes)):
        at = values_at[visit] - begin
        for j in range(begin, begin + sizes[visit]):
            if values_of_lists[at + j] != target:
                row[j] = np.inf
            elif row[j] <= limit:
                nearest = min(nearest, row[j])
        begin += sizes[visit]
    return nearest


# What is nearer than a bound


@summing
def round_to_bytes(vectors, rounded):
    """Rounds vectors fp32 `[m, d]` to int8 `[m, d]` times a scale of each.

    Returns:
        fp32 `[4, m]`: the scale, the length of the rounded vector, of the error, and of the vector.
        Where it is not finite the error is infinite, and the rest zero.
    """
    result = np.zeros((4, len(vectors)), dtype=np.float32)
    for i in range(len(vectors)):
        vector, whole = vectors[i], rounded[i]
        bits, of_largest = vector.view(np.int32), np.int32(0)
        for j in range(len(bits)):  # without the sign they ascend with the size
            of_largest = max(of_largest, np.int32(bits[j] & np.int32(0x7FFFFFFF)))
        largest = np.int32(of_largest).view(np.float32)
        if not largest < np.inf:
            whole[:] = 0
            result[2, i] = np.inf
            continue
        scale = max(largest, SMALLEST) / np.float32(127)
        inverse = np.float32(1) / scale
        length = off = of_rounded = np.float32(0)  # in units of the scale, none is too small
        for j in range(len(vector)):
            number = vector[j] * inverse
            steps = np.int32(np.int32(number + np.float32(128.5)) - np.int32(128))
            whole[j] = steps
            near = np.float32(steps)
            length += number * number
            of_rounded += near * near
            off += (number - near) * (number - near)
        result[0, i], result[1, i] = scale, scale * of_rounded**0.5
        result[2, i], result[3, i] = scale * off**0.5, scale * length**0.5
    return result


@summing
def keep(
    products,
    of_queries,
    of_vectors,
    who,
    queries,
    vectors,
    bounds,
    similar,
    at,
    kept_queries,
    kept_places,
    kept_distances,
    n,
):
    """Computes the distances of what may be near, and keeps those below the bounds.

    Args:
        products: fp32 or int32 `[q, m]`.
        of_queries, of_vectors: fp32 `[q, 4]` and `[4, m]`, what the products stand for, see
            `sieve.Numbers`.
        who: int64 `[q]`, the queries.
        queries, vectors: fp32 `[Q, d]` and `[m, d]`.
        bounds: fp32 `[Q]`.
        similar: whether large products are near.
        at: the place of the first vector.
        kept_queries, kept_places, kept_distances: see `sieve.Kept`; with room for all q m.
        n: how many there are already.

    Returns:
        how many there are then, and how many distances were computed.
    """
    width = products.shape[1]
    scales, lengths = of_vectors[0], of_vectors[1]
    errors, squares = of_vectors[2], of_vectors[3]
    below = np.zeros((width + 7) // 8 * 8, dtype=np.uint8)
    eights = below.view(np.uint64)  # of which most are zero
    near = np.empty(len(below), dtype=np.int32)
    computed = 0
    for i in range(len(who)):
        row = products[i]
        scale, length = of_queries[i, 0], of_queries[i, 1]
        error, limit = of_queries[i, 2], of_queries[i, 3]
        for j in range(width):
            least = squares[j] - error * lengths[j] - length * errors[j]
            # What is no number may be near.
            below[j] = not (np.float32(row[j]) * scales[j] * scale + least >= limit)
        some = 0
        for eight in range(len(eights)):
            if eights[eight]:
                for j in range(8 * eight, 8 * eight + 8):
                    near[some] = j
                    some += below[j]
        computed += some
        query, bound = who[i], bounds[who[i]]
        for number in range(some):  # no function of its own: arrays as arguments cost more than it
            vector = near[number]
            distance = np.float32(0)
            if similar:
                for j in range(queries.shape[1]):
                    distance -= queries[query, j] * vectors[vector, j]
            else:
                for j in range(queries.shape[1]):
                    difference = queries[query, j] - vectors[vector, j]
                    distance += difference * difference
            kept_queries[n], kept_places[n], kept_distances[n] = query, at + vector, distance
            n += distance < bound
    return n, computed


@compiled
def sort_by_query(queries, places, distances, free, places_of_rows, distances_of_rows):
    """Writes what was kept to rows of the queries.

    Args:
        queries: int32 `[n]`.
        places, distances: int64 and fp32, at least `[n]`.
        free: int64 `[Q]`, where the next of each query's row is; is counted up.
        places_of_rows, distances_of_rows: int64 and fp32, all rows.
    """
    for i in range(len(queries)):
        place = free[queries[i]]
        places_of_rows[place], distances_of_rows[place] = places[i], distances[i]
        free[queries[i]] += 1


@compiled
def nearest_of_kept(distances, places, rows, counts, ids_of_lists, nearest, ids):
    """Finds the k nearest of some queries.

    Args:
        distances, places: fp32 and int64, of all rows.
        rows, counts: int64 `[n]`, where a query's row begins, and how many are in it; at least k.
        ids_of_lists: int64.
        nearest, ids: fp32 and int64 `[n, k]`, to be written.
    """
    k = nearest.shape[1]
    chosen = np.empty(counts.max(), dtype=np.int32)
    for i in range(len(rows)):
        row = distances[rows[i] : rows[i] + counts[i]]
        choose(row, k, chosen)
        for j in range(k):
            nearest[i, j] = row[chosen[j]]
            ids[i, j] = ids_of_lists[places[rows[i] + chosen[j]]]


# Neighbours


@summing
def distances_of_pairs(pairs, bits, first, k, rows, keys, queries, squared, distances):
    """Writes the distances of some neighbours of a part.

    Args:
        pairs: int64, row and place in the part of each neighbour, in ascending order.
        bits: how many of a pair's are the place.
        first: the place of the part's first neighbour among those of all queries.
        k: neighbours of a query.
        rows, keys: int64 `[n]`, ascending, all that the neighbours are, and fp32 `[n, d]`.
        queries: fp32 `[Q, d]`.
        squared: Euclidean distances, not products.
        distances: fp32, of all neighbours of the part.
    """
    number = 0
    for pair in pairs:
        place, row = pair & ((1 << bits) - 1), pair >> bits
        while rows[number] != row:
            number += 1
        query = (first + place) // k
        distance = np.float32(0)
        if squared:
            for j in range(keys.shape[1]):
                difference = queries[query, j] - keys[number, j]
                distance += difference * difference
        else:
            for j in range(keys.shape[1]):
                distance += queries[query, j] * keys[number, j]
        distances[place] = distance


@compiled
def out_of_order(distances, rows, similar):
    """The first query whose neighbours are not in order, nearest first and the missing last; -1
    where there is none.

    Args:
        distances: fp32 `[Q, k]`.
        rows: int64 `[Q, k]`, -1 where missing; looked at only where the last is missing.
        similar: whether large is near.
    """
    k = distances.shape[1]
    for i in range(len(distances)):
        row = distances[i]
        wrong = np.int32(0)
        if similar:
            for j in range(1, k):
                wrong += np.int32(row[j - 1] < row[j])
        else:
            for j in range(1, k):
                wrong += np.int32(row[j - 1] > row[j])
        if k > 0 and rows[i, k - 1] < 0:
            for j in range(1, k):
                wrong += np.int32(rows[i, j - 1] < 0 and rows[i, j] >= 0)
        if wrong:
            return i
    return -1
