"""Models of transformers as language models: log-probabilities as transformers computes them, keys
as a forward pass with other hooks gives them, and what is refused."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from neighborlm.common.contracts import Backbone, LanguageModel, Want
from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMBatch

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from neighborlm.models import huggingface  # noqa: E402
from neighborlm.models.huggingface import HuggingFaceLM  # noqa: E402

V, LAYERS = 50, 3
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 64}
OPT = {
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "gpt2": (GPT2, "transformer.h.{}.mlp.c_fc"),
    "llama": (LLAMA, "model.layers.{}.mlp.up_proj"),
    "qwen2": (LLAMA, "model.layers.{}.mlp.up_proj"),
    "qwen3": (LLAMA | {"head_dim": 8}, "model.layers.{}.mlp.up_proj"),
    "gemma": (LLAMA | {"head_dim": 8}, "model.layers.{}.mlp.up_proj"),
    "gemma2": (
        LLAMA | {"head_dim": 8, "final_logit_softcapping": 0.5},
        "model.layers.{}.mlp.up_proj",
    ),
    "gpt_neox": (LLAMA, "gpt_neox.layers.{}.mlp.dense_h_to_4h"),
    "opt": (OPT | {"word_embed_proj_dim": 16}, "model.decoder.layers.{}.fc1"),
    "mistral": (LLAMA, "model.layers.{}.mlp.up_proj"),
    "olmo": (LLAMA, "model.layers.{}.mlp.up_proj"),
    "olmo2": (LLAMA, "model.layers.{}.mlp.up_proj"),
    "cohere": (LLAMA | {"logit_scale": 7.0}, "model.layers.{}.mlp.up_proj"),
    "granite": (LLAMA | {"logits_scaling": 0.1}, "model.layers.{}.mlp.up_proj"),
}
"""By `model_type`, settings of a small model, and the linear layer whose input the key is."""


def small(model_type: str, **settings) -> torch.nn.Module:
    """A model with random weights, large enough for predictions that differ."""
    torch.manual_seed(0)
    own = FAMILIES[model_type][0] if model_type in FAMILIES else {}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=V, **ends, **{**own, **settings}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def batch_of(rows: int = 3, length: int = 12) -> LMBatch:
    """Rows of which the last is padded, scored from the fourth token on."""
    rng = np.random.default_rng(0)
    text = torch.from_numpy(rng.integers(0, V, (rows, length + 1)))
    positions = torch.arange(rows * length).view(rows, length)
    scored = torch.arange(length).expand(rows, length) >= 3
    inside = torch.ones(rows, length, dtype=torch.bool)
    inside[-1, length // 2 :] = False
    tokens, targets = text[:, :-1].where(inside, 0), text[:, 1:].where(inside, 0)
    return LMBatch(tokens, targets, positions.where(inside, -1), scored & inside)


@contextmanager
def inputs_of(module: torch.nn.Module):
    """What a module is given while the body runs."""
    given: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _, args, __: given.append(args[0].detach()))
    yield given
    handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_scored_equals_what_transformers_computes(family, monkeypatch):
    model, batch = small(family), batch_of()
    place = FAMILIES[family][1]
    last, first = (model.get_submodule(place.format(i)) for i in (LAYERS - 1, 0))
    with torch.no_grad(), inputs_of(last) as at_last, inputs_of(first) as at_first:
        out = model(batch.tokens, output_hidden_states=True)
    expected = out.logits.log_softmax(-1)[batch.scored]
    lm = HuggingFaceLM(model)
    assert isinstance(lm, LanguageModel)
    assert isinstance(lm, Backbone)
    monkeypatch.setattr("neighborlm.models.adaptive.LOGITS_AT_ONCE", 7 * V)  # several blocks
    key_types = ("last_ffn_input", "layer:0:ffn_input", "layer:1:output", "last_hidden")
    with torch.inference_mode():
        scored = lm.score(batch, Want(key_types, entropy=True, top=4))
    targets = batch.targets[batch.scored]
    torch.testing.assert_close(scored.log_probs, expected.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(scored.entropy, -(expected.exp() * expected).sum(-1))
    torch.testing.assert_close(scored.top_log_probs, expected.topk(4).values)
    assert expected.std() > 0.01  # tells contexts and words apart
    hidden = [at_last[0], at_first[0], out.hidden_states[2], out.hidden_states[-1]]
    for key_type, states in zip(key_types, hidden, strict=True):
        wanted = states.view(*batch.tokens.shape, -1)[batch.scored]
        torch.testing.assert_close(scored.keys[key_type], wanted)
        assert lm.key_width(key_type) == wanted.shape[1]
    module = place if family == "opt" else place.rpartition(".")[0]
    assert lm.key_places["last_ffn_input"] == f"input of {module.format(LAYERS - 1)}"
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_devices_compute_the_same(family, device):
    lm, batch = HuggingFaceLM(small(family)), batch_of()
    want = Want(("last_ffn_input", "last_hidden"), entropy=True, top=2)
    expected = lm.score(batch, want)
    there = LMBatch(*(x if x is None else x.to(device) for x in batch))
    found = lm.to(device).score(there, want)
    assert found.log_probs.device.type == torch.device(device).type
    torch.testing.assert_close(found.log_probs.cpu(), expected.log_probs)
    torch.testing.assert_close(found.entropy.cpu(), expected.entropy)
    for key_type, keys in expected.keys.items():
        torch.testing.assert_close(found.keys[key_type].cpu(), keys)


def test_gradients_reach_what_the_head_reads():
    lm, batch = HuggingFaceLM(small("gemma2")), batch_of()
    hidden = lm.hidden(batch.tokens)[0][batch.scored].requires_grad_()
    targets = batch.targets[batch.scored]
    lm.target_log_prob(hidden, targets).sum().backward()
    copied = hidden.detach().requires_grad_()
    lm.log_prob(copied).gather(1, targets[:, None]).sum().backward()
    torch.testing.assert_close(hidden.grad, copied.grad)
    assert hidden.grad.abs().sum() > 0


def test_the_fingerprint_is_of_weights_and_config():
    model = small("llama")
    before = HuggingFaceLM(model).fingerprint
    assert HuggingFaceLM(small("llama")).fingerprint == before
    assert HuggingFaceLM(small("llama", rms_norm_eps=1e-3)).fingerprint != before
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert HuggingFaceLM(model).fingerprint != before


def test_encoders_are_refused():
    bert = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    untrained = transformers.BertConfig(vocab_size=V, intermediate_size=32, **bert)
    for model in (
        small("bert", intermediate_size=32, **bert),
        transformers.AutoModelForCausalLM.from_config(untrained),  # looks around itself but little
    ):
        with pytest.raises(InputError, match="depends on tokens behind it, as in an encoder"):
            HuggingFaceLM(model)
    bart = transformers.BartConfig(d_model=16, vocab_size=V)
    with pytest.raises(InputError, match="is a bart, an encoder with a decoder"):
        huggingface.refuse_encoders(bart, "here")


def test_a_head_that_hidden_vectors_do_not_determine_is_refused(monkeypatch):
    model = small("llama")
    forward = type(model).forward

    def shifted(self, input_ids=None, **settings):
        out = forward(self, input_ids=input_ids, **settings)
        out.logits = out.logits + torch.arange(V) * input_ids[..., None]
        return out

    monkeypatch.setattr(type(model), "forward", shifted)
    with pytest.raises(InputError, match="do not follow from its last hidden vectors"):
        HuggingFaceLM(model)


def test_keys_that_a_model_does_not_have_are_refused():
    mamba = transformers.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2)
    lm = HuggingFaceLM(transformers.MambaForCausalLM(mamba))
    assert lm.key_width("last_hidden") == 16
    with pytest.raises(InputError, match=r"norm, mixer, none of them a known feed-forward block"):
        lm.key_width("last_ffn_input")
    with pytest.raises(InputError, match="the model's layers are 0 to 1"):
        lm.key_width("layer:2:output")


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.inference_mode()
def test_steps_say_what_whole_rows_say(model_type):
    """In rows of different length, padded on the left, and in rows chosen from them."""
    model, want = HuggingFaceLM(small(model_type)), Want(keys=("last_ffn_input",))
    rows = [torch.randint(1, V, (length,)) for length in (7, 4)]
    padded = torch.stack([F.pad(row, (7 - len(row), 0), value=-1) for row in rows])
    state, read, close = None, 0, {"atol": 2e-4, "rtol": 0}
    for tokens in padded.split([3, 2, 1, 1], dim=1):
        log_probs, keys, state = model.step(tokens, state, want)
        read += tokens.shape[1]
        for number, row in enumerate(rows):
            there = read - 7 + len(row)
            if there > 0:
                hidden, expected = model.hidden(row[None, :there], want.keys)
                assert_close(log_probs[number], model.log_prob(hidden[0, -1:])[0], **close)
                found = keys["last_ffn_input"][number, -1]
                assert_close(found, expected["last_ffn_input"][0, -1], **close)
    state = state.select(torch.tensor([1, 0, 1]))
    log_probs = model.step(torch.tensor([[5], [6], [7]]), state, want).log_probs
    for number, (row, token) in enumerate([(rows[1], 5), (rows[0], 6), (rows[1], 7)]):
        hidden, _ = model.hidden(torch.cat([row, torch.tensor([token])])[None])
        assert_close(log_probs[number], model.log_prob(hidden[0, -1:])[0], **close)
