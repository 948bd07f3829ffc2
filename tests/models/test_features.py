"""Codes decoded in torch: as faiss does, and as the original GNN-LM does."""

from pathlib import Path

import numpy as np
import pytest
import torch

from neighborlm.models.features import CodeDecoder
from neighborlm.retrieval.neighbors.codec import FeatureCodec

PARITY = Path(__file__).parents[3] / "shared/parity/gnnlm"


@pytest.mark.parametrize(
    "factory", ["PQ4", "OPQ4,PQ4", "OPQ2_4,PQ2", "PCA4,PQ2", "SQ8", "PCA4,SQ8"]
)
def test_decodes_as_faiss_does(factory, device):
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32) + 3
    codec = FeatureCodec.train(factory, vectors)
    codes = codec.encode(vectors)
    decoder = CodeDecoder(codec.decoder_arrays()).to(device)
    decoded = decoder(torch.from_numpy(codes).to(device))
    assert decoded.dtype == torch.float32
    np.testing.assert_allclose(decoded.cpu().numpy(), codec.decode(codes), atol=5e-6)
    assert decoder(torch.from_numpy(codes[:0]).to(device)).shape == (0, 8)
    assert not decoder.state_dict()
    assert not list(decoder.parameters())


@pytest.mark.skipif(not PARITY.is_dir(), reason="the original's outputs are not here")
def test_decodes_as_the_original_does():
    world = np.load(PARITY / "world.npz")
    codes = torch.from_numpy(world["datastore_codes"])
    named = {"centroids": "pq_centroids", "A": "pq_A", "b": "pq_b"}
    codec = FeatureCodec.read(PARITY / "quantizer.faiss")
    expected = world["datastore_decoded"]
    for arrays in ({name: world[key] for name, key in named.items()}, codec.decoder_arrays()):
        assert np.abs(CodeDecoder(arrays)(codes).numpy() - expected).max() <= 1e-5
    np.testing.assert_allclose(codec.decode(world["datastore_codes"]), expected, atol=1e-5)
