"""A model saved by Lightning comes back the same; other files are refused without running them."""

import pickle
import time
from threading import Thread

import pytest
import pytorch_lightning as pl
import torch

from neighborlm.common.contracts import Want
from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs.checkpoints import load_model
from neighborlm.programs.training import read_checkpoint

SMALL = {
    **{"width": 8, "ffn_width": 12, "layers": 2, "heads": 2, "dropout": 0.3},
    **{"adaptive_input_cutoffs": (4, 7, 1000), "adaptive_softmax_cutoffs": (4, 7, 1000)},
    **{"adaptive_input_factor": 2, "adaptive_softmax_factor": 2, "adam_betas": (0.8, 0.9)},
}


def make(seed: int = 0, **settings) -> TransformerLM:
    torch.manual_seed(seed)
    return TransformerLM(**{"vocab_size": 16, **SMALL, **settings})


def contents(model: TransformerLM) -> dict:
    """What of Lightning's layout `load_model` reads."""
    return {"hyper_parameters": dict(model.hparams), "state_dict": model.state_dict()}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(contents(make()), path)
    return path


def test_saved_by_lightning(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("a b c d e f g h i\n" * 3)
    data = LMDataModule(str(tmp_path), tokens_per_sample=8, cache_dir=str(tmp_path / "cache"))
    model = make(vocab_size=data.vocab_size)
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")

    loaded = load_model(tmp_path / "model.ckpt")
    assert not loaded.training
    assert loaded.updates == trainer.global_step > 0
    assert loaded.dictionary_fingerprint == data.dictionary.fingerprint
    assert dict(loaded.hparams) == dict(model.hparams)
    assert loaded.hparams.adaptive_input_cutoffs == [4, 7]
    assert loaded.softmax.words[1] is loaded.decoder.embedding.embeddings[1].weight
    assert loaded.fingerprint == model.fingerprint
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(
        loaded.score(batch, Want()).log_probs, model.eval().score(batch, Want()).log_probs
    )


def test_a_compiled_model_is_loaded_uncompiled(saved):
    model = make()
    torch.save({**contents(model), "hyper_parameters": {**model.hparams, "compile": True}}, saved)
    assert load_model(saved).hparams.compile is False


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.ckpt: no such checkpoint"):
        load_model(tmp_path / "none.ckpt")
    with pytest.raises(InputError, match="is a folder"):
        load_model(tmp_path)


def spoil(name: str, path) -> None:
    """Makes of a checkpoint another file."""
    model = make()
    others = {
        "no weights": {"hyper_parameters": dict(model.hparams)},
        "no settings": {"state_dict": model.state_dict()},
        "weights of another width": {**contents(model), "state_dict": make(width=4).state_dict()},
        "a weight too few": {
            **contents(model),
            "state_dict": dict(list(model.state_dict().items())[1:]),
        },
        "another module": {**contents(model), "hyper_parameters": {"hidden": 3}},
        "a list": [torch.ones(2)],
    }
    if name in others:
        torch.save(others[name], path)
    elif name == "half a file":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes({"empty": b"", "text": b"the cat\n", "zip": b"PK\x03\x04"}[name])


@pytest.mark.parametrize(
    "name",
    [
        *("empty", "text", "zip", "half a file", "no weights", "no settings", "a list"),
        *("weights of another width", "a weight too few", "another module"),
    ],
)
def test_what_is_no_checkpoint(saved, name):
    assert load_model(saved)
    spoil(name, saved)
    with pytest.raises(InputError, match="cannot be read as a checkpoint") as error:
        load_model(saved)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [load_model, read_checkpoint])
def test_a_want_of_memory_is_no_damage(saved, monkeypatch, read):
    """Else a training would go on from its best checkpoint in the place of the last."""

    def no_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(RuntimeError, match="can't allocate"):
        read(saved)


def test_one_that_is_replaced_meanwhile_is_the_old_one_or_the_new(saved, tmp_path):
    """As by a training that finds a better model."""
    models = make(), make(seed=1)
    copies = [tmp_path / f"copy-{number}" for number in range(40)]
    for number, copy in enumerate(copies):
        torch.save(contents(models[number % 2]), copy)
    replacing = Thread(target=lambda: [(copy.rename(saved), time.sleep(0.01)) for copy in copies])
    replacing.start()
    loaded = [load_model(saved)]
    while replacing.is_alive():
        loaded.append(load_model(saved))
    replacing.join()
    assert {model.fingerprint for model in loaded} == {model.fingerprint for model in models}
    assert load_model(str(saved)).checkpoint == str(saved)


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_checkpoint_is_executed(saved, tmp_path):
    trace = tmp_path / "executed"
    pickle.loads(pickle.dumps(Harmful(trace))).close()
    assert trace.exists()  # it does harm where pickles are trusted
    trace.unlink()
    torch.save({**contents(make()), "callbacks": Harmful(trace)}, saved)
    with pytest.raises(InputError, match="cannot be read"):
        load_model(saved)
    saved.write_bytes(pickle.dumps(Harmful(trace), protocol=2))
    with pytest.raises(InputError, match="cannot be read"):
        load_model(saved)
    assert not trace.exists()


def test_fingerprint_is_of_the_weights_and_nothing_else(saved, tmp_path):
    fingerprint = make().fingerprint
    assert load_model(saved).fingerprint == fingerprint
    torch.save({**contents(make()), "global_step": 7, "loops": {}}, tmp_path / "other.ckpt")
    assert load_model(tmp_path / "other.ckpt").fingerprint == fingerprint
    assert make(seed=1).fingerprint != fingerprint


def test_a_gnn_lm_of_before_its_lm_was_given_to_it(tmp_path):
    """Its hyper-parameters name the files that it was made from."""
    model = GNNLM(make(), heads=2, layers=2)
    before = {**model.hparams, "lm_checkpoint": "runs/words/best.ckpt", "start_from": None}
    described = {**contents(model), "hyper_parameters": before}
    torch.save({**described, "lm_fingerprint": "01", "neighbors": None}, tmp_path / "gnn.ckpt")
    loaded = load_model(tmp_path / "gnn.ckpt")
    assert (loaded.fingerprint, loaded.lm_fingerprint) == (model.fingerprint, "01")
    assert loaded.lm.fingerprint == model.lm.fingerprint == make().fingerprint
    assert dict(loaded.hparams) == dict(model.hparams)
    assert set(before) == {
        *("vocab_size", "lm_checkpoint", "start_from", "lm", "layers", "width", "heads"),
        *("intra_context", "residual", "values", "lm_ratio", "output_bias", "dropout"),
        *("attention_dropout", "lm_path_probability", "unfreeze", "optimizer", "lr", "schedule"),
        *("warmup_updates", "warmup_init_lr", "min_lr", "lr_period_updates", "t_mult"),
        *("lr_shrink", "momentum", "adam_betas", "weight_decay"),
    }
