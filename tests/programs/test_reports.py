"""What is said of figures beside the figures."""

from neighborlm.programs.reports import remarks

LM = {"split": "test", "ppl": 119.7}


def test_a_mixture_worse_than_the_lm_is_said_with_the_reason_and_the_flag():
    given = {"ppl": 124.0, "lmbda": 0.25, "temperature": 1.0, "tuned": False}
    (said,) = remarks(LM | {"knn": given})
    assert said == (
        "The mixture is worse than the LM (124.00 against 119.70): lmbda 0.25 and temperature 1 "
        "were not tuned; --knn.lmbda auto finds the best of the validation split."
    )
    (said,) = remarks(LM | {"gnn": {"ppl": 118.0}, "knn": given | {"ppl": 119.0, "tuned": True}})
    assert "worse than the GNN-LM (119.00 against 118.00)" in said
    assert "best of the validation split, but not of this one" in said
    (said,) = remarks(LM | {"mixture": {"ppl": 120.0, "mixer": "GateMixer"}})
    assert "GateMixer weighs the memories; --mixer" in said


def test_a_better_one_needs_no_word():
    better = {"ppl": 102.4, "lmbda": 0.28, "temperature": 8.0, "tuned": True}
    assert remarks(LM | {"knn": better}) == []
    assert remarks(LM) == []
    (said,) = remarks(LM | {"split": "valid", "knn": better})
    assert "this very split" in said
