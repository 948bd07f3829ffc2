"""The comparison with the original: on its reference outputs where they are at hand, and on a
small fixture of the same layout, made here by brute force."""

import json
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from small import ROOT, write_corpus

from benchmarks.fidelity import Fixtures, above_tolerance, main, run
from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.originals.databin import write_databin
from neighborlm.originals.fairseq import export_args, export_state_dict
from neighborlm.programs.corpora import CorpusDataModule
from neighborlm.retrieval.search.index import read_index

REFERENCE = ROOT.parent / "shared" / "parity" / "knnlm"


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference outputs are not at hand")
def test_reference_outputs(tmp_path):
    cases = [  # of the LM alone see tests/originals/test_fairseq.py
        "knn_mini_flat_k8_l0.25",
        "knn_mini_ivfpq_k64_l0.25_p1",  # with missing neighbours
        "knn_mini_ivfpq_k64_l0.25_p32_norec",
    ]
    rows = run(REFERENCE, tmp_path / "fidelity.json", cases)
    assert [row["case"] for row in rows] == cases
    for row in rows:
        assert row["ours"]["loss_base2"] == row["original"]["loss_base2"], row
        # The original adds up in fp32, which moves its second decimal.
        assert float(row["ours"]["ppl"]) == pytest.approx(float(row["original"]["ppl"]), abs=0.011)
        # A near tie at the k-th place may put another neighbour in for a token.
        assert row["largest_difference"]["mixed_tokens_above_1e-3"] <= 2, row


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference outputs are not at hand")
def test_a_datastore_that_is_not_there_is_made_as_the_original_makes_it(tmp_path):
    lacking, scratch = tmp_path / "lacking", tmp_path / "scratch"
    lacking.mkdir()
    scratch.mkdir()
    for name in ("expected.json", "checkpoint.pt", "data-bin"):
        (lacking / name).symlink_to(REFERENCE / name)
    values = np.fromfile(REFERENCE / "dstore_mini_vals.npy", np.int64)
    np.save(lacking / "dstore_mini_vals.npy", values.astype(np.int16))
    fixtures = Fixtures(lacking, scratch)
    keys = fixtures.datastore("mini", 18958).keys
    expected = np.fromfile(REFERENCE / "dstore_mini_keys.npy", np.float32).reshape(keys.shape)
    np.testing.assert_allclose(keys, expected, atol=1e-5)
    index = read_index(fixtures.artifacts("mini") / "knn_mini.index")
    assert (index.ntotal, index.nlist, index.pq.M) == (18958, 64, 16)


@pytest.fixture(params=[24, 48])
def fixture(tmp_path, request):
    """A folder in the layout of the reference outputs: one LM case, one exact kNN case. Its rows
    have 24 tokens; its checkpoint reads so many or, as others do, more."""
    folder = tmp_path / "fixture"
    corpus = write_corpus(tmp_path / "words", seed=3, lines=(60, 12, 12))
    data = LMDataModule(str(corpus), cache_dir=str(tmp_path / "cache"))
    for split in ("train", "valid", "test"):
        write_databin(data.stream(split), folder / "data-bin" / split, data.vocab_size)
    data.dictionary.save(folder / "data-bin" / "dict.txt")
    torch.manual_seed(0)
    model = TransformerLM(
        data.vocab_size, 16, 32, 2, 2, adaptive_input_cutoffs=[12, 24],
        adaptive_softmax_cutoffs=[12, 24], max_target_positions=request.param, dropout=0.0,
    ).eval()  # fmt: skip
    args = Namespace(**{**vars(export_args(model)), "tokens_per_sample": 24})
    saved = {"args": args, "model": export_state_dict(model)}
    torch.save(saved, folder / "checkpoint.pt")

    tokens = torch.from_numpy(data.stream("valid").tokens.astype(np.int64))
    inputs = torch.cat([torch.tensor([2]), tokens[:-1]])
    log_probs, queries = [], []
    with torch.no_grad():
        for start in range(0, len(tokens), 16):  # blocks of 16 behind up to 8 tokens of context
            begin = max(start - 8, 0)
            row, block = inputs[None, begin : start + 16], tokens[start : start + 16]
            hidden, features = model.hidden(row, ("last_ffn_input",))
            full = model.softmax.log_prob(hidden[0, start - begin :])
            log_probs.append(full.gather(1, block[:, None])[:, 0])
            queries.append(features["last_ffn_input"][0, start - begin :])
    lm, queries = torch.cat(log_probs).numpy(), torch.cat(queries).numpy()

    rng = np.random.default_rng(0)
    keys = queries[rng.integers(0, len(queries), 50)] + rng.normal(0, 0.1, (50, 16))
    keys = keys.astype(np.float32)
    values = tokens.numpy()[rng.integers(0, len(tokens), (50, 1))]
    keys.tofile(folder / "dstore_toy_keys.npy")
    values.tofile(folder / "dstore_toy_vals.npy")
    distances = ((queries[:, None].astype(np.float64) - keys) ** 2).sum(-1)
    nearest = np.argsort(distances, axis=1)[:, :10]
    weights = np.exp(-np.take_along_axis(distances, nearest, 1))
    p_knn = (weights * (values[nearest, 0] == tokens.numpy()[:, None])).sum(1) / weights.sum(1)
    with np.errstate(divide="ignore"):
        knn = np.maximum(np.log(p_knn), -10000)
    mixed = np.log(0.4 * p_knn + 0.6 * np.exp(lm))

    npz = folder / "npz"
    npz.mkdir()
    deltas = np.append(0, np.ones(len(lm) - 1, dtype=int))
    np.savez(npz / "lm_valid.npz", position=deltas, token=tokens, score=lm)
    np.savez(npz / "knn_toy_flat.npz", score=mixed, knn_score=knn)
    args = ["data-bin", "--gen-subset", "valid", "--context-window", "8"]
    knn_args = [*args, "--dstore-filename", "ds/A_toy", "--dstore-size", "50", "--indexfile"]
    knn_args += ["ds/A_toy_flat.index", "--k", "10", "--lmbda", "0.4", "--knnlm"]

    def printed(scores) -> dict:
        loss = -scores.astype(np.float64).mean() / np.log(2)
        return {"loss_base2_printed": f"{loss:.4f}", "ppl_printed": f"{2**loss:.2f}"}

    expected = {
        "lm_valid": {"args": args, **printed(lm)},
        "knn_toy_flat": {"args": knn_args, **printed(mixed)},
        "info": {},
    }
    (folder / "expected.json").write_text(json.dumps(expected))
    return folder


