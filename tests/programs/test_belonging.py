"""A model, a corpus and a run that do not belong together are refused, from Python as well."""

import shutil
from pathlib import Path

import pytest
import torch
from small import SMALL

from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs import train as program
from neighborlm.programs.belonging import check_continuation, remark_on_end
from neighborlm.programs.checkpoints import load_model
from neighborlm.programs.run import Run
from neighborlm.programs.subject import Subject
from neighborlm.programs.training import read_checkpoint, train

BEST, LAST = "runs/words/checkpoints/best.ckpt", Path("runs/words/checkpoints/last.ckpt")
QUIET = {"enable_progress_bar": False, "logger": False, "max_steps": 1}


@pytest.fixture(autouse=True)
def there(workplace, monkeypatch) -> None:
    monkeypatch.chdir(workplace)


@pytest.fixture
def corpus(tmp_path):
    """Makes the corpus anew with another text, under the name that it had."""

    def make(change) -> LMDataModule:
        folder = shutil.copytree("words", tmp_path / "words")
        for path in folder.glob("*.txt"):
            path.write_text(change(path.read_text()))
        return LMDataModule(str(folder), tokens_per_sample=24, cache_dir=str(tmp_path / "cache"))

    return make


def renamed(text: str) -> str:
    """Each word another one, and as many of them."""
    return text.replace("w", "v")


def longer(text: str) -> str:
    return text + "a b c d e f g h i\n"


def turned(text: str) -> str:
    """The same lines in another order."""
    return "".join(reversed(text.splitlines(keepends=True)))


OTHER_DICTIONARIES = [(renamed, "48 symbols", "one of 48"), (longer, "48 symbols", "one of 56")]


@pytest.mark.parametrize(("change", "had", "found"), OTHER_DICTIONARIES)
def test_another_dictionary(corpus, tmp_path, change, had, found):
    """Also of as many symbols; for what is evaluated, gone on from, and stood upon."""
    data, run = corpus(change), Run(tmp_path / "run", QUIET)
    lm, new = load_model(BEST), TransformerLM(data.vocab_size, 16, 32, 2, 2)
    attempts = {
        "evaluated": lambda: Subject(lm, data, run),
        "trained": lambda: train(lm, data, run),
        "gone on from": lambda: train(new, data, run, ckpt_path=LAST),
        "stood upon": lambda: train(GNNLM(lm, heads=2), data, run),
    }
    for attempt in attempts.values():
        with pytest.raises(InputError) as refusal:
            attempt()
        sentence = str(refusal.value)
        assert sentence.startswith("runs/words/checkpoints/"), sentence
        for words in (had, found, str(tmp_path / "words"), "runs/words/dict.txt"):
            assert words in sentence, sentence
    assert not (tmp_path / "run").exists()


def test_another_text_under_a_run(corpus, tmp_path):
    """The dictionary is the same. Another run's weights may be trained on it."""
    data, model = corpus(turned), load_model(BEST)
    checkpoint = read_checkpoint(LAST)
    fits = (checkpoint, LAST, model, data)
    with pytest.raises(InputError, match=r"last.ckpt: was trained on another text than .*words"):
        check_continuation(*fits, Run("runs/words", QUIET))
    check_continuation(*fits, Run(tmp_path, QUIET))
    check_continuation(checkpoint, LAST, model, LMDataModule("words"), Run("runs/words", QUIET))
    del checkpoint["corpus"]  # as in those of version 0.1
    check_continuation(*fits, Run("runs/words", QUIET))


def test_rows_longer_than_the_model_reads(tmp_path):
    data = LMDataModule("words", tokens_per_sample=64)
    model = TransformerLM(data.vocab_size, 16, 32, 2, 2, max_target_positions=32)
    for attempt in (Subject, lambda *of: train(*of)):
        with pytest.raises(InputError, match=r"--data.tokens_per_sample is 64.* at most 32 tokens"):
            attempt(model.eval(), data, Run(tmp_path, QUIET))


def test_a_moved_corpus_is_the_same(tmp_path, capsys):
    """The run goes on; it is over, and what of it is otherwise now is named."""
    run = shutil.copytree("runs/words", tmp_path / "run")
    moved = shutil.copytree("words", tmp_path / "moved")
    steps = ("--trainer.max_steps", "40", "--trainer.val_check_interval", "20")
    flags = [*SMALL, *steps, "--trainer.default_root_dir", str(run), "--data.corpus", str(moved)]
    before = (run / "checkpoints/best.ckpt").read_bytes()
    program.main([*flags, "--trainer.gradient_clip_val", "2"])
    said = capsys.readouterr().out
    for words in (
        "was begun with --trainer.gradient_clip_val 1.0, and goes on with 2",
        f"continuing from {run}/checkpoints/last.ckpt",
        f"{run}: has been trained as long as --trainer.max_steps 40 allows, by 40 updates",
    ):
        assert words in said
    assert (run / "checkpoints/best.ckpt").read_bytes() == before


def test_a_moved_run_keeps_its_best_model_until_there_is_a_better_one(tmp_path, capsys):
    run = shutil.copytree("runs/words", tmp_path / "moved")
    best, last = run / "checkpoints/best.ckpt", run / "checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    (state,) = (s for s in checkpoint["callbacks"].values() if s.get("monitor"))
    state["best_model_score"] = torch.tensor(1.5)  # which no other will have
    torch.save(checkpoint, last)
    before = best.read_bytes()
    flags = [*SMALL, "--data.corpus", "words", "--trainer.default_root_dir", str(run)]
    flags += ["--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "1"]
    program.main([*flags, "--trainer.max_steps", "41"])
    assert f"lowest validation perplexity 1.50: {best}" in capsys.readouterr().out
    assert best.read_bytes() == before
    best.unlink()
    program.main([*flags, "--trainer.max_steps", "42"])
    assert f"{best}: is missing; the next model that is validated" in capsys.readouterr().out
    assert torch.load(best, weights_only=True)["global_step"] == 42


@pytest.mark.parametrize(("seconds", "over"), [(59.0, False), (60.5, True)])
def test_the_time_of_a_run_is_over(tmp_path, capsys, seconds, over):
    run = Run(tmp_path, {**QUIET, "max_steps": -1, "max_time": "00:00:01:00"})
    state = {"Timer": {"time_elapsed": {"train": seconds}}}
    remark_on_end({"global_step": 7, "callbacks": state}, run.trainer(), run)
    said = capsys.readouterr().out
    assert ("as long as --trainer.max_time 00:00:01:00 allows, by 7 updates" in said) == over
