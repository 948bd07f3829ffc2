"""What the README says works when it is typed."""

import json
import re
import shutil
from pathlib import Path

import pytest
from small import ROOT

from neighborlm.programs import evaluate

PYTHON = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_python_part(workplace, tmp_path, monkeypatch, capsys):
    assert len([line for line in PYTHON.splitlines() if line]) <= 25
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workplace / "words", tmp_path / "words")
    program = PYTHON.replace("FOLDER", "words").replace("300", "20").replace(": 100,", ": 10,")
    names: dict = {}
    exec(compile(program, "README.md", "exec"), names)
    token, evaluated = names["token"], names["evaluated"]
    words = (tmp_path / "words" / "test.txt").read_text().replace("\n", " \n ").split(" ")
    words = [word for word in words if word]
    assert token.target == words[100]
    assert token.context.split() == "".join(f"{word} " for word in words[92:100]).split()
    lmbda, p = evaluated.results["knn"]["lmbda"], token.probabilities
    assert abs(p["mixture"] - (1 - lmbda) * p["lm"] - lmbda * p["knn"]) < 1e-6
    assert len(token.neighbors) == 5
    weights = [neighbor.weight for neighbor in token.neighbors]
    assert weights == sorted(weights, reverse=True)
    shown = capsys.readouterr().out.splitlines()
    assert any(f"-> {token.target}" in line for line in shown)
    trained = names["trained"]
    evaluate.main(["runs/mine", "--split", "valid", "--trainer.enable_progress_bar", "false"])
    results = json.loads((tmp_path / "runs/mine/results.json").read_text())
    assert abs(results["ppl"] / trained.best_valid_ppl - 1) < 1e-5


def blocks_of_commands(page: Path) -> list[str]:
    """The lines of a page that are to be typed into a shell, continued ones joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)
    lines = (
        "".join(text for language, text in blocks if not language).replace("\\\n", " ").splitlines()
    )
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_can_be_typed_into_bash_and_zsh(page):
    """Where zsh is asked directly it knows no comments, splits no variables into words, and takes
    brackets for patterns."""
    for line in blocks_of_commands(page):
        unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "Q", line)
        assert not re.search(r"[#\[\]*?]", unquoted), line
        assert not re.search(r"(^|\s)\$\w+(\s|$)", unquoted), line


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme
