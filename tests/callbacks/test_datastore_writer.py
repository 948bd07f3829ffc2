"""The dump through a real trainer: every token's own key, the same bytes after an interruption."""

import itertools

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from small import write_corpus

from neighborlm.callbacks.datastore_writer import DatastoreWriter
from neighborlm.callbacks.index_builder import IndexBuilder
from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.scorer import Scorer
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.retrieval.search import Search
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.sharded_builder import new_datastore


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
    corpus = write_corpus(tmp_path / "words", lines=(40, 5, 5))
    data = LMDataModule(
        str(corpus),
        tokens_per_sample=16,
        context_window=8,
        max_tokens=64,
        cache_dir=str(tmp_path / "cache"),
    )
    torch.manual_seed(0)
    return data, TransformerLM(data.vocab_size, 16, 32, 2, 2, dropout=0.0)


def dump(
    data,
    model,
    path,
    key_type="layer:0:ffn_input",
    min_context=0,
    callbacks=(),
    dtype="fp32",
    sync_seconds=0.0,
    **sharding,
):
    rows, n_tokens = data.rows("train", data.context_window), len(data.stream("train").tokens)
    masked = rows.behind_less_context(min_context), rows.dropped(n_tokens)
    masked = np.sort(np.concatenate(masked))
    builder = new_datastore(path, n_tokens, 16, dtype, data.vocab_size, {}, masked, **sharding)
    writer = DatastoreWriter(builder, key_type, sync_seconds)
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[writer, *callbacks],
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    wanted = builder.is_wanted() if "only" in sharding else None
    loader = data.evaluation_dataloader("train", builder.is_written, wanted)
    trainer.predict(Scorer(model, writer.want), loader, return_predictions=False)
    return len(loader)


def test_every_token_has_its_own_key(parts, tmp_path):
    data, model = parts
    dump(data, model, tmp_path / "s", min_context=5)
    keys, values = np.load(tmp_path / "s/keys.npy"), np.load(tmp_path / "s/values.npy")
    tokens = data.stream("train").tokens.astype(np.int64)
    model.eval()
    key_type = "layer:0:ffn_input"
    for start in range(0, len(tokens), 8):
        begin = max(start - 8, 0)
        row = np.append(2, tokens[:-1])[begin : start + 8]
        with torch.no_grad():
            _, features = model.hidden(torch.from_numpy(row)[None], (key_type,))
        expected = features[key_type][0, start - begin :].numpy()
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


def test_stored_is_what_enters_the_last_feed_forward_block(parts, tmp_path):
    """Caught on its way into the layer, batch by batch; whole lines this time, sorted by length."""
    data, model = parts
    data.break_mode = "complete"
    caught, expected = [], {}
    model.decoder.layers[-1].fc1.register_forward_pre_hook(lambda _, x: caught.append(x[0]))

    class Watch(pl.Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, *_) -> None:
            keys = caught.pop().numpy()
            for at in np.argwhere(batch.scored.numpy()):
                position = int(batch.positions[tuple(at)])
                assert position not in expected  # every token once
                expected[position] = keys[tuple(at)]

    dump(data, model, tmp_path / "s", "last_ffn_input", callbacks=[Watch()], dtype="fp16")
    store = Datastore.open(tmp_path / "s")
    assert sorted(expected) == list(range(len(store)))
    by_row = np.stack([expected[row] for row in range(len(store))])
    np.testing.assert_array_equal(store.keys, by_row.astype(np.float16))
    np.testing.assert_array_equal(store.values, data.stream("train").tokens)


@pytest.mark.parametrize("mode", ["none", "complete", "eos"])
@pytest.mark.parametrize("min_context", [0, 5, 100])
def test_tokens_behind_less_context(parts, mode, min_context):
    data, _ = parts
    data.break_mode = mode
    rows = data.rows("train", data.context_window)
    expected = [
        offset
        for begin, start, end in zip(rows.context_starts, rows.starts, rows.ends, strict=True)
        for offset in range(start, end)
        if offset - begin < min_context
    ]
    assert rows.behind_less_context(min_context).tolist() == expected


