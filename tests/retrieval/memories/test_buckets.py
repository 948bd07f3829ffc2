"""Weights by cells: where buckets begin, whose tokens count for a cell, which features are used."""

import numpy as np
import pytest
import torch
from small_opinions import made_up, only

from neighborlm.common.contracts import Opinion
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.buckets import BucketMixer, bucket_of, equal_count_edges
from neighborlm.retrieval.memories.mixers import features_of, fit_weights, source_log_probs

DISTANCE, LENGTH = "knn.nearest_distance", "ngram.suffix_length"


def test_buckets_hold_as_many_numbers_each():
    column = torch.randperm(800, generator=torch.Generator().manual_seed(0)).double()
    edges = equal_count_edges(column, 8)
    assert bucket_of(column, edges).bincount().tolist() == [100] * 8


def test_equal_numbers_are_not_parted_and_infinite_ones_are_the_last():
    column = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 3.0, torch.inf, torch.nan]).double()
    edges = equal_count_edges(column, 4)
    assert edges.tolist() == [3.0]
    bucket = bucket_of(column, edges).tolist()
    assert len(set(bucket[:4])) == 1
    assert bucket[6] == max(bucket[:7])
    assert bucket[7] == len(edges) + 1
    assert bucket_of(torch.tensor([-9.0, 1e9, -torch.inf]).double(), edges).tolist()[0] == 0
    assert equal_count_edges(torch.full((5,), torch.nan).double(), 4).tolist() == []
    assert equal_count_edges(torch.ones(5).double(), 4).tolist() == []


def test_cells_of_many_tokens_have_weights_of_their_own():
    opinions = made_up(6000)
    mixer = BucketMixer([LENGTH], buckets=3, strength=0.0)
    mixer.fit(opinions)
    features, log_probs = features_of(opinions), source_log_probs(opinions)
    weights = mixer.weights(features, 6000)
    length = features[LENGTH]
    lower = [float("-inf"), *mixer.edges[0].tolist()]
    for low, high in zip(lower, [*lower[1:], float("inf")], strict=True):
        own = (length >= low) & (length < high)
        expected = fit_weights(log_probs[own])[0]
        torch.testing.assert_close(weights[own], expected.expand(own.sum(), -1), atol=1e-4, rtol=0)
    missing = length.isnan()
    assert missing.any()
    expected = fit_weights(log_probs[missing])[0]
    torch.testing.assert_close(
        weights[missing], expected.expand(missing.sum(), -1), atol=1e-4, rtol=0
    )


def test_an_empty_cell_is_weighed_as_the_coarser_one():
    """No validation token has both a long suffix and a far neighbour."""
    n = 6000
    opinions = made_up(n)
    generator = torch.Generator().manual_seed(3)
    length, distance = (torch.randint(0, 2, (n,), generator=generator) for _ in range(2))
    distance[length == 1] = 0
    opinions["ngram"].features["suffix_length"] = length
    opinions["knn"].features["nearest_distance"] = distance
    mixer, coarser = (BucketMixer(names) for names in ([LENGTH, DISTANCE], [LENGTH]))
    mixer.fit(opinions)
    coarser.fit(opinions)
    empty = {LENGTH: torch.tensor([1]), DISTANCE: torch.tensor([1])}
    assert torch.equal(mixer.weights(empty, 1), coarser.weights(empty, 1))
    filled = {LENGTH: torch.tensor([0]), DISTANCE: torch.tensor([1])}
    assert not torch.equal(mixer.weights(filled, 1), coarser.weights(filled, 1))


def test_a_cell_of_few_tokens_is_weighed_nearly_as_the_coarser_one():
    """10 tokens against 50 of the coarser cell: a sixth of the way to their own weights."""
    column = torch.zeros(3010)
    column[3000:] = torch.nan
    probs = torch.tensor([[0.1, 0.2]] * 3000 + [[1.0, 0.0]] * 10).log()
    opinions = {
        "lm": Opinion(probs[:, 0]),
        "knn": Opinion(probs[:, 1], {"nearest_distance": column}),
    }
    mixer = BucketMixer([DISTANCE])
    mixer.fit(opinions)
    everyone = fit_weights(source_log_probs(opinions))[0]
    found = mixer.weights({DISTANCE: torch.tensor([torch.nan])}, 1)[0]
    expected = (10 * torch.tensor([1.0, 0.0]).double() + 50 * everyone) / 60
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_features_that_help_are_chosen_by_themselves():
    """Noise is not, nor what is several numbers."""
    opinions = made_up(8000)
    noise = torch.rand(8000, generator=torch.Generator().manual_seed(9))
    opinions["ngram"].features["noise"] = noise
    opinions["ngram"].features["numbers"] = torch.zeros(8000, 4)
    mixer = BucketMixer()
    mixer.fit(opinions)
    assert LENGTH in mixer.chosen[:2]
    assert {DISTANCE, "knn.kth_distance"} & set(mixer.chosen[:2])
    assert not {"ngram.noise", "ngram.numbers"} & set(mixer.chosen)


def test_without_any_feature_weights_are_constant():
    opinions = only(made_up(1000), "lm", "knn", "ngram")
    bare = {source: Opinion(opinion.log_probs) for source, opinion in opinions.items()}
    mixer = BucketMixer()
    mixer.fit(bare)
    expected = fit_weights(source_log_probs(bare)).expand(4, -1)
    torch.testing.assert_close(mixer.weights({}, 4), expected)


def test_what_is_no_number_is_refused():
    opinions = made_up(100)
    opinions["knn"].features["distances"] = torch.zeros(100, 4)
    with pytest.raises(InputError, match="distances is 4 numbers a token"):
        BucketMixer(["knn.distances"]).fit(opinions)
    with pytest.raises(InputError, match="reads the feature"):
        BucketMixer(["knn.nothing"]).fit(opinions)


def test_a_grid_of_two_features_has_a_cell_for_each_pair():
    opinions = made_up(6000)
    mixer = BucketMixer([DISTANCE, LENGTH], buckets=4)
    mixer.fit(opinions)
    sizes = [len(edges) + 2 for edges in mixer.edges]
    assert len(mixer.cell_weights) == np.prod(sizes)
