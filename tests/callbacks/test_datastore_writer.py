"""The dump through a real trainer: every token's own key, the same bytes after an interruption."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from small import write_corpus

from callbacks.datastore_writer import DatastoreWriter
from datamodules.lm import LMDataModule
from models.transformer_lm import TransformerLM
from retrieval.datastore import DatastoreBuilder


class Stop(Exception):
    """An interruption."""


class StopAfter(pl.Callback):
    """Interrupts a prediction after some batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_) -> None:
        if batch_idx + 1 == self.batches:
            raise Stop


@pytest.fixture
def parts(tmp_path):
    """A corpus and a model that returns keys."""
    corpus = write_corpus(tmp_path / "words")
    data = LMDataModule(
        str(corpus),
        tokens_per_sample=16,
        context_window=8,
        max_tokens=64,
        cache_dir=str(tmp_path / "cache"),
    )
    torch.manual_seed(0)
    model = TransformerLM(data.vocab_size, 16, 32, 2, 2, dropout=0.0)
    model.key_type = "layer:0:ffn_input"
    return data, model


def dump(data, model, path, min_context=0, callbacks=()):
    rows = data.rows("train", data.context_window)
    builder = DatastoreBuilder(
        path,
        len(data.stream("train").tokens),
        16,
        "fp32",
        data.vocab_size,
        {},
        rows.behind_less_context(min_context),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[DatastoreWriter(builder, sync_seconds=0.0), *callbacks],
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    loader = data.evaluation_dataloader("train", skip=builder.is_written)
    trainer.predict(model, loader, return_predictions=False)
    return len(loader)


def test_every_token_has_its_own_key(parts, tmp_path):
    data, model = parts
    dump(data, model, tmp_path / "s", min_context=5)
    keys, values = np.load(tmp_path / "s/keys.npy"), np.load(tmp_path / "s/values.npy")
    tokens = data.stream("train").tokens.astype(np.int64)
    model.eval()
    for start in range(0, len(tokens), 8):
        begin = max(start - 8, 0)
        row = np.append(2, tokens[:-1])[begin : start + 8]
        with torch.no_grad():
            _, features = model(torch.from_numpy(row)[None], (model.key_type,))
        expected = features[model.key_type][0, start - begin :].numpy()
        if start == 0:
            expected[:5] = 0  # less left context than asked for
        np.testing.assert_allclose(keys[start : start + 8], expected, atol=1e-5)
    np.testing.assert_array_equal(values[5:], tokens[5:])
    assert np.load(tmp_path / "s/masked.npy").tolist() == [0, 1, 2, 3, 4]


def test_interrupted_dump_goes_on_to_the_same_bytes(parts, tmp_path):
    data, model = parts
    batches = dump(data, model, tmp_path / "whole")
    with pytest.raises(Stop):
        dump(data, model, tmp_path / "cut", callbacks=[StopAfter(5)])
    rest = dump(data, model, tmp_path / "cut")
    assert rest == batches - 5
    for name in ("keys.npy", "values.npy"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
