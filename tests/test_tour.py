"""The notebook `docs/tour.ipynb`, cell by cell, on a text and a model small enough for a test."""

import json
import shutil

import numpy as np
from small import ROOT

NOTEBOOK = json.loads((ROOT / "docs/tour.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_short_and_has_no_outputs():
    assert len(NOTEBOOK["cells"]) == 10
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_the_notebook_explains_a_token(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workplace / "words", tmp_path / "words")
    assert CODE[0].count('"python_docs", 300') == 1
    first = CODE[0].replace('"python_docs", 300', '"words", 20')
    names: dict = {}
    for number, cell in enumerate([first, *CODE[1:]]):
        exec(compile(cell, f"cell {number}", "exec"), names)
    words = (tmp_path / "words/test.txt").read_text().replace("\n", " \n ").split(" ")
    words = [word for word in words if word]
    position, token, scores = names["position"], names["token"], names["scores"]
    gains = scores["log_prob"] - scores["lm_log_prob"]
    assert gains[scores["position"] == position] == gains.max() > 0
    assert token.target == words[position]
    gain = np.log(token.probabilities["mixture"] / token.probabilities["lm"])
    assert abs(gain - gains.max()) < 1e-3
    ratio = names["results"]["ppl"] / names["knn"]["ppl"]
    assert abs(gains.mean() - np.log(ratio)) < 1e-4
    assert position in names["page"].positions
    assert f"shows {len(names['page'].positions)} tokens" in capsys.readouterr().out
    assert "A tour" in (tmp_path / "tour.html").read_text()
    exec(compile(CODE[1], "cell 1", "exec"), names)  # a second run has its checkpoint
    assert "perplexity" not in capsys.readouterr().out
