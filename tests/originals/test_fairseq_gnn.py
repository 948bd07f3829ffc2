"""Checkpoints of the original GNN-LM: the converted network gives the original's numbers, every
part of a file arrives, and unsupported files are refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import small_fairseq
import torch
from small_fairseq import FFN, HEADS, LAYERS, VOCAB, WIDTH, save
from small_original import (
    NETWORK,
    QUANTIZER,
    arguments,
    network,
    plain_words,
    quantizer,
    save_plain,
    transformer_layers,
)

from neighborlm.common.errors import InputError
from neighborlm.datamodules.graphs import NeighborMemory
from neighborlm.models.gnn_lm import GNNLM, mix
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.originals.conversion import load_fairseq_checkpoint
from neighborlm.programs.architectures import make_gnn_lm
from neighborlm.programs.checkpoints import load_model
from neighborlm.tools.convert import main

ORIGINAL = Path(__file__).parents[2] / ".." / "shared" / "parity" / "gnnlm"
needs_original = pytest.mark.skipif(
    not ORIGINAL.is_dir(), reason="the original's outputs are not beside the checkout"
)


# -- the original's numbers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    """The fixture's config, its arrays, and its decoder's weights and outputs."""
    names = ("world", "decoder_state_dict", "decoder_outputs", "hgt_block0")
    arrays = [dict(np.load(ORIGINAL / f"{name}.npz")) for name in names]
    return json.loads((ORIGINAL / "config.json").read_text()), *arrays


@pytest.fixture(scope="module")
def original(world, tmp_path_factory) -> Path:
    """A checkpoint of the original program with the fixture's weights and invented layers."""
    _, arrays, weights, _, _ = world
    codec = {"centroids_torch": "pq_centroids", "A": "pq_A", "b": "pq_b"}
    return save(
        tmp_path_factory.mktemp("original") / "checkpoint.pt",
        arguments(),
        {name: torch.from_numpy(array) for name, array in weights.items()},
        transformer_layers(),
        quantizer(),
        {f"{QUANTIZER}.{name}": torch.from_numpy(arrays[of]) for name, of in codec.items()},
    )


