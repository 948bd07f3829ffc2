"""Bad input is refused in one sentence before any work; killed stages go on where they stopped."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import half_written, kill_last_when
from small import ROOT, SMALL, scalars, without_digests, write_corpus

from neighborlm.callbacks.lightning_internals import Continuation
from neighborlm.common.files import Lock, write_whole
from neighborlm.datamodules.lm import ResumableLoader
from neighborlm.programs import evaluate, places, train, training
from neighborlm.programs.checkpoints import load_model

HERE = (*SMALL, "--data.corpus", "words")
CKPT = ("--ckpt_path", "runs/words/checkpoints/best.ckpt")


@pytest.fixture
def refused(workplace, monkeypatch, capsys):
    """Runs a program's main in the workplace; returns its one sentence."""

    def run(program, *flags) -> str:
        monkeypatch.chdir(workplace)
        monkeypatch.setattr(sys, "argv", ["program.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            program.main()
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture(scope="module")
def store(workplace, run_program):
    """A datastore with an index, made by the program."""
    flags = ("--save_datastore", "--build_index", "--knn.index", "IVF8,SQ8")
    run_program(workplace, "evaluate.py", *HERE, *CKPT, *flags, "--knn.datastore", "store")
    return workplace / "store"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data.corpus", "nowhere"), ("nowhere", "expected")),
        (("--ckpt_path", "none.ckpt"), ("none.ckpt", "no such checkpoint")),
        (("--ckpt_path", "words/train.txt"), ("words/train.txt", "cannot be read")),
        (("--knn.lmbda", "1.5"), ("--knn.lmbda", "1.5", "from 0 to 1")),
        (("--knn.temperature", "4"), ("--knn.temperature 4", "no effect with --knn.lmbda auto")),
        (("--mixer", "gate", "--knn.lmbda", "0.3"), ("--knn.lmbda 0.3", "--mixer gate")),
        (("--recent.size", "9"), ("--recent.size 9", "no effect")),
        (("--memories", ""), ("--memories '': names no memory", "knn, ngram, recent")),
        (("--knn.k", "100000"), ("--knn.k", "100000", "keys")),
        (("--split", "train"), ("--split train", "its own key")),
        (("--trainer.strategy", "ddpp"), ("--trainer.*", "ddpp")),
        (("--split", "dev"), ("--split", "dev", "train, valid, test")),
        (("--knn.k", "0"), ("--knn.k", "at least 1")),
        (("--knn.temperature", "0"), ("--knn.temperature", "more than 0")),
        (("--knn.key_type", "best"), ("--knn.key_type", "last_ffn_input")),
        (("--knn.key_type", "layer:7:output"), ("layer:7:output", "0 to 1")),
        (("--knn.index", "IVFX"), ("--knn.index", "IVFX", "factory")),
        (("--knn.index", "none.faiss"), ("none.faiss",)),
        (("--data.context_window", "24"), ("--data.context_window", "--data.tokens_per_sample")),
        (("--data.tokens_per_sample", "5000"), ("5000", "--model.max_target_positions")),
    ],
)
def test_wrong_flags(refused, workplace, flags, words):
    before = sorted(workplace.glob("datastores/**"))
    sentence = refused(evaluate, *HERE, *CKPT, "--knnlm", *flags)
    assert all(word in sentence for word in words), sentence
    assert sorted(workplace.glob("datastores/**")) == before


