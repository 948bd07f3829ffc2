"""The tables of the comparison, and the part of a corpus that it reads."""

import numpy as np
import pytest
from small import write_corpus

from benchmarks.methods import Method, first_table, second_table
from benchmarks.texts import Base
from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.slices import by_bands


@pytest.fixture
def methods() -> list[Method]:
    rng = np.random.default_rng(0)
    lm = rng.gamma(2.0, 2.0, 1200)
    return [Method("LM", lm, 1000.0), Method("LM + knn", 0.9 * lm, 500.0, 21_000_000, 1200)]


def test_figures_stand_in_the_first_table(methods):
    rows, table = first_table(methods, block=100)
    lines = table.splitlines()
    assert len(lines) == 4
    ppl = np.exp(0.9 * methods[0].losses.mean())
    assert rows[1]["ppl"]["value"] == pytest.approx(ppl)
    relative = rows[1]["relative"]["value"]
    assert relative == pytest.approx(ppl / rows[0]["ppl"]["value"])
    assert lines[3].startswith(f"| LM + knn | {ppl:.2f} (")
    assert " ".join(lines[3].split()).endswith("| 500 | 21.0 | 1,200 |")
    assert f"| {relative:.3f} (" in lines[3]


def test_classes_without_tokens_are_not_in_the_second_table(methods):
    lengths = np.repeat([0, 5], 600)
    rows, table = second_table(methods, [by_bands("overlap", lengths, [0, 2, 9])])
    assert [row["label"] for row in rows] == ["0 to 1", "2 to 8", "9 or more"]
    gained = 0.1 * methods[0].losses[:600].mean()
    assert rows[0]["gains"]["LM + knn"]["nats"] == pytest.approx(gained)
    assert f"| 0 to 1 | 50.0% | {np.exp(methods[0].losses[:600].mean()):,.1f} |" in " ".join(
        table.split()
    )
    assert "9 or more" not in table


def test_the_first_whole_lines_of_a_corpus_are_read(tmp_path):
    base = Base(str(write_corpus(tmp_path / "words")), 100, 30, 7, folder=tmp_path / "parts")
    part = base.part()
    assert part.name == "words-100-30-7"
    whole = (tmp_path / "words/train.txt").read_text()
    kept = (part / "train.txt").read_text()
    assert whole.startswith(kept)
    assert kept.endswith("\n")
    tokens = len(kept.split()) + kept.count("\n")
    following = whole[len(kept) :].splitlines()[0]
    assert tokens <= 100 < tokens + len(following.split()) + 1
    assert base.part() == part  # found again
    with pytest.raises(InputError, match=r"anywhere is neither a folder nor a known corpus"):
        Base(str(tmp_path / "anywhere"), folder=tmp_path / "parts").part()
