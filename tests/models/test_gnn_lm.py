"""GNN-LM as a model: what it can see, that it is a distribution, and what of it is trained."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from neighborlm.callbacks.knn_interpolation import KNNInterpolation
from neighborlm.common.errors import InputError
from neighborlm.datamodules.graphs import NeighborMemory
from neighborlm.datamodules.lm import LMBatch
from neighborlm.models.gnn_lm import GNNLM, OF_NETWORK
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs.checkpoints import load_model
from neighborlm.retrieval.search.retriever import FlatRetriever

VOCAB, WIDTH, LENGTH, ROWS = 30, 16, 9, 50
LM = {
    **{"vocab_size": VOCAB, "width": WIDTH, "ffn_width": 32, "layers": 2, "heads": 2},
    **{"dropout": 0.0, "max_target_positions": 32},
}
ADAPTIVE = {"adaptive_input_cutoffs": [10, 20], "adaptive_softmax_cutoffs": [10, 20]}


def make_model(lm=(), **settings) -> GNNLM:
    torch.manual_seed(0)
    settings = {"layers": 3, "heads": 2, "dropout": 0.0, **settings}
    hparams = dict(TransformerLM(**{**LM, **dict(lm)}).hparams)
    model = GNNLM(VOCAB, lm=hparams, **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_batch(tokens: torch.Tensor, features: np.ndarray | None = None) -> LMBatch:
    """Two rows of a text `[2, LENGTH + 1]`, with neighbours that do not depend on it."""
    rng = np.random.default_rng(0)
    table = rng.integers(-1, ROWS, (2 * LENGTH, 4))
    if features is None:
        features = rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
    positions = np.arange(2 * LENGTH).reshape(2, LENGTH)
    hood = NeighborMemory(table, features, 2, 2, 3).neighborhood(positions)
    scored = torch.ones(2, LENGTH, dtype=torch.bool)
    return LMBatch(tokens[:, :-1], tokens[:, 1:], torch.from_numpy(positions), scored, hood)


@pytest.mark.parametrize("settings", [{}, {"lm_ratio": 0.3}, {"residual": True}])
@pytest.mark.parametrize("lm", [(), tuple(ADAPTIVE.items())], ids=["plain", "adaptive"])
def test_no_token_sees_what_follows_it(lm, settings, make_store):
    model = make_model(lm, **settings).eval()
    store, _, _ = make_store(ROWS, WIDTH)
    text = torch.randint(VOCAB, (2, LENGTH + 1))
    changed_from = 5  # the first token that is another one
    other = text.clone()
    other[:, changed_from:] = (text[:, changed_from:] + 1) % VOCAB
    found = [scores_of(model, store, make_batch(tokens)) for tokens in (text, other)]
    for name in found[0]:
        one, two = (scores[name].view(2, LENGTH) for scores in found)
        # Target i is token i + 1 of the text: up to changed_from - 1 none has changed.
        # The words of a tail are scored together: how many there are may move the last digit.
        same = (x[:, : changed_from - 1] for x in (one, two))
        torch.testing.assert_close(*same, rtol=1e-6, atol=1e-6, msg=name)
        assert not torch.allclose(one[:, changed_from:], two[:, changed_from:]), name


def scores_of(model, store, batch) -> dict[str, torch.Tensor]:
    """Log-probabilities of all ways of predicting."""
    model.key_type = "last_ffn_input"
    knn = KNNInterpolation(store, FlatRetriever(store, "l2"), 8, lmbda=0.3, keep_scores=True)
    with torch.inference_mode():
        scores = model.score(batch)
        knn.on_test_batch_end(None, model, scores, batch, 0)
        knn.on_test_epoch_end(None, model)
    mixed = torch.from_numpy(knn.mixture.table.gathered()["log_prob"])
    return {"lm": scores.lm_log_probs, "gnn": scores.log_probs, "gnn + knn": mixed}


@pytest.mark.parametrize("lm", [(), tuple(ADAPTIVE.items())], ids=["plain", "adaptive"])
def test_sums_to_one_over_the_vocabulary(lm):
    model = make_model(lm, lm_ratio=0.3).eval()
    text = torch.randint(VOCAB, (2, LENGTH + 1))
    batch = make_batch(text)
    total = torch.zeros(2 * LENGTH)
    with torch.inference_mode():
        for word in range(VOCAB):
            every = batch._replace(targets=torch.full((2, LENGTH), word))
            total += model.score(every).log_probs.exp()
    torch.testing.assert_close(total, torch.ones(2 * LENGTH))


def test_neighbors_matter_and_their_values_are_seen_through_what_follows_them():
    model = make_model().eval()
    text = torch.randint(VOCAB, (2, LENGTH + 1))
    features = np.random.default_rng(1).standard_normal((ROWS, WIDTH), dtype=np.float32)
    batch = make_batch(text, features)
    with torch.inference_mode():
        before = model.score(batch).log_probs
        centre = int(batch.neighborhood.rows[batch.neighborhood.centres[0][0]])
        features[centre + 1] += 1  # which has read the neighbour's own token
        after = model.score(make_batch(text, features)).log_probs
    assert not torch.allclose(before, after)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, {"network"}),
        ({"unfreeze": ["adaptive_softmax"]}, {"network", "softmax"}),
        ({"unfreeze": ["layers"]}, {"network", "lm.decoder.layers"}),
        ({"unfreeze": ["embedding"]}, {"network", "lm.decoder.embedding"}),
        ({"residual": True, "output_bias": True}, {"network", "residual", "softmax.bias"}),
    ],
)
def test_what_is_trained(settings, trained):
    model = make_model(**settings)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(tuple(trained)) for name in names)
    assert all(any(name.startswith(part) for name in names) for part in trained)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers()["optimizer"]
    (-model.score(make_batch(torch.randint(VOCAB, (2, LENGTH + 1)))).log_probs.mean()).backward()
    # Everything trained gets a gradient, as a strategy with several ranks expects.
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= names
    assert any(name.startswith("network") for name in changed)


def test_the_lm_s_own_softmax_stays_when_a_copy_is_trained():
    model = make_model(tuple(ADAPTIVE.items()), unfreeze=["adaptive_softmax"])
    assert model.softmax is not model.lm.softmax
    assert not any(p.requires_grad for p in model.lm.parameters())


def test_a_bias_of_the_lm_is_where_a_trained_one_begins():
    model = make_model({"output_bias": True}.items(), output_bias=True)
    assert model.softmax is not model.lm.softmax
    fresh = GNNLM(VOCAB, lm=dict(model.lm.hparams), heads=2, output_bias=True)
    torch.nn.init.normal_(fresh.lm.softmax.bias)
    fresh._unfreeze([])
    assert torch.equal(fresh.softmax.bias, fresh.lm.softmax.bias)
    assert fresh.softmax.bias.requires_grad
    assert not fresh.lm.softmax.bias.requires_grad


def test_lm_path():
    model = make_model(unfreeze=["adaptive_softmax"], lm_path_probability=0.999999)
    batch = make_batch(torch.randint(VOCAB, (2, LENGTH + 1)))
    by_lm = model.softmax.target_log_prob(
        model.lm(batch.tokens)[0][batch.scored], batch.targets[batch.scored]
    )
    model.trainer = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=0))
    torch.testing.assert_close(model.training_log_probs(batch), by_lm)
    assert not torch.allclose(model.score(batch).log_probs, by_lm)


def test_share_of_batches_that_take_the_lm_path():
    """By their number alone, so that all ranks take the same."""
    model = make_model(unfreeze=["adaptive_softmax"], lm_path_probability=0.3)
    batch = make_batch(torch.randint(VOCAB, (2, LENGTH + 1)))
    by_lm = model.softmax.target_log_prob(
        model.lm(batch.tokens)[0][batch.scored], batch.targets[batch.scored]
    )

    def paths() -> list[bool]:
        taken = []
        for number in range(200):
            model.trainer = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=number))
            taken.append(torch.allclose(model.training_log_probs(batch), by_lm))
            torch.rand(3)  # what else a rank draws
        return taken

    first = paths()
    assert 0.2 < np.mean(first) < 0.4
    assert paths() == first


def test_training_begins_near_the_lm():
    """On texts that an LM is certain of: its own samples."""
    torch.manual_seed(0)
    hparams = dict(TransformerLM(**LM).hparams)
    model = GNNLM(VOCAB, lm=hparams, heads=2, dropout=0.0)
    torch.nn.init.normal_(model.lm.softmax.weight)
    batch = make_batch(torch.randint(VOCAB, (2, LENGTH + 1)))

    def distance() -> float:
        scores = model.eval().score(batch)
        return (scores.log_probs - scores.lm_log_probs).abs().mean().item()

    before = distance()
    model.begin_as_lm([batch])
    assert model.training
    assert not model.lm.training
    assert distance() < before / 3
    residual = GNNLM(VOCAB, lm=hparams, heads=2, residual=True).eval().score(batch)
    torch.testing.assert_close(residual.log_probs, residual.lm_log_probs)


@pytest.mark.parametrize("features", ["keys", "embeddings"])
def test_stored_token_features_take_the_lm_s_place(features):
    model = make_model().eval()
    values = np.random.default_rng(0).integers(0, VOCAB, ROWS).astype(np.uint8)
    batch = make_batch(
        torch.randint(VOCAB, (2, LENGTH + 1)), values if features == "embeddings" else None
    )
    online = model.score(batch)
    hidden, _ = model.lm(batch.tokens)
    stored = model.score(batch._replace(token_features=hidden, tokens=batch.tokens * 0))
    torch.testing.assert_close(stored.log_probs, online.log_probs)
    torch.testing.assert_close(stored.lm_log_probs, online.lm_log_probs)
    model.key_type = "last_ffn_input"  # which the LM computes all the same
    beside = model.score(batch._replace(token_features=hidden + 1))
    assert torch.equal(beside.keys, model.score(batch).keys)
    changed = model.lm.softmax.target_log_prob((hidden + 1)[batch.scored], online.targets)
    torch.testing.assert_close(beside.lm_log_probs, changed)


def save(model: GNNLM, path: Path) -> None:
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(model)
    model.trainer = trainer
    trainer.save_checkpoint(path)


@pytest.mark.parametrize("settings", [{}, {"unfreeze": ["adaptive_softmax"]}, {"width": 8}])
def test_checkpoint_round_trip(settings, tmp_path):
    model = make_model(**settings).eval()
    model.lm_fingerprint, model.neighbors = "0123", {"features": "keys"}
    save(model, tmp_path / "gnn.ckpt")
    again = load_model(tmp_path / "gnn.ckpt")
    batch = make_batch(torch.randint(VOCAB, (2, LENGTH + 1)))
    assert torch.equal(model.score(batch).log_probs, again.score(batch).log_probs)
    assert (again.lm_fingerprint, again.neighbors) == ("0123", {"features": "keys"})
    further = GNNLM(VOCAB, start_from=str(tmp_path / "gnn.ckpt"), heads=2, **settings).eval()
    torch.testing.assert_close(model.score(batch).log_probs, further.score(batch).log_probs)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint of a network that is by no setting what a new one is by default."""
    settings = {"layers": 2, "width": 8, "intra_context": 3, "residual": True, "values": True}
    model = make_model(**settings, lm_ratio=0.3, output_bias=True, unfreeze=["adaptive_softmax"])
    save(model, tmp_path / "gnn.ckpt")
    return tmp_path / "gnn.ckpt"


