"""Runs benchmarks in the process of the test: what they measure has processes of its own."""

import multiprocessing.forkserver
import sys
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def one_server() -> None:
    """Starts the server of processes, before a benchmark says what it has to import: all tests of a
    process share it."""
    multiprocessing.forkserver.ensure_running()


@pytest.fixture
def measure(one_server, tmp_path, monkeypatch) -> Callable[..., None]:
    """Calls a benchmark's `main` with some flags, in a folder of the test's own."""

    def run(benchmark: ModuleType, *flags: object) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, *map(str, flags)])
        benchmark.main()

    return run
