"""The decoder against a forward pass in plain numpy, and its independence of later tokens."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from neighborlm.common.errors import InputError
from neighborlm.datamodules.dictionary import PAD
from neighborlm.models import decoder as module
from neighborlm.models.decoder import (
    Decoder,
    DecoderLayer,
    LearnedPositions,
    SinusoidalPositions,
    key_layer,
)

VOCAB, WIDTH, FFN, HEADS, LAYERS = 11, 12, 20, 3, 3
KEYS = (
    *("last_hidden", "last_ffn_input", "layer:0:ffn_input", "layer:0:output"),
    *("layer:1:ffn_input", "layer:1:output", "layer:2:ffn_input", "layer:2:output"),
)


def make(
    pre_norm=True, activation="relu", final_norm=False, positions=None, checkpoint_layers=False
) -> Decoder:
    torch.manual_seed(0)
    layers = [
        DecoderLayer(WIDTH, FFN, HEADS, pre_norm, activation, 0.0, 0.0, 0.0) for _ in range(LAYERS)
    ]
    decoder = Decoder(
        nn.Embedding(VOCAB, WIDTH),
        layers,
        positions or SinusoidalPositions(WIDTH),
        WIDTH,
        scale=1.7,
        dropout=0.0,
        final_norm=final_norm,
        checkpoint_layers=checkpoint_layers,
    )
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.2 * torch.randn_like(parameter)  # biases and gains too
    return decoder


# -- the same once more -------------------------------------------------------------------------


def weights(linear: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    return tuple(p.detach().double().numpy() for p in (linear.weight, linear.bias))


def naive_norm(norm, x):
    gain, bias = weights(norm)
    mean, variance = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * gain + bias


def naive_linear(linear, x):
    weight, bias = weights(linear)
    return x @ weight.T + bias


def naive_attention(layer, x):
    q, k, v = np.split(naive_linear(layer.qkv, x), 3, axis=1)
    size, mixed = WIDTH // HEADS, np.zeros_like(x)
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        for t in range(len(x)):
            scores = np.array([q[t, part] @ k[s, part] for s in range(t + 1)]) / math.sqrt(size)
            shares = np.exp(scores - scores.max())
            mixed[t, part] = (shares / shares.sum()) @ v[: t + 1, part]
    return naive_linear(layer.attention_out, mixed)


def naive_ffn(layer, x, activation):
    inner = naive_linear(layer.fc1, x)
    if activation == "relu":
        inner = np.maximum(inner, 0)
    else:
        inner = np.vectorize(lambda a: a * 0.5 * (1 + math.erf(a / math.sqrt(2))))(inner)
    return naive_linear(layer.fc2, inner)


def naive_positions(length: int, width: int) -> np.ndarray:
    """fairseq's SinusoidalPositionalEmbedding: positions begin at padding_idx + 1."""
    half, table = width // 2, np.zeros((length, width))
    for t in range(length):
        for j in range(half):
            angle = (PAD + 1 + t) * math.exp(-j * math.log(10000) / (half - 1))
            table[t, j], table[t, half + j] = math.sin(angle), math.cos(angle)
    return table


def naive_forward(decoder, tokens: list[int], table, pre_norm, activation):
    """The features of one row, by name."""
    x = 1.7 * decoder.embedding.weight.detach().double().numpy()[tokens] + table[: len(tokens)]
    features = {}
    for i, layer in enumerate(decoder.layers):
        if pre_norm:
            x = x + naive_attention(layer, naive_norm(layer.attention_norm, x))
            ffn_input = naive_norm(layer.ffn_norm, x)
            x = x + naive_ffn(layer, ffn_input, activation)
        else:
            ffn_input = naive_norm(layer.attention_norm, x + naive_attention(layer, x))
            x = naive_norm(layer.ffn_norm, ffn_input + naive_ffn(layer, ffn_input, activation))
        features |= {f"layer:{i}:ffn_input": ffn_input, f"layer:{i}:output": x}
    features["last_ffn_input"] = ffn_input
    if isinstance(decoder.final_norm, nn.LayerNorm):
        x = naive_norm(decoder.final_norm, x)
    return features | {"last_hidden": x}


