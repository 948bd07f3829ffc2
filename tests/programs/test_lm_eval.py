"""lm-evaluation-harness with the model `neighborlm`, on tasks made of local files."""

import json
import sys
import tomllib

import numpy as np
import pytest
import yaml
from accelerators import ACCELERATORS, skip_without
from small import ROOT

pytest.importorskip("lm_eval", reason="the extra hf is not installed")

import lm_eval
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager
from small_with_memory import ALL, RUN, brute_force, load
from transformers import AutoTokenizer

from neighborlm.common.errors import InputError
from neighborlm.programs import lm_eval as command
from neighborlm.programs import lm_eval_model

TASKS = ["local_rolling", "local_choice", "local_until"]
DOCUMENTS = ["w1 w2 w3 w4 w5\nw9 w10", "w20 w21 w22 w23 w24 w25 w26 w27 w28 w29 w30 w31 w32 " * 2]
QUESTIONS = [
    {"question": "w1 w2 w3", "choices": ["w4 w5", "w17 w2"], "answer": 0},
    {"question": "w20 w21", "choices": ["w22", "w30 w31 w32"], "answer": 0},
    {"question": "w7 w8", "choices": ["w4", "w9"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the tasks, which read files beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, lines in (("documents", [{"text": t} for t in DOCUMENTS]), ("questions", QUESTIONS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for path in (ROOT / "tests/programs/lm_eval_tasks").glob("*.yaml"):
        task = yaml.safe_load(path.read_text())
        files = task["dataset_kwargs"]["data_files"]
        files["test"] = str(folder / files["test"])
        (folder / path.name).write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture
def tasks(folder, here):
    return folder


@pytest.fixture(scope="module")
def own(folder, runs_with_memory) -> dict:
    """Figures of lm-evaluation-harness's own `hf`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(runs_with_memory)
        return evaluated(folder, "hf")


def evaluated(tasks, model: str, names=TASKS, pretrained="gpt2", **settings) -> dict:
    return lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": pretrained, "add_bos_token": False, **settings},
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )


def test_without_weight_every_figure_is_that_of_hf(tasks, own):
    ours = evaluated(tasks, "neighborlm", memory=RUN, lmbda=0.0)
    assert ours["results"] == own["results"]
    for task in TASKS:
        found, expected = (
            [sample["filtered_resps"] for sample in results["samples"][task]]
            for results in (ours, own)
        )
        assert found == expected


def test_likelihoods_are_those_of_a_brute_force_mixture(tasks):
    results = evaluated(tasks, "neighborlm", TASKS[:2], memory=RUN)
    tokenizer = AutoTokenizer.from_pretrained("gpt2")

    def likelihood(context: list[int], text: list[int]) -> float:
        whole = context + text
        return sum(brute_force(whole[:t])[whole[t]] for t in range(len(context), len(whole)))

    for sample, question in zip(results["samples"]["local_choice"], QUESTIONS, strict=True):
        context = tokenizer(question["question"]).input_ids
        for (found, _), choice in zip(sample["filtered_resps"], question["choices"], strict=True):
            whole = tokenizer(f"{question['question']} {choice}").input_ids
            assert found == pytest.approx(likelihood(context, whole[len(context) :]), abs=1e-3)
    document = tokenizer(DOCUMENTS[0]).input_ids
    found = results["samples"]["local_rolling"][0]["filtered_resps"][0]
    assert found == pytest.approx(likelihood([tokenizer.eos_token_id], document), abs=1e-3)


def test_only_continuations_are_searched_for(tasks):
    model = lm_eval_model.NeighborLM("gpt2", RUN, device="cpu", batch_size=3)
    memory, searched = model.model.remembering.mixed.memories["knn"], []
    search = memory.neighbors
    memory.neighbors = lambda asked: searched.append(len(asked.positions)) or search(asked)
    requests = [(("", ""), [1, 2, 3, 4, 5], [6, 7]), (("", ""), [8], [9, 10, 11])]
    model._loglikelihood_tokens(requests)
    assert sorted(searched) == [2, 3]


def test_memories_that_read_the_text_are_heard_too(tasks, own):
    found = evaluated(tasks, "neighborlm", ["local_rolling"], memory=ALL)
    name = "bits_per_byte,none"
    ours, theirs = (x["results"]["local_rolling"][name] for x in (found, own))
    assert ours < theirs
    assert np.isfinite(ours)


@pytest.mark.parametrize("device", ACCELERATORS)
def test_an_accelerator_gives_the_same_figures(tasks, device):
    skip_without(device)
    here, there = (
        evaluated(tasks, "neighborlm", TASKS[1:], load().to(place), memory=ALL)["samples"]
        for place in ("cpu", device)
    )
    for found, expected in zip(there["local_choice"], here["local_choice"], strict=True):
        likelihoods = (np.array(one["filtered_resps"], dtype=float) for one in (found, expected))
        np.testing.assert_allclose(*likelihoods, atol=1e-3)
    for found, expected in zip(there["local_until"], here["local_until"], strict=True):
        assert found["filtered_resps"] == expected["filtered_resps"]


def test_the_program_lm_eval_knows_the_model(monkeypatch, capsys):
    """Once `register` was called, with all others; bad input is told in one sentence."""
    monkeypatch.setattr(model_registry, "_objs", {})
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delitem(sys.modules, "lm_eval.models")
    command.register()
    assert model_registry.get("neighborlm") is lm_eval_model.NeighborLM
    assert "hf" in model_registry
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared["lm_eval.models"] == {"neighborlm": command.MODEL}
    sys.excepthook(InputError, InputError("no memory"), None)
    assert capsys.readouterr().err == "error: no memory\n"


def test_the_command(here, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(lm_eval_model, "cli_evaluate", lambda: seen.append(sys.argv))
    command.main(["--tasks", "a"])
    command.main(["run", "--model=hf"])
    command.main(["ls", "tasks"])
    assert seen[0] == ["lm_eval", "run", "--model", "neighborlm", "--tasks", "a"]
    assert seen[1:] == [["lm_eval", "run", "--model=hf"], ["lm_eval", "ls", "tasks"]]
    with pytest.raises(InputError, match="--model_args: has no memory"):
        lm_eval_model.NeighborLM("gpt2")
    monkeypatch.setattr("neighborlm.common.extras.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main([])
    said = capsys.readouterr().err
    assert "neighborlm lm_eval: needs lm_eval, transformers, not installed" in said
