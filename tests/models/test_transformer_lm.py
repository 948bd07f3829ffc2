"""The language model as a whole: what it returns, what it learns, which settings it refuses."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader

from neighborlm.common.contracts import Want
from neighborlm.common.errors import InputError
from neighborlm.datamodules.dictionary import PAD
from neighborlm.datamodules.lm import LMBatch
from neighborlm.models import distributions
from neighborlm.models.adaptive import PlainSoftmax
from neighborlm.models.transformer_lm import TransformerLM

VOCAB = 30
SMALL = {"vocab_size": VOCAB, "width": 8, "ffn_width": 12, "layers": 2, "heads": 2}
BANDS = {"adaptive_input_cutoffs": [6, 15], "adaptive_softmax_cutoffs": [6, 15]} | {
    "adaptive_input_factor": 2,
    "adaptive_softmax_factor": 2,
}
MODELS = {
    "adaptive, tied": {**BANDS},
    "adaptive, projections of their own": {**BANDS, "tie_projections": False},
    "adaptive, untied": {
        **BANDS,
        "adaptive_softmax_cutoffs": [10],
        "adaptive_softmax_factor": 4,
        "tie_weights": False,
    },
    "plain, tied": {"final_norm": True},
    "plain, untied": {"tie_weights": False, "positions": "learned", "max_target_positions": 7},
    "adaptive in, plain out": {
        **BANDS,
        "adaptive_softmax_cutoffs": [],
        "tie_weights": False,
        "pre_norm": False,
        "activation": "gelu",
    },
}


def make(**settings) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(**{**SMALL, "dropout": 0.0, **settings})


@pytest.fixture
def batch() -> LMBatch:
    """Three rows of 7, 5 and 2 offsets, of which the first 3, 0 and 1 give context."""
    stream = np.random.default_rng(0).permutation(VOCAB)
    tokens, targets = np.full((2, 3, 7), PAD)
    positions, scored = np.full((3, 7), -1), np.zeros((3, 7), bool)
    for row, (begin, length, context) in enumerate([(4, 7, 3), (16, 5, 0), (24, 2, 1)]):
        offsets = np.arange(begin, begin + length)
        tokens[row, :length], targets[row, :length] = stream[offsets - 1], stream[offsets]
        positions[row, :length], scored[row, context:length] = offsets, True
    return LMBatch(*(torch.from_numpy(array) for array in (tokens, targets, positions, scored)))


def cells(batch: LMBatch):
    """Row and column of every scored token."""
    return [(b, t) for b in range(3) for t in range(7) if batch.scored[b, t]]


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_scores_are_those_of_each_scored_token(batch, settings, device):
    model = make(**settings).eval().to(device)
    batch = move_data_to_device(batch, device)
    hidden, features = model.hidden(batch.tokens, ["layer:0:output"])
    scores = model.score(batch, Want(("layer:0:output",)))
    assert len(scores.log_probs) == len(cells(batch)) == 10
    for i, (b, t) in enumerate(cells(batch)):
        assert scores.positions[i] == batch.positions[b, t]
        assert scores.targets[i] == batch.targets[b, t]
        expected = model.softmax.log_prob(hidden[b, t][None])[0]
        assert expected.shape == (VOCAB,)
        assert expected.exp().sum().item() == pytest.approx(1)
        torch.testing.assert_close(scores.log_probs[i], expected[batch.targets[b, t]])
        key, feature = scores.keys["layer:0:output"][i], features["layer:0:output"][b, t]
        assert torch.equal(key.cpu(), feature.cpu())
    # Padding and what else is in the batch change nothing.
    alone = LMBatch(*(tensor[2:, :2] for tensor in batch[:4]))
    torch.testing.assert_close(model.score(alone, Want()).log_probs, scores.log_probs[-1:])


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_gradient_reaches_every_parameter(batch, settings):
    model = make(**settings)
    everything = batch._replace(scored=batch.positions >= 0)
    loss = -model.score(everything, Want()).log_probs.mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_a_step_of_training_lowers_the_loss(batch):
    model = make(**BANDS)
    model.log = lambda *args, **kwargs: None
    model.trainer = SimpleNamespace(accumulate_grad_batches=1, num_training_batches=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(3):
        loss = model.training_step(batch, 0)
        expected = -sum(model.score(batch, Want()).log_probs.tolist()) / 10
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_keys_of_every_type_come_in_one_pass(batch, settings):
    model = make(**settings).eval()
    types = ("last_ffn_input", "layer:0:ffn_input", "last_hidden")
    together = model.score(batch, Want(types, log_probs=False))
    assert together.log_probs is together.entropy is together.top_ids is None
    assert tuple(together.keys) == types
    for key_type in types:
        alone = model.score(batch, Want((key_type,)))
        assert list(alone.keys) == [key_type]
        assert torch.equal(alone.keys[key_type], together.keys[key_type])
        assert alone.keys[key_type].shape == (10, model.key_width(key_type))


def distribution(model: TransformerLM, hidden: torch.Tensor) -> torch.Tensor:
    """Probabilities float64 `[n, VOCAB]`, all at once, by the definition of the softmax."""
    softmax = model.softmax
    if isinstance(softmax, PlainSoftmax):
        return (hidden @ softmax.weight.T).softmax(dim=1)
    head = (hidden @ torch.cat([softmax.words[0], softmax.classes]).T).softmax(dim=1)
    first = len(softmax.words[0])
    parts = [head[:, :first]]
    for band, (down, words) in enumerate(zip(softmax.down, softmax.words[1:], strict=True)):
        tail = (hidden @ down @ words.T).softmax(dim=1)
        parts.append(tail * head[:, first + band, None])
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("logits_at_once", [1, 3 * VOCAB, 1 << 25])
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_entropy_and_the_most_probable_tokens(batch, settings, logits_at_once, monkeypatch):
    """The result does not depend on how many rows are computed at a time."""
    monkeypatch.setattr(distributions, "LOGITS_AT_ONCE", logits_at_once)
    model = make(**settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    scored = model.score(batch, Want(entropy=True, top=4))
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        hidden, _ = exact.hidden(batch.tokens)
        p = distribution(exact, hidden[batch.scored])
    assert p.dtype == torch.float64
    torch.testing.assert_close(p.sum(dim=1), torch.ones(10, dtype=torch.float64))
    expected = torch.special.entr(p).sum(dim=1)
    assert expected.std() > 1e-3
    torch.testing.assert_close(scored.entropy.double(), expected, rtol=1e-5, atol=1e-5)
    best = p.sort(dim=1, descending=True)
    assert torch.equal(scored.top_ids, best.indices[:, :4])
    found = scored.top_log_probs.double()
    torch.testing.assert_close(found, best.values[:, :4].log(), rtol=1e-5, atol=1e-5)
    assert torch.equal(scored.log_probs, model.score(batch, Want()).log_probs)
    assert scored.entropy.dtype == scored.top_log_probs.dtype == torch.float32


def test_no_more_tokens_than_there_are(batch):
    scored = make().eval().score(batch, Want(top=VOCAB + 5))
    assert scored.top_ids.sort(dim=1).values.tolist() == [list(range(VOCAB))] * 10


@pytest.mark.parametrize("settings", [BANDS, {}], ids=["adaptive", "plain"])
def test_a_batch_that_scores_nothing(settings):
    """A rank that has run out of batches gets such a batch."""
    model = make(**settings).eval()
    nothing = LMBatch(
        *(torch.full((1, 1), value) for value in (PAD, PAD, -1)), torch.zeros(1, 1, dtype=bool)
    )
    scored = model.score(nothing, Want(("last_hidden",), entropy=True, top=2))
    columns = (*scored[:3], scored.keys["last_hidden"], scored.entropy, scored.top_ids)
    assert [tuple(column.shape) for column in columns] == [*[(0,)] * 3, (0, 8), (0,), (0, 2)]


def test_validation_logs_the_perplexity_of_all_tokens(batch):
    """It is the mean over tokens, not over batches, and each validation starts anew."""
    model = make(**BANDS)
    other = LMBatch(*(tensor[1:2] for tensor in batch[:4]))
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    for batches in ([batch, other], [other]):
        logged = trainer.validate(model, DataLoader(batches, batch_size=None), verbose=False)[0]
        with torch.no_grad():
            log_probs = torch.cat([model.eval().score(b, Want()).log_probs for b in batches])
        loss = -log_probs.double().mean().item()
        assert logged == pytest.approx({"val/loss": loss, "val/ppl": math.exp(loss)})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {**BANDS, "adaptive_softmax_cutoffs": [6]},
            ("--model.tie_weights", "cutoffs [6, 15]", "cutoffs [6]"),
        ),
        (
            {**BANDS, "adaptive_softmax_factor": 4},
            ("--model.tie_weights", "(factor 2)", "(factor 4)"),
        ),
        ({**BANDS, "adaptive_input_cutoffs": []}, ("--model.tie_weights",)),
        ({"heads": 3}, ("--model.width 8", "--model.heads 3")),
        ({"heads": 0}, ("--model.heads is 0",)),
        ({"lr": 0.0}, ("--model.lr is 0",)),
        ({"lr_period_updates": 0}, ("--model.lr_period_updates is 0",)),
        ({"t_mult": 0.5}, ("--model.t_mult is 0.5", "at least 1")),
        ({"attention_dropout": 1.0}, ("--model.attention_dropout is 1.0",)),
        ({"adaptive_input_cutoffs": [6, 6]}, ("--model.adaptive_input_cutoffs are [6, 6]",)),
        ({"adaptive_softmax_cutoffs": [0]}, ("--model.adaptive_softmax_cutoffs are [0]",)),
        (
            {**BANDS, "output_bias": True},
            ("--model.output_bias", "--model.adaptive_softmax_cutoffs are [6, 15]"),
        ),
        ({"adaptive_input_cutoffs": [6, 15]}, ("[6, 15]", "_factor 4", "--model.width is 8")),
    ],
)
def test_settings_that_contradict_one_another(settings, words):
    with pytest.raises(InputError) as error:
        make(**settings)
    assert all(word in str(error.value) for word in words)


def test_cutoffs_beyond_the_vocabulary_leave_a_plain_model():
    model = make(adaptive_input_cutoffs=[30, 900], adaptive_softmax_cutoffs=[60])
    assert model.softmax.weight is model.decoder.embedding.weight
    assert model.softmax.weight.shape == (VOCAB, 8)
    assert model.hparams.adaptive_softmax_cutoffs == []


def test_a_key_type_that_the_model_lacks():
    with pytest.raises(InputError, match="layers are 0 to 1"):
        make().key_width("layer:2:output")


def test_settings_reach_their_places():
    model = make(
        **{**BANDS, "dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.3},
        **{"softmax_dropout": 0.4, "final_norm": True, "activation_checkpointing": True},
        **{"lr": 0.5, "momentum": 0.7, "adam_betas": (0.6, 0.8), "weight_decay": 0.03},
    )
    decoder = model.decoder
    assert decoder.dropout.p == 0.1
    for layer in decoder.layers:
        assert (layer.dropout.p, layer.attention_dropout) == (0.1, 0.2)
        assert layer.activation_dropout.p == 0.3
    assert model.softmax.dropout == 0.4
    assert isinstance(decoder.final_norm, torch.nn.LayerNorm)
    assert decoder.checkpoint_layers
    adam = model.configure_optimizers()["optimizer"]
    assert isinstance(adam, torch.optim.AdamW)
    assert (adam.defaults["betas"], adam.defaults["weight_decay"]) == ((0.6, 0.8), 0.03)
    nag = make(optimizer="nag", momentum=0.7, weight_decay=0.03).configure_optimizers()["optimizer"]
    assert (nag.defaults["momentum"], nag.defaults["weight_decay"]) == (0.7, 0.03)
    assert nag.defaults["nesterov"]


@pytest.mark.parametrize(("scaled", "scale"), [(True, 8**0.5), (False, 1.0)])
def test_embeddings_are_scaled(scaled, scale):
    assert make(scale_embedding=scaled).decoder.scale == pytest.approx(scale)


def test_the_last_update_of_an_epoch_has_the_mean_of_its_batches(batch):
    """Lightning divides each loss by 3, also where two batches are left."""
    model = make(**BANDS)
    model.log = lambda *args, **kwargs: None
    model.trainer = SimpleNamespace(accumulate_grad_batches=3, num_training_batches=5)
    losses = [model.training_step(batch, number).item() for number in range(5)]
    assert losses[:3] == [losses[0]] * 3
    assert losses[3] / 3 + losses[4] / 3 == pytest.approx(losses[0])


def of_the_whole(model: TransformerLM, row: torch.Tensor, key_type: str) -> tuple:
    """Log-probabilities `[T, V]` and keys `[T, d]` after each token of a row, read at once."""
    hidden, keys = model.hidden(row[None], (key_type,))
    return model.log_prob(hidden[0]), keys[key_type][0]


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("cuts", [[7], [3, 1, 1, 1, 1], [1] * 7], ids=str)
@torch.no_grad()
def test_steps_say_what_whole_rows_say(settings, cuts):
    """In rows of different length, padded on the left."""
    model, key_type = make(**settings).eval(), "last_ffn_input"
    rows = [torch.randint(VOCAB, (length,)) for length in (7, 4, 1)]
    padded = torch.stack([F.pad(row, (7 - len(row), 0), value=-1) for row in rows])
    state, read = None, 0
    for tokens in padded.split(cuts, dim=1):
        log_probs, keys, state = model.step(tokens, state, Want(keys=(key_type,)))
        read += tokens.shape[1]
        for number, row in enumerate(rows):
            there = read - 7 + len(row)
            newest = slice(max(there - tokens.shape[1], 0), max(there, 0))
            if there > 0:
                expected, expected_keys = of_the_whole(model, row, key_type)
                close = {"atol": 1e-5, "rtol": 0}
                assert_close(log_probs[number], expected[there - 1], **close)
                found = keys[key_type][number, newest.start - newest.stop :]
                assert_close(found, expected_keys[newest], **close)


@torch.no_grad()
def test_a_state_goes_on_as_rows_chosen_from_it():
    model = make().eval()
    read = torch.tensor([[-1, 3, 4], [5, 6, 7]])
    state = model.step(read, None, Want()).state.select(torch.tensor([1, 0, 1]))
    found = model.step(torch.tensor([[8], [9], [10]]), state, Want()).log_probs
    for number, row in enumerate(([5, 6, 7, 8], [3, 4, 9], [5, 6, 7, 10])):
        expected, _ = of_the_whole(model, torch.tensor(row), "last_hidden")
        assert_close(found[number], expected[-1], atol=1e-5, rtol=0)


def test_a_row_longer_than_the_model_reads_is_no_step():
    model = make(max_target_positions=4).eval()
    state = model.step(torch.zeros(1, 3).long(), None, Want()).state
    with pytest.raises(ValueError, match="2 tokens after 3, where a row holds 4"):
        model.step(torch.zeros(1, 2).long(), state, Want())
