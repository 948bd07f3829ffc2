"""Mixers as files: what is read is what was written, and what does not fit is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_opinions import made_up, only

from neighborlm.common.errors import InputError
from neighborlm.retrieval.memories.buckets import BucketMixer
from neighborlm.retrieval.memories.closed_forms import DrozdovMixer, NestMixer
from neighborlm.retrieval.memories.fitted import FittedOn, load_mixer, save_mixer
from neighborlm.retrieval.memories.gate import GateMixer
from neighborlm.retrieval.memories.mixers import ConstantMixer, features_of

MIXERS = {
    "constant": ConstantMixer,
    "buckets": lambda: BucketMixer(["lm.entropy", "knn.nearest_distance"]),
    "gate": lambda: GateMixer(["knn.nearest_distance", "lm.entropy"]),
    "drozdov": DrozdovMixer,
    "nest": NestMixer,
}
FITTED_ON = FittedOn("valid", "text-of-valid", "a-model", {"knn": "a-store"})
HERE = {"text": "text-of-test", "model": "a-model", "memories": {"knn": "a-store"}}


@pytest.fixture
def saved(tmp_path) -> Path:
    """A file of constant weights."""
    save_mixer(tmp_path / "mixer.npz", "constant", ConstantMixer((0.75, 0.25)), FITTED_ON)
    return tmp_path / "mixer.npz"


@pytest.mark.parametrize("name", MIXERS)
def test_what_is_read_weighs_as_what_was_written(name, tmp_path):
    mixer = MIXERS[name]()
    mixer.fit(only(made_up(), "lm", "knn"))
    path = tmp_path / "folder" / "mixer.npz"
    save_mixer(path, name, mixer, FITTED_ON)
    assert path.stat().st_size < 100_000
    others = {
        "constant": ConstantMixer,
        "buckets": BucketMixer,
        "gate": GateMixer,
        "drozdov": lambda: DrozdovMixer(memory="other"),
        "nest": lambda: NestMixer(memory="other"),
    }
    again, fitted_on = load_mixer(path, others, **HERE)
    assert fitted_on == FITTED_ON
    assert not again.needs_fitting
    assert again.want == mixer.want
    features = features_of(only(made_up(200, seed=1), "lm", "knn"))
    assert torch.equal(again.weights(features, 200), mixer.weights(features, 200))


def test_the_text_it_was_fitted_on_is_refused(saved):
    load_mixer(saved, MIXERS, **HERE)
    with pytest.raises(InputError, match=r"fitted on this very text, the split valid"):
        load_mixer(saved, MIXERS, **HERE | {"text": "text-of-valid"})


@pytest.mark.parametrize(
    ("here", "sentence"),
    [
        ({"memories": {"knn": "a-store", "ngram": "x"}}, "for the memories knn, not for knn,ngram"),
        ({"memories": {}}, "for the memories knn"),
        ({"memories": {"knn": "other"}}, r"another memory knn \(a-store\) than is here \(other\)"),
        ({"model": "other"}, r"another model \(a-model\) than is here \(other\)"),
    ],
)
def test_other_memories_and_models_are_refused(saved, here, sentence):
    with pytest.raises(InputError, match=sentence):
        load_mixer(saved, MIXERS, **HERE | here)


def test_the_order_of_the_memories_counts(saved):
    both = {"knn": "a-store", "ngram": "an-array"}
    save_mixer(saved, "constant", ConstantMixer((0.5, 0.5)), replace(FITTED_ON, memories=both))
    with pytest.raises(InputError, match="for the memories knn,ngram, not for ngram,knn"):
        load_mixer(saved, MIXERS, **HERE | {"memories": dict(reversed(both.items()))})


def test_what_is_no_mixer_is_refused(saved, tmp_path):
    with pytest.raises(InputError, match=r"nothing.npz: no such file"):
        load_mixer(tmp_path / "nothing.npz", MIXERS, **HERE)
    whole = saved.read_bytes()
    other = tmp_path / "other.npz"
    for content in (b"", b"no mixer", whole[:-40], whole[: len(whole) // 2]):
        other.write_bytes(content)
        with pytest.raises(InputError, match=r"other.npz: cannot be read"):
            load_mixer(other, MIXERS, **HERE)
    with open(other, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="cannot be read"):
        load_mixer(other, MIXERS, **HERE)
    np.savez(other, shares=np.zeros(2))
    with pytest.raises(InputError, match="cannot be read"):
        load_mixer(other, MIXERS, **HERE)
    with pytest.raises(InputError, match="is a mixer constant; expected one of gate"):
        load_mixer(saved, {"gate": GateMixer}, **HERE)


def test_a_damaged_byte_is_seen(saved):
    content = bytearray(saved.read_bytes())
    at = content.index(np.float64(0.75).tobytes())
    content[at] ^= 1
    saved.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        load_mixer(saved, MIXERS, **HERE)


def test_pickles_are_not_read(tmp_path):
    path = tmp_path / "mixer.npz"
    about = {"format": 1, "mixer": "constant", "fitted_on": vars(FITTED_ON)}
    np.savez(path, about=np.array(json.dumps(about)), shares=np.array([object()]))
    with pytest.raises(InputError, match="cannot be read"):
        load_mixer(path, MIXERS, **HERE)


def test_other_formats_and_missing_arrays_are_refused(tmp_path):
    path = tmp_path / "mixer.npz"
    about = {"format": 2, "mixer": "constant", "fitted_on": vars(FITTED_ON)}
    np.savez(path, about=np.array(json.dumps(about)), shares=np.ones(2))
    with pytest.raises(InputError, match="has format 2; this program reads 1"):
        load_mixer(path, MIXERS, **HERE)
    np.savez(path, about=np.array(json.dumps(about | {"format": 1})))
    with pytest.raises(InputError, match="lacks 'shares'"):
        load_mixer(path, MIXERS, **HERE)