def graph_output(model: GNNLM, world) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `[n, width]` of the tokens of block 0, from the LM and from the network."""
    config, arrays, _, _, block = world
    offsets = block["tgt_offsets"]
    table = arrays["neighbors_raw"][:, : config["k"]]
    memory = NeighborMemory(table, arrays["datastore_codes"], *config["ctx"], model.hparams.layers)
    hood = memory.neighborhood(offsets[None].astype(np.int64))
    hidden = torch.from_numpy(arrays["split_feats_fp16"][offsets].astype(np.float32))
    features = model.neighbor_features(hood.features)
    return hidden, model.network.fast(hidden[None], features, hood)[0]


def check_numbers(model: GNNLM, world) -> None:
    _, arrays, _, outputs, block = world
    with torch.inference_mode():
        codes = torch.from_numpy(arrays["datastore_codes"])
        decoded = model.neighbor_features(codes).numpy()
        np.testing.assert_allclose(decoded, arrays["datastore_decoded"], atol=1e-5)
        hidden, out = graph_output(model, world)
        np.testing.assert_allclose(out, outputs["block0_gcn_feat"], atol=1e-4)
        start = int(np.ravel(block["loss_start"])[0])
        targets = torch.from_numpy(block["target"][start:].astype(np.int64))
        scores = model.softmax.target_log_prob(out[start:], targets)
        np.testing.assert_allclose(scores, outputs["block0_ratio0_logprob"], atol=1e-4)
        beside = model.softmax.target_log_prob(hidden[start:], targets)
        np.testing.assert_allclose(beside, outputs["block0_base_shortcut_logprob"], atol=1e-4)
        mixed = mix(beside, scores, model.hparams.lm_ratio)
        np.testing.assert_allclose(mixed, outputs["block0_ratio0.3_logprob"], atol=1e-4)


@needs_original
def test_network_and_softmax_give_the_originals_numbers(original, world):
    model = load_model(original)
    assert isinstance(model, GNNLM)
    assert not model.training
    assert model.hparams.lm_ratio == 0.3
    assert model.softmax is model.lm.softmax
    assert (model.lm_fingerprint, model.neighbors, model.dictionary_fingerprint) == (None,) * 3
    check_numbers(model, world)


@needs_original
def test_converted_it_gives_them_too(original, world, tmp_path, capsys):
    main(["from_fairseq", str(original), str(tmp_path / "gnn.ckpt")])
    assert "gnn.ckpt: does not hold the quantiser of" in capsys.readouterr().out
    model, expected = load_model(tmp_path / "gnn.ckpt"), load_model(original)
    assert (model.lm_fingerprint, model.neighbors, model.code_decoder) == (None, None, None)
    assert dict(model.hparams) == dict(expected.hparams)
    assert model.fingerprint == expected.fingerprint
    model.code_decoder = expected.code_decoder  # as whoever has the codes gives it
    check_numbers(model, world)
    started = make_gnn_lm(VOCAB, start_from=str(original))
    assert (started.hparams.heads, started.hparams.lm_ratio) == (HEADS, 0.3)
    assert torch.equal(
        started.network.layers[2].prior["inter"], model.network.layers[2].prior["inter"]
    )


# -- every part ----------------------------------------------------------------------------------


def test_settings(tmp_path):
    changes = {"add_bias": True, "quantizer_path": "", "orig_prob_ratio": 0.0, "freeze": False}
    bias = {"decoder.xl_bias": torch.randn(VOCAB)}
    path = save_plain(tmp_path / "plain.pt", network(), bias, **changes)
    model = load_fairseq_checkpoint(path)
    found = model.hparams
    assert (found.layers, found.width, found.heads, found.lm_ratio) == (3, WIDTH, HEADS, 0.0)
    assert found.intra_context is None
    assert (found.dropout, found.attention_dropout) == (0.3, 0.1)
    assert (found.lm["output_bias"], found.output_bias) == (True, False)  # it is the LM's
    assert (found.optimizer, found.schedule, found.lr) == ("adam", "constant", 0.0005)
    assert (found.lm["layers"], found.lm["ffn_width"], found.unfreeze) == (LAYERS, FFN, [])
    assert model.code_decoder is None


@pytest.mark.parametrize(("theirs", "ours"), [(0, None), (1, 1), (5, 5)])
def test_how_far_back_tokens_attend(tmp_path, theirs, ours):
    path = save_plain(tmp_path / "gnn.pt", network(), quantizer(), intra_context=theirs)
    assert load_model(path).hparams.intra_context == ours


def test_every_weight_arrives(tmp_path):
    """The network has another width, and the logits have a bias."""
    words, layers, net = plain_words(), transformer_layers(), network(width=16, layers=2)
    bias = {"decoder.xl_bias": torch.randn(VOCAB)}
    changes = {"add_bias": True, "decoder_gcn_dim": 16, "graph_layer": 2}
    path = save_plain(tmp_path / "wide.pt", net, bias, quantizer(), **changes)
    model = load_fairseq_checkpoint(path)
    for i, layer in enumerate(model.network.layers):
        name = f"{NETWORK}.gcs.{i}"
        for t, node_type in enumerate(("token", "neighbor")):
            for letter, module in zip("kqva", ("key", "query", "value", "output"), strict=True):
                linear = getattr(layer, module)[node_type]
                assert torch.equal(linear.weight, net[f"{name}.{letter}_linears.{t}.weight"])
                if letter != "k":
                    assert torch.equal(linear.bias, net[f"{name}.{letter}_linears.{t}.bias"])
            assert torch.equal(layer.norm[node_type].weight, net[f"{name}.norms.{t}.weight"])
            assert torch.equal(layer.norm[node_type].bias, net[f"{name}.norms.{t}.bias"])
        for e, relation in enumerate(("intra", "inter")):
            assert torch.equal(layer.prior[relation], net[f"{name}.relation_pri"][e])
            assert torch.equal(layer.attention[relation], net[f"{name}.relation_att"][e])
            assert torch.equal(layer.message[relation], net[f"{name}.relation_msg"][e])
    for t, node_type in enumerate(("token", "neighbor")):
        assert torch.equal(
            model.network.adapt[node_type].weight, net[f"{NETWORK}.adapt_ws.{t}.weight"]
        )
    assert torch.equal(model.network.out.bias, net[f"{NETWORK}.out.bias"])
    assert torch.equal(model.lm.decoder.layers[1].fc2.weight, layers["decoder.layers.1.fc2.weight"])
    assert model.softmax is model.lm.softmax
    hidden = torch.randn(5, WIDTH)
    logits = hidden @ words["decoder.embed_out"].T
    expected = (logits + bias["decoder.xl_bias"]).log_softmax(-1)
    torch.testing.assert_close(model.softmax.log_prob(hidden), expected)


@pytest.mark.parametrize("transform", ["none", "rotation", "rotation and bias"])
def test_quantizers(tmp_path, transform):
    tensors = quantizer()
    if transform == "none":
        del tensors[f"{QUANTIZER}.A"], tensors[f"{QUANTIZER}.b"]
    elif transform == "rotation and bias":
        tensors[f"{QUANTIZER}.b"] = torch.randn(WIDTH)
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    model = load_fairseq_checkpoint(save_plain(tmp_path / "codec.pt", network(), tensors))
    codes = torch.randint(0, 256, (7, 8), dtype=torch.uint8)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    centroids = tensors[f"{QUANTIZER}.centroids_torch"]
    expected = torch.stack(
        [torch.cat([centroids[m, code] for m, code in enumerate(row)]) for row in codes.tolist()]
    )
    if transform == "rotation and bias":
        expected = expected - tensors[f"{QUANTIZER}.b"]
    if transform != "none":
        expected = expected @ tensors[f"{QUANTIZER}.A"]
    torch.testing.assert_close(model.neighbor_features(codes), expected)


def test_a_bias_that_an_adaptive_softmax_does_not_add(tmp_path):
    bias = {"decoder.xl_bias": torch.randn(VOCAB)}
    for layers in (3, 0):
        args = small_fairseq.arguments(**vars(arguments(add_bias=True, graph_layer=layers)))
        net = network() | quantizer() if layers else {}
        path = save(tmp_path / "adaptive.pt", args, small_fairseq.tensors(args), net, bias)
        model = load_fairseq_checkpoint(path)
        assert not [name for name in model.state_dict() if name.endswith("softmax.bias")]


@pytest.mark.parametrize("graph_layer", [0, None])
def test_without_layers_it_is_a_plain_lm(tmp_path, graph_layer):
    path = save_plain(tmp_path / "lm.pt", graph_layer=graph_layer, quantizer_path="")
    assert isinstance(load_model(path), TransformerLM)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_cut": True}, "--short-cut is True, which bypasses the graph network; expected a"),
        ({"decoder_gcn_dim": 30}, "--model.width 30 is not a multiple of --model.heads 4"),
        ({"orig_prob_ratio": 1.0}, "--model.lm_ratio is 1.0; expected 0 <= lm_ratio < 1"),
        ({"graph_layer": -1}, "--model.layers is -1; expected more than 0"),
        ({"layernorm_embedding": True}, "--layernorm-embedding is True, a layer norm on the"),
    ],
)
def test_models_that_ours_is_not(tmp_path, changes, message):
    path = save_plain(tmp_path / "gnn.pt", network(), **changes)
    with pytest.raises(InputError, match=f"gnn\\.pt: {re.escape(message)}"):
        load_fairseq_checkpoint(path)


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    net, codec = network(), quantizer()
    del net[f"{NETWORK}.gcs.0.q_linears.1.bias"], net[f"{NETWORK}.gcs.1.relation_att"]
    net[f"{NETWORK}.gcs.2.relation_pri"] = torch.zeros(3, HEADS)
    net[f"{NETWORK}.out.bias"] = torch.zeros(WIDTH)
    codec[f"{QUANTIZER}.A"] = torch.zeros(WIDTH, 4)
    path = save_plain(tmp_path / "gnn.pt", net, codec)
    expected = (
        "gnn.pt: expected the tensors that its arguments describe; found that "
        f"{NETWORK}.gcs.0.q_linears.1.bias is missing, "
        f"{NETWORK}.gcs.1.relation_att[0] is missing, {NETWORK}.gcs.1.relation_att[1] is missing, "
        f"{NETWORK}.gcs.2.relation_pri[2] is unexpected, {NETWORK}.out.bias is unexpected, "
        f"{QUANTIZER}.A is [32, 4] instead of [32, 32]"
    )
    with pytest.raises(InputError, match=re.escape(expected)):
        load_fairseq_checkpoint(path)


def test_a_quantizer_that_is_not_there(tmp_path):
    path = save_plain(tmp_path / "gnn.pt", network())
    with pytest.raises(InputError, match=r"tgt_quantizer\.centroids_torch is missing"):
        load_fairseq_checkpoint(path)


def test_no_way_out(tmp_path, capsys):
    source = save_plain(tmp_path / "gnn.pt", network(), quantizer_path="")
    main(["from_fairseq", str(source), str(tmp_path / "gnn.ckpt")])
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as stopped:
        main(["to_fairseq", str(tmp_path / "gnn.ckpt"), str(tmp_path / "out.pt")])
    assert stopped.value.code == 2
    assert "gnn.ckpt: holds a GNNLM; expected a TransformerLM, as" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
