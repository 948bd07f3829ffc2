"""A key type of one's own: the LM's last hidden vector, of length one."""

import numpy as np
from torch.nn import functional as F

from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs.architectures import ARCHITECTURES, Architecture, load_transformer_lm


class UnitKeys(TransformerLM):
    def key_width(self, key_type):
        return self.width if key_type == "unit" else super().key_width(key_type)

    def hidden(self, tokens, key_types=()):
        hidden, features = super().hidden(tokens, [k for k in key_types if k != "unit"])
        return hidden, features | {"unit": F.normalize(hidden, dim=-1)}


def load(source):
    model = load_transformer_lm(source)
    model.__class__ = UnitKeys
    return model


def test_squared_distances_of_unit_keys_are_those_of_the_cosine(evaluated, monkeypatch):
    """|a - b|^2 = 2 - 2 cos(a, b), so that half the temperature gives the same votes."""
    monkeypatch.setitem(ARCHITECTURES, "unit_keys", Architecture(load=load))
    knn = ("--knnlm", "--knn.k=64", "--knn.index=flat", "--knn.lmbda=0.3", "--knn.dtype=fp32")
    unit = ("--arch", "unit_keys", "--ckpt_path", "runs/words/checkpoints/best.ckpt")
    unit = (*unit, "--knn.key_type=unit", "--knn.temperature=0.2", "--knn.datastore=unit")
    cosine = ("--knn.key_type=last_hidden", "--knn.metric=cosine", "--knn.temperature=0.1")
    cosine = (*cosine, "--knn.datastore=cosine")
    votes = [evaluated(*knn, *flags)[1]["knn_log_prob"] for flags in (unit, cosine)]
    np.testing.assert_allclose(*map(np.exp, votes), rtol=1e-4, atol=1e-6)
