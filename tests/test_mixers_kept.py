"""A mixer that was fitted once serves other texts, and is refused where it would mislead."""

import json

import pytest
from small import SMALL

HERE = (*SMALL, "--data.corpus", "words", "--memories")


@pytest.fixture(scope="module")
def fitted(workplace, run_program):
    """The file of buckets that were fitted, and what they gave on the test split."""
    run_program(workplace, "evaluate.py", *HERE, "ngram", "--mixer", "buckets")
    return json.loads((workplace / "runs/words/results.json").read_text())["mixture"]


def test_it_weighs_as_it_did(workplace, run_program, fitted):
    file = fitted["mixer_file"]
    assert file.endswith("runs/words/mixers/buckets-ngram.npz")
    run_program(workplace, "evaluate.py", *HERE, "ngram", "--mixer", file)
    again = json.loads((workplace / "runs/words/results.json").read_text())["mixture"]
    assert again["ppl"] == fitted["ppl"]
    assert "mixer_file" not in again


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("ngram", "--split", "valid"), "was fitted on this very text, the split valid"),
        (("ngram,recent",), "was fitted for the memories ngram, not for ngram,recent"),
    ],
)
def test_it_is_refused(workplace, run_program, fitted, flags, sentence):
    mixer = ("--mixer", fitted["mixer_file"])
    done = run_program(workplace, "evaluate.py", *HERE, *flags, *mixer, status=2)
    assert sentence in done.stderr
