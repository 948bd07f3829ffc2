"""The benchmark of an accelerator, at a tiny size."""

import json

import pytest
import torch

from benchmarks import gpu

SMALL = (
    *("--made_up.train_tokens", 9000, "--made_up.test_tokens", 1500, "--made_up.words", 800),
    *("--made_up.width", 16, "--made_up.layers", 2, "--updates", 4, "--threads", 1, "--k", 8),
    *("--lists", 8, "--nprobe", 4, "--data.tokens_per_sample", 64, "--data.context_window", 32),
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_stage(tmp_path, measure):
    measure(gpu, "--output", "gpu.json", *SMALL)
    rows = {row["title"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    assert len(rows) == 11
    assert min(row["tokens_per_second"] for row in rows.values()) > 0
    ppl = [rows[f"kNN-LM, {index}"]["ppl"] for index in ("faiss", "torch")]
    assert ppl[0] == pytest.approx(ppl[1], rel=0.05)


def test_what_the_time_does_not_suffice_for_is_left_out(tmp_path, measure, capsys):
    short = ("--accelerator", "cpu", "--seconds", 0.1)
    measure(gpu, "--output", "gpu.json", *short, *SMALL)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert rows[0]["tokens_per_second"] > 0
    assert rows[1:] == [{"title": row["title"]} for row in rows[1:]]
    assert "LM training, bf16: left out, as 0.1 seconds do not suffice" in capsys.readouterr().out
