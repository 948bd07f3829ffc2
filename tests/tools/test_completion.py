"""The Tab key, as bash asks: what may stand in the place of a word that has been begun."""

import shutil
import subprocess

import pytest

from neighborlm import tools
from neighborlm.tools import TOOLS
from neighborlm.tools.completion import script


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_words_that_bash_completes(tmp_path, monkeypatch):
    some = {name: TOOLS[name] for name in ("datastore", "evaluate", "train")}
    monkeypatch.setattr(tools, "TOOLS", some)
    (tmp_path / "script").write_text(script())

    def completed(*words: str) -> list[str]:
        asked = " ".join(f'"{word}"' for word in words)
        command = f". ./script; COMP_WORDS=(neighborlm {asked}); COMP_CWORD={len(words)}"
        command += '; _neighborlm; echo "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout.split()

    assert completed("") == list(some)
    assert completed("tr") == ["train"]
    assert completed("evaluate", "--knn.l") == ["--knn.lmbda"]
    assert completed("evaluate", "runs/x", "--knnlm", "--knn.met") == ["--knn.metric"]
    assert completed("evaluate", "--knn.metric", "") == ["l2", "ip", "cosine"]
    assert completed("datastore", "ver") == ["verify"]
    assert "--share" in completed("datastore", "thin", "--")
    assert "--seed_everything" in completed("train", "--data.corpus", "x", "--")