@pytest.mark.parametrize(
    ("flag", "place", "words"),
    [
        ("--output", "words", ("--output words", "is a folder")),
        ("--output", "words/train.txt/x.json", ("words/train.txt is no folder",)),
        ("--token_scores", "/proc/none/x.npz", ("--token_scores /proc/none/x.npz", "cannot be")),
        ("--knn.cache", "words/train.txt", ("--knn.cache words/train.txt", "is no folder")),
        ("--knn.datastore", "runs", ("--knn.datastore runs: holds words and no datastore",)),
        ("--trainer.default_root_dir", "words/train.txt", ("words/train.txt", "is no folder")),
        ("--trainer.default_root_dir", "taken", ("taken/evaluations is no folder",)),
    ],
)
def test_places_that_cannot_be_written(refused, workplace, flag, place, words):
    """Are found before there is a datastore."""
    (workplace / "taken").mkdir(exist_ok=True)
    (workplace / "taken/evaluations").touch()
    knn = ("--knnlm", "--knn.k", 4, "--knn.datastore", "never")
    sentence = refused(evaluate, *HERE, *CKPT, *knn, flag, place)
    assert all(word in sentence for word in words), sentence
    assert not (workplace / "never").exists()


class Harmful:
    """Writes a file when it is unpickled without restrictions."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.fixture(scope="module")
def broken(workplace):
    """Puts checkpoints that cannot be used into the workplace."""
    last = workplace / "runs/words/checkpoints/last.ckpt"
    (workplace / "empty.ckpt").touch()
    (workplace / "cut.ckpt").write_bytes(last.read_bytes()[:9000])
    content = torch.load(last, weights_only=True) | {"more": Harmful(workplace / "harm")}
    torch.save(content, workplace / "evil.ckpt")
    (workplace / "evil/checkpoints").mkdir(parents=True, exist_ok=True)
    shutil.copy(workplace / "evil.ckpt", workplace / "evil/checkpoints/last.ckpt")
    shutil.copy(workplace / "runs/words/config.yaml", workplace / "evil")
    return workplace


FILE = ("--knn.datastore", "words/train.txt")
GNN = ("--config", ROOT / "configs/text/gnn_lm.yaml", "--data.corpus", "words")
OF_TRAIN_PY = "cannot be read as a checkpoint of train.py: "


@pytest.mark.parametrize(
    ("program", "flags", "words"),
    [
        (evaluate, (*HERE, "--ckpt_path", "words"), "words: is a folder; expected a file"),
        (evaluate, (*HERE, "--ckpt_path", "empty.ckpt"), OF_TRAIN_PY + "it is empty"),
        (evaluate, (*HERE, "--ckpt_path", "cut.ckpt"), OF_TRAIN_PY + "it is cut short"),
        (evaluate, (*HERE, "--ckpt_path", "evil.ckpt"), OF_TRAIN_PY + "it holds a "),
        (train, (*HERE, "--ckpt_path", "evil.ckpt"), OF_TRAIN_PY + "it holds a "),
        (train, (*HERE, "--trainer.default_root_dir", "evil"), OF_TRAIN_PY + "it holds a "),
        (train, (*HERE, "--ckpt_path", "words"), "--ckpt_path words: is a folder"),
        (train, (*HERE, "--trainer.default_root_dir", "words/train.txt"), "is no folder"),
        (train, (*GNN, "--model.lm_checkpoint", "words"), "words: is a folder; expected a file"),
        (
            train,
            (*GNN, "--neighbors.datastores", "words/train.txt/x"),
            "words/train.txt is no fold",
        ),
        (evaluate, (*HERE, *CKPT, "--save_datastore", *FILE), "words/train.txt is no folder"),
    ],
)
def test_a_file_in_the_place_of_a_folder_and_the_reverse(refused, broken, program, flags, words):
    sentence = refused(program, *flags)
    assert words in sentence
    assert not (broken / "harm").exists()


def test_the_table_comes_before_a_disk_that_is_full(workplace, monkeypatch, capsys, tmp_path):
    """And what can be written is written."""

    def full(path, content):
        if path.name == "scores.npz":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(path, content)

    monkeypatch.setattr(places, "write_whole", full)
    monkeypatch.chdir(workplace)
    files = ("--output", tmp_path / "r.json", "--token_scores", tmp_path / "scores.npz")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, (*HERE, *CKPT, *files))])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "perplexity" in said.out
    assert f"{tmp_path}/scores.npz (No space left on device; about " in said.err
    assert "could not be written; what could be is" in said.err
    record = json.loads((tmp_path / "r.json").read_text())["record"]
    assert json.loads((workplace / record).read_text())["results"]["split"] == "test"


def test_empty_split(refused, workplace):
    shutil.copytree(workplace / "words", workplace / "hollow", dirs_exist_ok=True)
    (workplace / "hollow" / "valid.txt").write_text("")
    sentence = refused(train, *SMALL, "--data.corpus", "hollow")
    assert "valid.txt" in sentence


def test_checkpoint_of_another_vocabulary(refused, workplace):
    if not (workplace / "other").exists():
        write_corpus(workplace / "other", seed=9, lines=(6, 3, 3))
    sentence = refused(evaluate, *SMALL, *CKPT, "--data.corpus", "other")
    assert "dictionary" in sentence
    assert "--data.dictionary" in sentence


def test_run_directory_of_another_model(refused):
    sentence = refused(train, *HERE, "--model.layers", "1")
    assert "--model.layers" in sentence
    assert "--trainer.default_root_dir" in sentence


def test_datastore_of_another_model(refused, store, workplace, tmp_path):
    place = ("--knn.datastore", store, "--knn.k", 4)
    checkpoint = torch.load(workplace / CKPT[1], weights_only=True)
    checkpoint["state_dict"]["decoder.layers.0.fc1.bias"] += 1e-3
    torch.save(checkpoint, tmp_path / "other.ckpt")
    other = ("--ckpt_path", tmp_path / "other.ckpt")
    assert "its model is" in refused(evaluate, *HERE, *other, "--knnlm", *place)
    sentence = refused(evaluate, *HERE, *CKPT, "--knnlm", *place, "--knn.key_type", "last_hidden")
    assert "key type is last_ffn_input, but last_hidden is expected" in sentence
    sentence = refused(evaluate, *HERE, *CKPT, "--knnlm", *place, "--knn.dtype", "fp32")
    assert "dtype is fp16, but fp32 is expected" in sentence


def test_index_of_another_metric_or_dimension(refused, store, workplace):
    index = ("--knn.index", store / "IVF8_SQ8-l2.faiss", "--knn.k", 4)
    place = ("--knn.datastore", store)
    sentence = refused(evaluate, *HERE, *CKPT, "--knnlm", *place, *index, "--knn.metric", "ip")
    assert "metric is l2, but ip is expected" in sentence
    manifest = store / "IVF8_SQ8-l2.faiss.json"
    described = manifest.read_text()
    try:
        without_digests(manifest, dim=17)
        sentence = refused(evaluate, *HERE, *CKPT, "--knnlm", *place, *index)
        assert "dim is 17, but 16 is expected" in sentence
    finally:
        manifest.write_text(described)


def test_truncated_keys(refused, store, tmp_path):
    broken = shutil.copytree(store, tmp_path / "broken")
    with open(broken / "keys.npy", "r+b") as file:
        file.truncate(1000)
    flags = ("--knnlm", "--knn.datastore", broken, "--knn.k", 4)
    sentence = refused(evaluate, *HERE, *CKPT, *flags)
    assert "keys.npy" in sentence
    assert "1000 bytes" in sentence


def test_no_room_on_disk(refused, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    flags = ("--save_datastore", "--knn.datastore", tmp_path / "full")
    sentence = refused(evaluate, *HERE, *CKPT, *flags)
    assert "the disk has 1 kB free" in sentence


def test_killed_datastore_goes_on_to_the_same_bytes(workplace, run_program, tmp_path):
    """Small batches make the dump slow enough to be killed in the middle."""
    flags = (*HERE, *CKPT, "--save_datastore", "--data.max_tokens", 24)
    run_program(workplace, "evaluate.py", *flags, "--knn.datastore", tmp_path / "whole")
    cut = tmp_path / "cut"
    processes = run_program.start(workplace, "evaluate.py", [(*flags, "--knn.datastore", cut)])
    kill_last_when(lambda: half_written(cut), processes)
    assert not json.loads((cut / "manifest.json").read_text())["complete"]
    run_program(workplace, "evaluate.py", *flags, "--knn.datastore", cut)
    for name in ("keys.npy", "values.npy"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("accumulate", "had", "begun", "made", "consumed", "counted"),
    [
        (1, 3, 3, False, 4, 3),  # between two batches
        (1, 3, 4, False, 3, 3),  # in one
        (1, 3, 4, True, 4, 4),  # and its update was made
        (2, 3, 4, False, 2, 2),  # in the second one of an update
        (2, 3, 4, True, 4, 4),
        (2, 3, 3, False, 3, 2),  # between the two
    ],
)
def test_batches_whose_update_failed_come_again(accumulate, had, begun, made, consumed, counted):
    loader = ResumableLoader(range(5), sampler=range(5))
    loader.consumed = consumed + begun - counted if not made else consumed
    counts = [SimpleNamespace(ready=n + begun, processed=n + had) for n in (0, 5)]
    progress = SimpleNamespace(current=counts[0], total=counts[1])
    loop = SimpleNamespace(batch_progress=progress, _should_accumulate=lambda: begun % accumulate)
    trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=loop),
        train_dataloader=loader,
        global_step=int(made),
        accumulate_grad_batches=accumulate,
        checkpoint_callbacks=[],
    )
    Continuation(None, []).on_exception(trainer, None, RuntimeError())
    assert loader.state_dict()["consumed"] == consumed
    assert (counts[0].ready, counts[1].ready) == (counted, 5 + counted)


WITH_DROPOUT = (*HERE, "--model.dropout", 0.2, "--model.softmax_dropout", 0.1)
UPDATES = ("--trainer.max_steps", 40, "--trainer.val_check_interval", 20, "--checkpoint_every", 20)


@pytest.fixture(scope="module")
def uninterrupted(workplace, run_program):
    """Trains with dropout and further flags, once for each; gives the run's folder."""
    runs = {}

    def run(*flags: object) -> Path:
        if flags not in runs:
            runs[flags] = workplace / f"uninterrupted-{len(runs)}"
            run_program(workplace, "train.py", *flags, "--trainer.default_root_dir", runs[flags])
        return runs[flags]

    return run


