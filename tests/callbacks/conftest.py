"""Datastores that are about to be complete, and ranks that come at the same time."""

import threading
from collections.abc import Callable

import numpy as np
import pytest

from neighborlm.retrieval.store.datastore import DatastoreBuilder


@pytest.fixture
def filled(new_builder, tmp_path) -> Callable[[str, int], DatastoreBuilder]:
    """Makes a datastore of random keys that is complete but for its last word."""

    def make(split: str, rows: int) -> DatastoreBuilder:
        rng = np.random.default_rng(rows)
        builder = new_builder(tmp_path / split, rows, dim=4, split=split)
        keys = rng.normal(size=(rows, 4)).astype(np.float32)
        builder.write(np.arange(rows), keys, rng.integers(0, 50, rows))
        builder.sync()
        return builder

    return make


@pytest.fixture
def check_one_works(monkeypatch) -> Callable[[type, Callable[[], object]], None]:
    """Three ranks call the same at the same time: one does the work, `run` of a class, and the
    others wait until it is done."""

    def check(worker: type, call: Callable[[], object]) -> None:
        real, calls, started, gate = worker.run, [], threading.Event(), threading.Event()

        def slow(self, report):
            calls.append(self)
            started.set()
            gate.wait(timeout=10)
            return real(self, report)

        monkeypatch.setattr(worker, "run", slow)
        ranks = [threading.Thread(target=call) for _ in range(3)]
        for rank in ranks:
            rank.start()
        assert started.wait(timeout=10)
        ranks[0].join(timeout=0.1)
        assert all(rank.is_alive() for rank in ranks)
        gate.set()
        for rank in ranks:
            rank.join(timeout=10)
            assert not rank.is_alive()
        assert len(calls) == 1

    return check
