"""A place where a model of transformers was evaluated with memories."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def runs_with_memory(tmp_path_factory) -> Path:
    """See `small_with_memory.make_runs`."""
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    from small_with_memory import make_runs

    return make_runs(tmp_path_factory.mktemp("with_memory"))


@pytest.fixture
def here(runs_with_memory, monkeypatch) -> Path:
    """That place as working directory."""
    monkeypatch.chdir(runs_with_memory)
    return runs_with_memory