def interrupting(moment: str, call: int, number: int) -> tuple:
    """Flags by which a training interrupts itself."""
    settings = (("moment", moment), ("call", call), ("number", int(number)))
    flags = [(f"--trainer.callbacks.{name}", value) for name, value in settings]
    return ("--trainer.callbacks", "interrupting.Interrupt", *sum(flags, ()))


def check_same_training(run: Path, expected: Path) -> None:
    """Weights, figures and all that was logged."""
    weights = load_model(expected / "checkpoints/last.ckpt").state_dict()
    for name, tensor in load_model(run / "checkpoints/last.ckpt").state_dict().items():
        assert torch.equal(tensor, weights[name])
    found, whole = (json.loads((r / "training.json").read_text()) for r in (run, expected))
    for name in ("updates", "best_valid_ppl"):
        assert found[name] == whole[name]
    for tag in ("train/loss", "val/ppl"):
        found, whole = (
            sorted((event.step, event.value) for event in scalars(r / "train")[tag])
            for r in (run, expected)
        )
        assert found == whole


@pytest.mark.parametrize(
    ("moment", "call", "number", "updates"),
    [
        ("stepped", 7, signal.SIGINT, 7),  # between an update and its count
        ("on_train_batch_end", 13, signal.SIGTERM, 13),  # at the end of an epoch
        ("on_validation_batch_end", 4, signal.SIGINT, 20),  # of the first, after two as a check
        ("on_train_batch_start", 21, signal.SIGINT, 20),  # when that validation is over
        ("on_validation_batch_end", 10, signal.SIGTERM, 40),  # of the last one
    ],
)
def test_interrupted_training_goes_on_with_the_same_numbers(
    workplace, run_program, uninterrupted, tmp_path, moment, call, number, updates
):
    flags, place = (*WITH_DROPOUT, *UPDATES), ("--trainer.default_root_dir", tmp_path)
    interrupt = interrupting(moment, call, number)
    done = run_program(workplace, "train.py", *flags, *place, *interrupt, status=130)
    assert done.stderr.endswith("interrupted: the same command continues from here\n")
    assert load_model(tmp_path / "checkpoints/last.ckpt").updates == updates
    done = run_program(workplace, "train.py", *flags, *place)
    assert "continuing from" in done.stdout
    check_same_training(tmp_path, uninterrupted(*flags))


