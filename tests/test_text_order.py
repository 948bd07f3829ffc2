"""Memories of the running text, in the programs: any number of ranks gives the same figures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from small import SMALL

from neighborlm.common.errors import InputError
from neighborlm.programs.mixture import check_order

HERE = (*SMALL, "--data.corpus", "words", "--memories")
TWO = ("--trainer.devices", 2, "--trainer.strategy", "ddp")


def test_figures_do_not_depend_on_ranks(workplace, run_program):
    """Everything is tuned and fitted on the validation split, which ranks share too."""
    memories = ("recent,ngram,automaton", "--knn.k", 16, "--knn.index", "flat")
    found = {}
    for ranks, devices in ((1, ()), (2, TWO)):
        here = ("--output", f"order-{ranks}.json", "--token_scores", f"order-{ranks}.npz")
        run_program(workplace, "evaluate.py", *HERE, *memories, *here, *devices)
        results = json.loads((workplace / f"order-{ranks}.json").read_text())
        found[ranks] = results, np.load(workplace / f"order-{ranks}.npz")
    (alone, scores), (shared, others) = found[1], found[2]
    assert shared["tokens"] == alone["tokens"] == shared["mixture"]["tokens"]
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-12)
    for name, value in alone["mixture"].items():
        if name in ("loss", "ppl") or "." in name:
            assert shared["mixture"][name] == pytest.approx(value, rel=1e-9), name
    for name in scores:
        np.testing.assert_allclose(others[name], scores[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("warm_up", "sentence"),
    [
        (5, "memory: reads the text in its order, and 2 ranks read a part each, of which"),
        (None, "memory: must have read all of the text before a token, but 2 ranks would"),
    ],
)
def test_what_ranks_cannot_share_is_refused(warm_up, sentence):
    run = SimpleNamespace(trainer=lambda: SimpleNamespace(world_size=2), evaluates_part=True)
    memory = SimpleNamespace(in_order=True, warm_up=warm_up)
    with pytest.raises(InputError, match=sentence):
        check_order(SimpleNamespace(run=run), {"memory": memory})