@pytest.mark.parametrize(
    ("pre_norm", "activation", "final_norm", "learned"),
    [
        (True, "relu", False, False),
        (True, "gelu", True, True),
        (False, "relu", True, False),
        (False, "gelu", False, True),
    ],
)
@torch.no_grad()
def test_every_feature_equals_a_plain_forward_pass(pre_norm, activation, final_norm, learned):
    positions = LearnedPositions(WIDTH, 9) if learned else SinusoidalPositions(WIDTH)
    decoder = make(pre_norm, activation, final_norm, positions)
    tokens = torch.randint(VOCAB, (2, 7))
    table = naive_positions(7, WIDTH)
    if learned:
        table = decoder.positions.weight.double().numpy()
    output, features = decoder(tokens, KEYS)
    assert set(features) == set(KEYS)
    assert torch.equal(output, features["last_hidden"])
    assert decoder(tokens)[1] == {}
    for row in range(2):
        expected = naive_forward(decoder, tokens[row].tolist(), table, pre_norm, activation)
        for name in KEYS:
            np.testing.assert_allclose(
                features[name][row].numpy(), expected[name], atol=2e-5, err_msg=name
            )


@pytest.mark.parametrize("width", [12, 13, 4])
def test_sinusoidal_table_is_fairseqs(width):
    expected = naive_positions(600, width)
    table = SinusoidalPositions(width)(torch.arange(600)).numpy()
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, atol=2e-4)  # fp32 angles of up to 600


def test_half_precision_leaves_the_angles_alone():
    table = SinusoidalPositions(64)
    expected = table(torch.arange(600))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(SinusoidalPositions(64).to(dtype)(torch.arange(600)), expected)


# -- what it must not depend on -----------------------------------------------------------------


@pytest.mark.parametrize("pre_norm", [True, False])
@torch.no_grad()
def test_no_output_depends_on_later_tokens(pre_norm):
    decoder = make(pre_norm)
    tokens = torch.randint(VOCAB, (1, 8))
    before, keys = decoder(tokens, ["last_ffn_input"])
    for changed in range(8):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCAB
        after, other_keys = decoder(other, ["last_ffn_input"])
        for a, b in ((before, after), (keys["last_ffn_input"], other_keys["last_ffn_input"])):
            differs = (a - b).abs().amax(dim=(0, 2)) > 1e-6
            assert differs.tolist() == [t >= changed for t in range(8)]


@torch.no_grad()
def test_padding_and_other_rows_change_nothing():
    decoder = make()
    rows = [torch.randint(VOCAB, (length,)) for length in (3, 7, 5)]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    together, _ = decoder(nn.functional.pad(padded, (0, 2), value=PAD))
    for row, output in zip(rows, together, strict=True):
        torch.testing.assert_close(output[: len(row)], decoder(row[None])[0][0])


def test_checkpointed_layers_give_the_same_gradients(monkeypatch):
    tokens = torch.randint(VOCAB, (2, 6))
    results, calls = [], []
    original = module.checkpoint
    monkeypatch.setattr(
        module, "checkpoint", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    for checkpoint_layers in (False, True):
        decoder = make(checkpoint_layers=checkpoint_layers)
        output, features = decoder(tokens, KEYS)
        loss = sum((i + 1) * f.pow(2).mean() for i, f in enumerate(features.values()))
        loss.backward()
        gradients = [p.grad for p in decoder.parameters()]
        results.append([output, *features.values(), *gradients])
        assert len(calls) == LAYERS * checkpoint_layers
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        decoder(tokens)
    assert len(calls) == LAYERS  # nothing to compute again without a backward pass


# -- key types ----------------------------------------------------------------------------------


def test_names_of_layers():
    assert key_layer("last_hidden", 16) is None
    assert key_layer("last_ffn_input", 16) == (15, "ffn_input")
    assert key_layer("layer:0:ffn_input", 16) == (0, "ffn_input")
    assert key_layer("layer:12:output", 16) == (12, "output")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("layer:3:output", "the model's layers are 0 to 2"),
        ("layer:-1:output", "expected last_ffn_input, last_hidden"),
        ("layer:1:input", "expected last_ffn_input, last_hidden"),
        ("layer:1", "expected last_ffn_input, last_hidden"),
        ("layer:1:output:2", "expected last_ffn_input, last_hidden"),
        ("first_hidden", "expected last_ffn_input, last_hidden"),
        ("", "expected last_ffn_input, last_hidden"),
    ],
)
def test_names_that_mean_nothing(name, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()(torch.zeros(1, 1, dtype=torch.int64), [name])
    assert "--knn.key_type" in str(error.value)
    assert name in str(error.value)