def test_an_interruption_keeps_what_was_not_synced_yet(parts, tmp_path):
    data, model = parts
    batches = dump(data, model, tmp_path / "whole")
    with pytest.raises(Stop):
        dump(data, model, tmp_path / "cut", callbacks=[StopAfter(4)], sync_seconds=1e9)
    assert dump(data, model, tmp_path / "cut", sync_seconds=1e9) == batches - 4


def test_index_follows_the_datastore_in_the_same_run(parts, tmp_path):
    data, model = parts
    index = IndexBuilder(tmp_path / "s", Search("IVF4,SQ8", "l2"))
    dump(data, model, tmp_path / "s", callbacks=[index])
    assert (tmp_path / "s" / "IVF4_SQ8-l2.faiss").is_file()
    assert index.seconds["add"] > 0


@pytest.fixture
def overflowing(parts):
    """The same, but from the fourth batch on keys are beyond half precision."""
    data, model = parts
    sound, batches = model.score, itertools.count()

    def score(batch, want):
        scored = sound(batch, want)
        factor = 1e6 if next(batches) >= 3 else 1
        return scored._replace(keys={name: keys * factor for name, keys in scored.keys.items()})

    model.score = score
    return data, model


def test_errors_of_the_writing_thread_surface(overflowing, tmp_path):
    with pytest.raises(InputError, match=r"--knn.dtype fp32"):
        dump(*overflowing, tmp_path / "s", dtype="fp16")


def test_what_was_written_before_an_error_is_kept(overflowing, tmp_path):
    with pytest.raises(InputError):
        dump(*overflowing, tmp_path / "s", dtype="fp16", sync_seconds=1e9)
    assert np.load(tmp_path / "s" / "written.npy").sum() > 0


def test_a_store_that_only_lacks_its_mark_is_finished(parts, tmp_path):
    """Interrupted after the last batch."""
    data, model = parts
    batches = dump(data, model, tmp_path / "whole")
    with pytest.raises(Stop):
        dump(data, model, tmp_path / "cut", callbacks=[StopAfter(batches)])
    assert dump(data, model, tmp_path / "cut") == 0
    assert Datastore.is_complete(tmp_path / "cut")


@pytest.mark.parametrize("kind", ["contiguous", "round_robin"])
@pytest.mark.parametrize(("mode", "drop"), [("none", False), ("complete", False), ("eos", True)])
def test_a_shard_alone_is_computed_from_its_own_rows(parts, tmp_path, kind, mode, drop):
    """Where lines are sorted by length, batches of the whole split would hold rows of all shards.
    Rows that straddle shards are computed for both."""
    data, model = parts
    data.break_mode, data.drop_long_lines, data.max_target_positions = mode, drop, 10
    batches = dump(data, model, tmp_path / "whole", min_context=2)
    whole = Datastore.open(tmp_path / "whole")
    assert not drop or len(whole.masked) > 100
    dealt = {"shards": 3, "kind": kind, "block_rows": 64}
    steps = [
        dump(data, model, tmp_path / "parts", min_context=2, only=number, **dealt)
        for number in range(3)
    ]
    made = Datastore.open(tmp_path / "parts")
    assert made.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(made.masked, whole.masked)
    np.testing.assert_array_equal(made.values, whole.values)
    np.testing.assert_allclose(made.keys, whole.keys, rtol=1e-4, atol=1e-5)
    assert sum(steps) < 2 * batches


def test_a_dump_into_shards_goes_on_to_the_same_bytes(parts, tmp_path):
    data, model = parts
    data.break_mode = "complete"
    dealt = {"shards": 3, "kind": "round_robin", "block_rows": 16}
    batches = dump(data, model, tmp_path / "whole")
    with pytest.raises(Stop):
        dump(data, model, tmp_path / "cut", callbacks=[StopAfter(5)], **dealt)
    assert dump(data, model, tmp_path / "cut", **dealt) == batches - 5
    whole, cut = (Datastore.open(tmp_path / name) for name in ("whole", "cut"))
    np.testing.assert_array_equal(cut.keys, whole.keys)
    np.testing.assert_array_equal(cut.values, whole.values)