ACCUMULATING = ("--trainer.accumulate_grad_batches", 3, "--trainer.val_check_interval", 15)
RANKS = ("--trainer.devices", 2, "--trainer.strategy", "ddp")


@pytest.mark.parametrize(
    ("changed", "moment", "call"),
    [
        (ACCUMULATING, "on_train_batch_end", 17),
        (("--data.num_workers", 2), "on_validation_batch_end", 4),
        (RANKS, "on_train_batch_end", 7),
    ],
    ids=["accumulation", "workers", "ranks"],
)
def test_interrupted_training_in_other_ways(
    workplace, run_program, uninterrupted, tmp_path, changed, moment, call
):
    flags = (*WITH_DROPOUT, *UPDATES, "--trainer.max_steps", 20, *changed)
    place = ("--trainer.default_root_dir", tmp_path)
    interrupt = interrupting(moment, call, signal.SIGINT)
    run_program(workplace, "train.py", *flags, *place, *interrupt, status=130)
    run_program(workplace, "train.py", *flags, *place)
    check_same_training(tmp_path, uninterrupted(*flags))


def test_killed_training_goes_on_with_the_same_numbers(
    workplace, run_program, uninterrupted, tmp_path
):
    """From a checkpoint that was saved on the way; killed again before the next update is made."""
    flags = (*WITH_DROPOUT, *UPDATES, *ACCUMULATING, "--checkpoint_every", 4)
    place = ("--trainer.default_root_dir", tmp_path)
    for moment, call in (("on_train_batch_end", 14), ("on_train_batch_end", 2)):
        kill = interrupting(moment, call, signal.SIGKILL)
        run_program(workplace, "train.py", *flags, *place, *kill, status=-signal.SIGKILL)
        assert load_model(tmp_path / "checkpoints/last.ckpt").updates == 4
    run_program(workplace, "train.py", *flags, *place)
    check_same_training(tmp_path, uninterrupted(*flags))


