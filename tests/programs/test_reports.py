"""What is said of figures beside the figures."""

import math

import pytest

from neighborlm.common.contracts import TextSize
from neighborlm.programs.reports import (
    as_table,
    remarks,
    with_bits_per_character,
    with_text_figures,
)

LM = {"split": "test", "unit": "word", "ppl": 119.7}
ROW = {"ppl": 4.5, "tokens_per_second": 9.0, "weights": {}, "bytes_on_disk": 0, "searches": 0}
ROWS = [{**ROW, "name": "LM", "loss": 2.0}, {**ROW, "name": "LM + kNN", "loss": 1.5}]


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
    gate = {"ppl": 120.0, "mixer": "ForetoldMixer", "skip": 0.5, "adaptive.searched": 0.4}
    (said,) = remarks(LM | {"mixture": gate})
    assert "the gate skips 60% of the searches; a smaller --adaptive.skip makes more" in said


def test_a_better_one_needs_no_word():
    better = {"ppl": 102.4, "lmbda": 0.28, "temperature": 8.0, "tuned": True}
    assert remarks(LM | {"knn": better}) == []
    assert remarks(LM) == []
    (said,) = remarks(LM | {"split": "valid", "knn": better})
    assert "this very split" in said


def column(results: dict, name: str) -> list[str]:
    (found,) = (column for column in as_table(results).columns if column.header == name)
    return list(found.cells)


def test_figures_of_words_and_bytes_are_of_the_same_loss():
    knn = {"loss": 1.5, "ppl": 4.5, "tuned": True, "lmbda": 0.2, "temperature": 1.0}
    results = {**LM, "tokens": 50, "loss": 2.0, "knn": knn}
    results["table"] = ROWS
    found = with_text_figures(results, TextSize(words=20, bytes=100))
    assert found["word_ppl"] == pytest.approx(math.exp(2.0 * 50 / 20))
    assert found["bits_per_byte"] == pytest.approx(2.0 * 50 / math.log(2) / 100)
    assert found["knn"]["bits_per_byte"] == pytest.approx(1.5 * 50 / math.log(2) / 100)
    assert (found["words"], found["bytes"]) == (20, 100)
    assert column(found, "of a\nword") == ["148.41", "42.52"]
    assert column(found, "bits\n/ byte") == ["1.4427", "1.0820"]
    assert as_table(found).title == "test split, word level; 20 words, 100 bytes"


def test_bits_of_a_character():
    knn = {"loss": 1.5, "ppl": 4.5, "tuned": True, "lmbda": 0.2, "temperature": 1.0}
    results = {**LM, "loss": 2.0, "knn": knn}
    results["table"] = ROWS
    found = with_bits_per_character(results)
    assert found["bits_per_character"] == pytest.approx(2.0 / math.log(2))
    assert found["knn"]["bits_per_character"] == pytest.approx(1.5 / math.log(2))
    assert column(found, "bits\n/ char") == ["2.8854", "2.1640"]