def test_a_second_stage_is_what_the_first_was(saved):
    first = load_model(saved)
    text = torch.randint(VOCAB, (2, LENGTH + 1))
    rows = np.random.default_rng(0).integers(0, VOCAB, 1000)
    batch = make_batch(text)
    hood = batch.neighborhood
    batch = batch._replace(neighborhood=hood._replace(values=torch.from_numpy(rows)[hood.rows]))
    second = GNNLM(VOCAB, start_from=str(saved), unfreeze=["adaptive_softmax"]).eval()
    assert {name: second.hparams[name] for name in OF_NETWORK} == {
        **{"layers": 2, "width": 8, "heads": 2, "intra_context": 3},
        **{"residual": True, "values": True, "lm_ratio": 0.3, "output_bias": True},
    }
    assert torch.equal(first.score(batch).log_probs, second.score(batch).log_probs)
    assert torch.equal(first.score(batch).lm_log_probs, second.score(batch).lm_log_probs)


@pytest.mark.parametrize(
    ("name", "value", "has"),
    [
        *(("layers", 3, 2), ("width", 16, 8), ("heads", 4, 2), ("intra_context", 0, 3)),
        *(("residual", False, True), ("values", False, True)),
        *(("lm_ratio", 0.2, 0.3), ("output_bias", False, True)),
    ],
)
def test_a_second_stage_that_is_not_what_the_first_was(saved, name, value, has):
    said = rf"--model.{name} is {value}, but --model.start_from .*gnn.ckpt has {has}; expected"
    with pytest.raises(InputError, match=said):
        GNNLM(VOCAB, start_from=str(saved), **{name: value})


def test_a_trained_softmax_is_not_put_in_the_lm_s_place(tmp_path):
    save(make_model(unfreeze=["adaptive_softmax"]), tmp_path / "gnn.ckpt")
    with pytest.raises(InputError, match=r"expected --model.unfreeze to name adaptive_softmax"):
        GNNLM(VOCAB, start_from=str(tmp_path / "gnn.ckpt"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lm": None}, "--model.lm_checkpoint is missing"),
        ({"vocab_size": 31}, "--data.dictionary"),
        ({"heads": 3}, "not a multiple of --model.heads 3"),
        ({"lm_ratio": 1.0}, "--model.lm_ratio is 1.0"),
        ({"lm_path_probability": 0.5}, "--model.unfreeze"),
        ({"layers": 0}, "--model.layers is 0"),
        ({"intra_context": -1}, "--model.intra_context is -1"),
    ],
)
def test_refusals(settings, said):
    lm = dict(TransformerLM(**LM).hparams)
    with pytest.raises(InputError, match=said):
        GNNLM(**{"vocab_size": VOCAB, "lm": lm, "heads": 2, **settings})
