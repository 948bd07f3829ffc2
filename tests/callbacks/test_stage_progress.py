"""What a training and an evaluation say where there is no terminal."""

import re

from small import write_corpus

from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs.run import Run
from neighborlm.programs.subject import Subject, score
from neighborlm.programs.training import train

FIGURES = r"loss \d\.\d{3}, perplexity [\d.]+"
LEFT, RATE = r"\d+:\d\d:\d\d left", r"[\d,]+ tokens/s"


def test_lines_of_a_training_and_of_a_pass(tmp_path, capsys):
    rows = {"tokens_per_sample": 24, "max_tokens": 240, "cache_dir": str(tmp_path / "cache")}
    data = LMDataModule(str(write_corpus(tmp_path / "words")), **rows)
    model = TransformerLM(data.vocab_size, width=8, ffn_width=8, layers=1, heads=1)
    every = {"val_check_interval": 4, "check_val_every_n_epoch": None, "log_every_n_steps": 2}
    run = Run(tmp_path / "run", {"max_steps": 5, "enable_model_summary": False, **every})
    capsys.readouterr()
    train(model, data, run)
    expected = [
        r"model: [\d,]+ parameters, [\d,]+ of them trained",
        rf"training on words: 2 of 5 updates, {LEFT}, epoch 1, {FIGURES}, {RATE}",
        rf"training on words: 4 of 5 updates, {LEFT}, epoch 1, {FIGURES}, {RATE}",
        rf"validation at update 4: {FIGURES}",
        rf"training on words: 5 of 5 updates, epoch 1, {FIGURES}, {RATE}, in \d+:\d\d:\d\d",
    ]
    check(capsys.readouterr().out, expected)
    found = score(Subject(model.eval(), data, run), "test")
    ppl = f"{found.results['ppl']:,.2f}"
    batches = r"evaluating test: (\d+) of \1 batches"
    expected += [rf"{batches}, loss \d\.\d{{3}}, perplexity {ppl}, {RATE}, in \d+:\d\d:\d\d"]
    check(capsys.readouterr().out, expected[-1:])
    lines = (tmp_path / "run/log.txt").read_text().splitlines()
    assert "command: " in lines.pop(0)
    check("\n".join(line[len("2026-01-31 12:00:00 ") :] for line in lines), expected)


def check(said: str, expected: list[str]) -> None:
    """Line by line, and nothing else."""
    lines = said.splitlines()
    assert len(lines) == len(expected), said
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
