"""Slips of the hand on command lines and in configs, and the one sentence that each gets: no usage,
no traceback, nothing done."""

import re

import pytest
from small import ROOT

from neighborlm.tools import main

CONFIG_OF = {"LM": ROOT / "configs/text/lm.yaml", "GNN": ROOT / "configs/text/gnn_lm.yaml"}

FRAGMENT = re.compile(r"(of|on|as|after|such|in|to|by) (?!training)")
"""How a help text begins that cannot be read without the name of its flag or the text before it."""

SLIPS = [
    # flags
    ("train --trainer.max_step 5", "--trainer.max_step: neighborlm train has no such flag; did"),
    ("evaluate --knn.l 0.3", "did you mean --knn.lmbda?"),
    ("evaluate --lambda 0.3", "did you mean --knn.lmbda?"),
    ("evaluate --knn-lm", "did you mean --knnlm?"),
    ("train --lr 1", "did you mean --model.lr?"),
    ("train --knn.k 3", "has no section knn here; evaluate.py has it"),
    ("evaluate --neighbors.k 3", "has no section neighbors here; --arch gnn_lm has it"),
    ("train --model.lm_checkpoint x", "no such flag; --arch gnn_lm has it"),
    ("train words", "words: neighborlm train takes no such argument"),
    # values
    ("train --trainer.max_steps five", "--trainer.max_steps is five; expected a whole number"),
    ("train --trainer.max_steps", "--trainer.max_steps: expected a value behind it"),
    ("evaluate --knn.metric cos", "--knn.metric is cos; expected l2, ip or cosine"),
    ("evaluate --knn.lmbda x", "--knn.lmbda is x; expected a number or auto"),
    ("train --threads 0", "--threads is 0; expected a whole number, at least 1"),
    (
        "train --data.corpus words --seed_everything -1",
        "--seed_everything is -1; expected 0 to 4294967295",
    ),
    ("train --arch rnn", "--arch is rnn; expected lm, gnn_lm"),
    ("train --trainer.callbacks no.Class", "--trainer.callbacks: 'no.Class': No module named"),
    ("train", "--data.corpus is missing; neighborlm train --help explains it"),
    # Lightning's settings
    (
        "train --data.corpus words --trainer.overfit_batches 2",
        "--trainer.overfit_batches 2: is not possible",
    ),
    (
        "train --data.corpus words --trainer.fast_dev_run true",
        "expected --trainer.max_steps 1 and another",
    ),
    (
        "evaluate --knnlm --data.corpus words --trainer.fast_dev_run true",
        "needs every row of its split",
    ),
    (
        "evaluate --knnlm --data.corpus words --trainer.limit_predict_batches 2",
        "needs every row of its split",
    ),
    ("evaluate --data.corpus words --page_tokens 20", "has no effect here; expected --page FILE"),
    # configs
    ("train --config none.yaml", "--config none.yaml: No such file or directory"),
    ("train --config .", "--config .: Is a directory; expected a YAML file"),
    ("train --config broken.yaml", "--config broken.yaml, line 2: is no YAML: expected ','"),
    ("train --config empty.yaml", "--config empty.yaml: is empty; expected sections"),
    ("train --config text.yaml", "--config text.yaml: holds 'just text'; expected sections"),
    ("train --config flat.yaml", "--config flat.yaml: its section model is 3"),
    ("train --config slip.yaml", "--config slip.yaml: model.widht: neighborlm train has no"),
    ("train --config type.yaml", "--config type.yaml: --model.width is three; expected a who"),
    ("train --config LM --config GNN", "lm.yaml: model.ffn_width: neighborlm train has no"),
    ("train --config GNN --arch lm", "is for --arch gnn_lm, but --arch lm is asked for"),
    # tools
    ("datastore lst", "lst: neighborlm datastore has no such command; did you mean list?"),
    ("datastore list --pth .", "neighborlm datastore list has no such flag; did you mean"),
    ("datastore list", "--path is missing"),
    ("datastore list --path none", "--path none: no such folder"),
    ("plan --token 3", "--token: neighborlm plan has no such flag; did you mean --tokens?"),
    # places to write at, before what is read is looked for
    ("sweep --cache none --output .", "--output .: is a folder; expected a file to write"),
    ("recall --memory none --queries none --plot empty.yaml/x", "empty.yaml is no folder"),
    ("recall --memory none --queries none --output .", "--output .: is a folder"),
    ("plan --tokens 5000 --output empty.yaml/x", "--output empty.yaml/x: empty.yaml is no folder"),
    ("codec compare --datastore none --codecs [SQ8] --output .", "--output .: is a folder"),
    ("codec import --datastore none --codes none --quantizer none", "--codes none: no such file"),
    ("convert to_databin none empty.yaml", "--output empty.yaml: is no folder"),
    ("convert from_fairseq none empty.yaml/x", "output empty.yaml/x: empty.yaml is no folder"),
    ("prepare text.yaml --output empty.yaml/x", "--output empty.yaml/x: empty.yaml is no folder"),
    ("datastore thin --source none --output empty.yaml --share .5", "empty.yaml: is no folder"),
    ("datastore merge-entries --source none --output empty.yaml", "empty.yaml: is no folder"),
    ("datastore merge --source none --output empty.yaml", "empty.yaml: is no folder"),
    ("datastore assemble --shards [none] --output empty.yaml", "empty.yaml: is no folder"),
    ("datastore import --source none --output empty.yaml", "empty.yaml: is no folder"),
    ("recall", "--memory and --queries are missing; neighborlm recall --help explains them"),
]

CONFIGS = {
    "broken": "data: [1,\nb",
    "empty": "",
    "text": "just text",
    "flat": "model: 3",
    "slip": "model:\n  widht: 3",
    "type": "model:\n  width: three",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With configs that cannot be used, and no corpus."""
    place = tmp_path_factory.mktemp("slips")
    for name, content in CONFIGS.items():
        (place / f"{name}.yaml").write_text(content)
    return place


@pytest.mark.parametrize(("slip", "sentence"), SLIPS)
def test_a_slip_gets_one_sentence(folder, monkeypatch, capsys, slip, sentence):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        main([str(CONFIG_OF.get(word, word)) for word in slip.split()])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line != "Seed set to 1"]) == 1
    assert said[-1].startswith("error: ")
    assert sentence in said[-1]
    assert len(list(folder.iterdir())) == len(CONFIGS)


@pytest.mark.parametrize(
    ("command", "sections"),
    [
        (["train"], ("model", "data")),
        (["train", "--arch", "gnn_lm"], ("model", "data", "neighbors")),
        (["evaluate"], ("data", "knn", "recent", "automaton")),
    ],
)
def test_help_begins_with_examples_and_ends_with_what_is_lightnings(capsys, command, sections):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    said = capsys.readouterr().out
    head, *rest = said.split("\n\n")
    assert head.startswith(f"usage: neighborlm {command[0]} ")
    assert rest[0].count(f"neighborlm {command[0]} ") == 2
    places = [said.index(f"(--{name}.*):") for name in (*sections, "trainer")]
    assert places == sorted(places)
    own = said[places[0] : places[-1]]
    for flag, text in re.findall(r"^  (--[\w.]+).*?\s{2,}(\S+ .*)$", own, re.MULTILINE):
        assert not FRAGMENT.match(text), f"{flag} {text}"