def test_diverged_training_stops_and_keeps_its_checkpoints(workplace, run_program, tmp_path):
    """A learning rate that throws the weights beyond all bounds after the first updates."""
    flags = (*HERE, "--trainer.default_root_dir", tmp_path, "--checkpoint_every", 2)
    flags = (*flags, "--model.warmup_updates", 3, "--model.schedule", "inverse_sqrt")
    done = run_program(workplace, "train.py", *flags, "--model.lr", 1e38, status=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "the training has diverged at update" in errors[0]
    assert "Traceback" not in done.stderr
    for checkpoint in (tmp_path / "checkpoints").glob("*"):
        load_model(checkpoint)  # refuses weights that are not finite
    assert not (tmp_path / "training.json").exists()


def test_weights_that_are_not_finite_are_refused(refused, workplace, tmp_path):
    checkpoint = torch.load(workplace / CKPT[1], weights_only=True)
    checkpoint["state_dict"]["decoder.layers.0.fc1.bias"][3] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    sentence = refused(evaluate, *HERE, "--ckpt_path", tmp_path / "nan.ckpt")
    assert "decoder.layers.0.fc1.bias are not finite" in sentence


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--checkpoint_every", 0, ("--checkpoint_every is 0", "at least 1")),
        ("--checkpoint_every", -1, ("--checkpoint_every is -1", "at least 1")),
        ("--trainer.log_every_n_steps", 0, ("--trainer.log_every_n_steps is 0", "at least 1")),
        ("--trainer.accumulate_grad_batches", 0, ("accumulate_grad_batches is 0", "at least 1")),
        ("--trainer.max_steps", 0, ("--trainer.max_steps is 0", "trains nothing")),
        ("--trainer.limit_train_batches", 0, ("limit_train_batches is 0", "trains nothing")),
        ("--trainer.check_val_every_n_epoch", 1, ("val_check_interval is 500", "13 batches")),
    ],
)
def test_settings_that_leave_nothing_to_train(refused, workplace, tmp_path, flag, value, words):
    run = tmp_path / "run"
    sentence = refused(train, *HERE, "--trainer.default_root_dir", run, flag, value)
    assert all(word in sentence for word in words), sentence
    assert not run.exists()


