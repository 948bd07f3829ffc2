"""The queries of the comparison of indexes belong to the scores that they are compared by."""

import numpy as np
import pytest

from benchmarks.indexes import Questions
from neighborlm.common.errors import InputError


def test_scores_of_another_text_are_refused(make_store, tmp_path):
    store, _, values = make_store(rows=60)
    position = np.arange(0, 60, 2)
    scores = {"position": position, "target": values[position], "lm_log_prob": -0.1 * position}
    np.savez(tmp_path / "own.npz", **scores)
    questions = Questions.read(store, tmp_path / "own.npz", limit=20, seed=1)
    rows = (-10 * questions.lm_log_prob.numpy()).round().astype(int)
    assert questions.targets.tolist() == values[rows].tolist()
    assert len(rows) == 20
    for change in ({"target": np.roll(scores["target"], 1)}, {"position": position + 50}):
        np.savez(tmp_path / "other.npz", **scores | change)
        with pytest.raises(InputError, match=r"other\.npz: are of another text than --queries"):
            Questions.read(store, tmp_path / "other.npz", limit=20, seed=1)
