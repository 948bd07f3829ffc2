"""Checkpoints of fairseq 0.10 to 0.12, which say in `cfg` how their model was made: they give the
model that `args` gives, without omegaconf, and nothing in them is executed."""

import enum
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
from small_fairseq import LONGEST, arguments, tensors

from neighborlm.originals.conversion import load_fairseq_checkpoint
from neighborlm.originals.fairseq_files import is_fairseq_checkpoint

OPTIMISED = {
    "optimizer": "nag",
    "momentum": 0.97,
    "weight_decay": 0.1,
    "lr_scheduler": "cosine",
    "lr": [1e-4],
    "max_lr": 0.5,
    "warmup_updates": 30,
    "warmup_init_lr": 1e-7,
    "lr_period_updates": 270.0,
    "t_mult": 2.0,
    "lr_shrink": 0.75,
}
"""Of a checkpoint of fairseq 0.9."""


def settings() -> dict:
    """What fairseq 0.12 stores in the place of `arguments(**OPTIMISED)`."""
    of_task = ("tokens_per_sample", "max_target_positions", "add_bos_token")
    of_model = {k: v for k, v in vars(arguments()).items() if k not in (*of_task, "task", "arch")}
    refers = {name: f"${{task.{name}}}" for name in of_task}
    of_schedule = ("warmup_updates", "warmup_init_lr", "lr_period_updates", "t_mult", "lr_shrink")
    return {
        "_name": None,
        "common": {"seed": 1, "fp16": True},
        "model": {"_name": "transformer_lm", **of_model, **refers},
        "task": {"_name": "language_modeling", "data": "???", "tokens_per_sample": LONGEST},
        "optimization": {"max_update": 300, "lr": [0.5]},
        "optimizer": {
            "_name": "nag",
            "momentum": 0.97,
            "weight_decay": 0.1,
            "lr": "${optimization.lr}",
        },
        "lr_scheduler": {
            "_name": "cosine",
            "lr": "${optimization.lr}",
            "min_lr": 1e-4,
            **{name: OPTIMISED[name] for name in of_schedule},
        },
    }


class Activation(enum.Enum):
    """Stands for an enumeration of fairseq's."""

    relu = "relu"


def as_omegaconf(monkeypatch, value):
    """The objects in which fairseq 0.10 keeps settings, as far as a pickle shows them."""
    modules = {name: types.ModuleType(name) for name in ("omegaconf.nodes", "omegaconf.base")}
    modules |= {name: types.ModuleType(name) for name in ("omegaconf.dictconfig", "omegaconf")}
    modules |= {name: types.ModuleType(name) for name in ("fairseq", "fairseq.dataclass.constants")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    of = {"DictConfig": "omegaconf.dictconfig", "ListConfig": "omegaconf.dictconfig"}
    of |= {"AnyNode": "omegaconf.nodes", "ContainerMetadata": "omegaconf.base"}
    made = {name: type(name, (), {"__module__": module}) for name, module in of.items()}
    for name, cls in made.items():
        setattr(modules[of[name]], name, cls)
    Activation.__module__, Activation.__qualname__ = "fairseq.dataclass.constants", "Activation"
    modules["fairseq.dataclass.constants"].Activation = Activation

    def node(value, parent):
        if value == "relu":
            value = Activation.relu
        kind = {dict: "DictConfig", list: "ListConfig"}.get(type(value), "AnyNode")
        found = made[kind]()
        metadata = made["ContainerMetadata"]()
        vars(metadata).update(ref_type=typing.Optional[int], object_type=dict, optional=True)  # noqa: UP045
        vars(found).update(_metadata=metadata, _parent=parent)
        if isinstance(value, dict):
            found._content = {name: node(item, found) for name, item in value.items()}
        elif isinstance(value, list):
            found._content = [node(item, found) for item in value]
        else:
            found._val = value
        return found

    return node(value, None)


@pytest.mark.parametrize("form", ["plain", "omegaconf"])
@pytest.mark.parametrize("zipped", [True, False])
def test_settings_give_the_model_that_arguments_give(tmp_path, monkeypatch, form, zipped):
    args = arguments(**OPTIMISED)
    state = tensors(args)
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save({"args": args, "model": state}, old)
    with monkeypatch.context() as patched:
        cfg = settings() if form == "plain" else as_omegaconf(patched, settings())
        contents = {"args": None, "cfg": cfg, "model": state}
        torch.save(contents, new, _use_new_zipfile_serialization=zipped)
    assert is_fairseq_checkpoint(new)
    expected, found = load_fairseq_checkpoint(old), load_fairseq_checkpoint(new)
    assert dict(found.hparams) == dict(expected.hparams)
    assert found.hparams.max_target_positions == LONGEST
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name])


class Harmful:
    """Writes a file when it is unpickled without restrictions."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_code_among_settings_is_not_run(tmp_path):
    cfg = settings() | {"common": Harmful(tmp_path / "harm")}
    torch.save({"args": None, "cfg": cfg, "model": {}}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"refused, it holds a \S*(touch|getattr)"):
        load_fairseq_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "harm").exists()


def test_settings_of_no_model(tmp_path):
    torch.save({"args": None, "cfg": {"task": {"_name": "x"}}, "model": {}}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"has the keys \['args', 'cfg', 'model'\]; expected"):
        load_fairseq_checkpoint(tmp_path / "none.pt")
