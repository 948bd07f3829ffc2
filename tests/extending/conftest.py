"""Runs evaluate.py's own `main` in the process of the test, where a registry has one more line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small import SMALL

from neighborlm.programs.evaluate import main

CHECKPOINT = "runs/words/checkpoints/best.ckpt"


@pytest.fixture
def evaluated(
    workplace, monkeypatch, tmp_path
) -> Callable[..., tuple[dict, dict[str, np.ndarray]]]:
    """Evaluates the small LM with further flags; its results and its tokens' scores."""

    def run(*flags: object) -> tuple[dict, dict[str, np.ndarray]]:
        output, scores = tmp_path / "results.json", tmp_path / "scores.npz"
        places = ("--output", output, "--token_scores", scores)
        given = () if "--arch" in flags else ("--ckpt_path", CHECKPOINT)
        command = ("evaluate.py", *SMALL, "--data.corpus", "words", *given, *places, *flags)
        monkeypatch.chdir(workplace)
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        main()
        return json.loads(output.read_text()), dict(np.load(scores))

    return run


@pytest.fixture
def words(workplace) -> Callable[[str], list[str]]:
    """The tokens of a split, ends of lines included."""

    def read(split: str) -> list[str]:
        text = Path(workplace / "words" / f"{split}.txt").read_text()
        return text.replace("\n", " </s> ").split()

    return read