def test_a_training_that_ends_before_its_first_validation_has_one(workplace, run_program, tmp_path):
    """Also where that validation is interrupted."""
    flags = (*HERE, "--trainer.default_root_dir", tmp_path, "--trainer.max_steps", 3)
    stop = interrupting("on_validation_batch_end", 4, signal.SIGINT)  # after two as a check
    run_program(workplace, "train.py", *flags, *stop, status=130)
    assert not (tmp_path / "checkpoints/best.ckpt").exists()
    run_program(workplace, "train.py", *flags)
    assert load_model(tmp_path / "checkpoints/best.ckpt").updates == 3
    # Logged once, at the third update, counted from 0.
    assert [event.step for event in scalars(tmp_path / "train")["val/ppl"]] == [2]


def test_one_training_at_a_time(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "LOCK_PATIENCE", 0)
    with Lock(tmp_path / ".training.lock"):
        sentence = refused(train, *HERE, "--trainer.default_root_dir", tmp_path)
    assert "another training goes on in this directory" in sentence


@pytest.fixture
def copied_run(workplace, tmp_path):
    """Checkpoints of a copy of the workplace's run, to be damaged."""
    return shutil.copytree(workplace / "runs/words", tmp_path / "run") / "checkpoints"


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_a_damaged_last_checkpoint_is_left_aside(workplace, run_program, copied_run, damage):
    last = copied_run / "last.ckpt"
    content = last.read_bytes()
    damaged = {"empty": b"", "cut": content[: len(content) // 2], "text": b"a text"}[damage]
    flags = (*HERE, "--trainer.default_root_dir", copied_run.parent, "--trainer.max_steps", 42)
    last.write_bytes(damaged)
    done = run_program(workplace, "train.py", *flags)
    assert f"{last}: cannot be read as a checkpoint" in done.stdout
    assert f"continuing from {copied_run / 'best.ckpt'}" in done.stdout
    assert load_model(last).updates == 42
    for checkpoint in copied_run.iterdir():
        checkpoint.write_bytes(damaged)
    done = run_program(workplace, "train.py", *flags, status=2)
    assert f"error: {last}: cannot be read as a checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_checkpoints_that_do_not_fit(refused, workplace, tmp_path):
    last = workplace / "runs/words/checkpoints/last.ckpt"
    place = ("--trainer.default_root_dir", tmp_path / "run", "--ckpt_path")
    sentence = refused(train, *HERE, *place, last, "--model.layers", 2, "--model.ffn_width", 48)
    assert "has the shape" in sentence
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["dictionary"] = "another"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    sentence = refused(train, *HERE, *place, tmp_path / "other.ckpt")
    assert "was trained with a dictionary of 48 symbols (another)" in sentence
    elsewhere = shutil.copy(last, tmp_path)  # over a run that is there already
    assert f"to go on from, not {elsewhere}" in refused(train, *HERE, "--ckpt_path", elsewhere)
    assert "seed_everything 1" in refused(train, *HERE, "--seed_everything", 2)