def test_small_fixture(fixture, tmp_path):
    rows = run(fixture, tmp_path / "fidelity.json")
    assert [row["case"] for row in rows] == ["lm_valid", "knn_toy_flat"]
    for row in rows:
        # Two orders of adding up may print the last decimal differently.
        ours, original = (
            [float(row[who][name]) for name in ("loss_base2", "ppl")]
            for who in ("ours", "original")
        )
        assert ours == pytest.approx(original, rel=1e-5)
        assert max(row["largest_difference"].values()) < 1e-4
        assert row["above_tolerance"] == []
    assert json.loads((tmp_path / "fidelity.json").read_text()) == rows


def test_rows_are_of_the_length_that_the_command_line_overrides(fixture, tmp_path):
    described = json.loads((fixture / "expected.json").read_text())
    described["lm_valid"]["args"] += ["--model-overrides", "{'tokens_per_sample': 20, 'x': None}"]
    (fixture / "expected.json").write_text(json.dumps(described))
    row = run(fixture, tmp_path / "fidelity.json", ["lm_valid"])[0]
    assert row["above_tolerance"] == ["lm", "loss_base2"]  # blocks of 12 behind 8 are others


def test_what_is_above_the_tolerance_is_the_exit_status(fixture, tmp_path, monkeypatch, capsys):
    flags = ["--fixtures", str(fixture), "--output", str(tmp_path / "fidelity.json")]
    monkeypatch.setattr(sys, "argv", ["fidelity", *flags])
    main()
    said = capsys.readouterr().out
    assert "tolerance: 1e-04 nats for each token of the LM" in said
    assert "all 2 cases are within it" in said
    path = fixture / "npz" / "lm_valid.npz"
    scores = dict(np.load(path))
    scores["score"][3] += 2e-4
    np.savez(path, **scores)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "above the tolerance: lm_valid: lm\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("differences", "same_index", "above"),
    [
        ({"lm": 9e-5, "loss_base2": 9e-5}, True, []),
        ({"lm": 2e-4, "loss_base2": 2e-4}, True, ["lm", "loss_base2"]),
        ({"lm": np.nan, "loss_base2": np.nan}, True, ["lm", "loss_base2"]),
        ({"knn": 0.5, "knn_tokens_above_1e-3": 4, "loss_base2": 0}, True, []),
        ({"mixed_tokens_above_1e-3": 5, "loss_base2": 0}, True, ["mixed_tokens_above_1e-3"]),
        ({"mixed_tokens_above_1e-3": 900, "loss_base2": 9e-3}, False, []),
        ({"mixed_tokens_above_1e-3": 900, "loss_base2": 2e-2}, False, ["loss_base2"]),
    ],
)
def test_tolerances(differences, same_index, above):
    assert above_tolerance(differences, 20_000, same_index) == above


def test_a_last_block_that_was_not_saved_stays_zero(fixture, tmp_path):
    """Its rows are in the original's datastore and index, but hold nothing."""
    data = CorpusDataModule(str(fixture / "data-bin"))
    tokens = data.stream("train").tokens.astype(np.int16)
    n_blocks = len(tokens) // 16  # rows of 24 behind 8 of context
    assert len(tokens) % 16 > 0
    values = np.append(tokens[16 : 16 * n_blocks], np.zeros(len(tokens) % 16, np.int16))
    np.save(fixture / "dstore_made_vals.npy", values)
    dumped = ["--gen-subset", "train", "--context-window", "8", "--dstore-mmap", "ds/A_made"]
    built = ["--faiss_index", "ds/A_made.index", "--ncentroids", "2", "--code_size", "4"]
    commands = {"dump": {"args": dumped}, "build": {"args": built}}
    (fixture / "expected.json").write_text(json.dumps(commands))
    fixtures = Fixtures(fixture, tmp_path)
    made = fixtures.artifacts("made")
    keys = np.fromfile(made / "dstore_made_keys.npy", np.float32).reshape(len(values), 16)
    assert (np.abs(keys).sum(1) > 0).tolist() == (values > 0).tolist()
    assert read_index(made / "knn_made.index").ntotal == len(values)
    values[5] += 1
    np.save(fixture / "dstore_made_vals.npy", values)
    (made / "dstore_made_keys.npy").unlink()
    with pytest.raises(InputError, match="other values than a row of 24 tokens with 8 of context"):
        Fixtures(fixture, tmp_path).artifacts("made")
