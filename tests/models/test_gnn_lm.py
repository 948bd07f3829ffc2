"""GNN-LM as a model: what a token can see, that it gives a distribution, and which parts train."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch.nn import functional as F
from torch.utils.data import DataLoader

from neighborlm.common.contracts import Backbone, Want
from neighborlm.common.errors import InputError
from neighborlm.datamodules.graphs import NeighborMemory
from neighborlm.datamodules.lm import LMBatch
from neighborlm.models.gnn_lm import GNNLM, OF_NETWORK, mix
from neighborlm.models.neighbor_states import NeighborStates
from neighborlm.models.scorer import Scorer
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs.architectures import make_gnn_lm
from neighborlm.programs.checkpoints import load_model
from neighborlm.retrieval.memories import KNNMemory
from neighborlm.retrieval.memories.mixers import mixture
from neighborlm.retrieval.search.retriever import FlatRetriever

VOCAB, WIDTH, LENGTH, ROWS = 30, 16, 9, 50
LM = {
    **{"vocab_size": VOCAB, "width": WIDTH, "ffn_width": 32, "layers": 2, "heads": 2},
    **{"dropout": 0.0, "max_target_positions": 32},
}
ADAPTIVE = {"adaptive_input_cutoffs": [10, 20], "adaptive_softmax_cutoffs": [10, 20]}


def make_model(lm=(), seed: int = 0, **settings) -> GNNLM:
    torch.manual_seed(seed)
    settings = {"layers": 3, "heads": 2, "dropout": 0.0, **settings}
    model = GNNLM(TransformerLM(**{**LM, **dict(lm)}), **settings)
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
    """Log-probabilities of targets by each way of computing them."""
    knn = KNNMemory(store, FlatRetriever(store, "l2"), 8)
    with torch.inference_mode():
        scores = model.score(batch, knn.want)
        mixed = mixture((scores.log_probs, knn.say(scores).log_probs), (0.7, 0.3))
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
            total += model.score(every, Want()).log_probs.exp()
    torch.testing.assert_close(total, torch.ones(2 * LENGTH))


@pytest.mark.parametrize("settings", [{}, {"lm_ratio": 0.3}, {"output_bias": True}])
def test_entropy_and_the_most_probable_tokens(settings, device):
    """They are those of the mixture, where there is one."""
    model = make_model(**settings).eval().to(device)
    batch = move_data_to_device(make_batch(torch.randint(VOCAB, (2, LENGTH + 1))), device)
    with torch.inference_mode():
        hidden, out, _ = model(batch)
        scored = model.score(batch, Want(log_probs=False, entropy=True, top=3))
        beside, p = (
            F.linear(x[batch.scored], model.softmax.weight, model.softmax.bias).double().softmax(1)
            for x in (hidden, out)
        )
        ratio = model.hparams.lm_ratio
        p = ratio * beside + (1 - ratio) * p
    scored, p = scored.on_cpu(), p.cpu()
    torch.testing.assert_close(scored.entropy, torch.special.entr(p).sum(1).float())
    best = p.sort(dim=1, descending=True)
    assert torch.equal(scored.top_ids, best.indices[:, :3])
    torch.testing.assert_close(scored.top_log_probs, best.values[:, :3].log().float())
    assert scored.log_probs is scored.lm_log_probs is None


def test_neighbors_matter_and_their_values_are_seen_through_what_follows_them():
    model = make_model().eval()
    text = torch.randint(VOCAB, (2, LENGTH + 1))
    features = np.random.default_rng(1).standard_normal((ROWS, WIDTH), dtype=np.float32)
    batch = make_batch(text, features)
    with torch.inference_mode():
        before = model.score(batch, Want()).log_probs
        centre = int(batch.neighborhood.rows[batch.neighborhood.centres[0][0]])
        features[centre + 1] += 1  # which has read the neighbour's own token
        after = model.score(make_batch(text, features), Want()).log_probs
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
    batch = make_batch(torch.randint(VOCAB, (2, LENGTH + 1)))
    (-model.score(batch, Want()).log_probs.mean()).backward()
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
    fresh = GNNLM(TransformerLM(**model.lm.hparams), heads=2, output_bias=True)
    torch.nn.init.normal_(fresh.lm.softmax.bias)
    fresh._unfreeze([])
    assert torch.equal(fresh.softmax.bias, fresh.lm.softmax.bias)
    assert fresh.softmax.bias.requires_grad
    assert not fresh.lm.softmax.bias.requires_grad


def change(model: GNNLM, how: str, batch: LMBatch) -> None:
    """Changes weights of the graph network in one of several ways."""
    if how == "a training":
        model.train()
    if how in ("a training", "an update"):
        with torch.enable_grad():
            (-model.score(batch, Want()).log_probs.mean()).backward()
            torch.optim.AdamW(model.network.parameters(), 0.1, fused=True).step()
    elif how == "load_state_dict":
        model.load_state_dict(make_model(seed=1).state_dict())
    if how == "a training":
        model.eval()


@pytest.mark.parametrize("how", ["a training", "an update", "load_state_dict", "another store"])
@torch.no_grad()
def test_states_of_neighbours_are_kept_no_longer_than_they_are_right(how):
    model, text = make_model().eval(), torch.randint(VOCAB, (2, LENGTH + 1))
    batch = make_batch(text)
    model.score(batch, Want())
    kept = model.neighbor_states
    model.score(batch, Want())
    assert model.neighbor_states is kept
    change(model, how, batch)
    if how == "another store":
        batch = make_batch(text, np.random.default_rng(1).standard_normal((ROWS, WIDTH), "f4"))
    found = model.score(batch, Want()).log_probs
    assert model.neighbor_states is not kept
    with torch.enable_grad():
        expected = model.score(batch, Want()).log_probs
    assert model.neighbor_states is None
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_lightning_has_states_forgotten():
    """The cache is dropped at the end of a validation, and at both ends of every other pass."""
    model, batch = make_model(), make_batch(torch.randint(VOCAB, (2, LENGTH + 1)))
    loader = DataLoader([batch], batch_size=None)
    seen = []

    class Watch(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_) -> None:
            seen.append(model.neighbor_states)

        on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer(**settings, callbacks=[Watch()], enable_checkpointing=False)
    scorer = Scorer(model, Want())
    passes = {trainer.validate: model, trainer.test: scorer, trainer.predict: scorer}
    for run, module in passes.items():
        stale = model.neighbor_states = NeighborStates(2, batch.neighborhood.store)
        run(module, loader)
        assert seen[-1] is not stale
        assert seen[-1].states
        assert model.neighbor_states is None
    assert len(set(map(id, seen))) == 3


class ForeignLM(torch.nn.Module):
    """Has what a graph network needs of an LM, and no more; no file holds its weights."""

    vocab_size, width, max_target_positions, fingerprint = VOCAB, WIDTH, 32, "foreign"

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(VOCAB, WIDTH)

    def key_width(self, key_type: str) -> int:
        return {"own": WIDTH}[key_type]

    def hidden(self, tokens, key_types=()):
        hidden = self.words(tokens).cumsum(dim=1)
        return hidden, {key_type: hidden * 2 for key_type in key_types}

    def log_prob(self, hidden):
        return (hidden @ self.words.weight.T).log_softmax(dim=-1)

    def target_log_prob(self, hidden, targets):
        return self.log_prob(hidden).gather(1, targets[:, None])[:, 0]

    def embed(self, tokens):
        return self.words(tokens)

    def score(self, batch, want):
        raise NotImplementedError


class NoModule:
    """The same, but not a torch module."""

    def __init__(self, lm: ForeignLM) -> None:
        for name in (*("vocab_size", "width", "max_target_positions", "fingerprint", "key_width"),
                     *("hidden", "log_prob", "target_log_prob", "embed", "score")):  # fmt: skip
            setattr(self, name, getattr(lm, name))


@pytest.mark.parametrize("wrap", [lambda lm: lm, NoModule], ids=["module", "no module"])
@pytest.mark.parametrize("features", ["keys", "embeddings"])
def test_on_a_backbone_of_no_kind_of_ours(wrap, features):
    torch.manual_seed(0)
    lm = wrap(ForeignLM())
    assert isinstance(lm, Backbone)
    model = GNNLM(lm, heads=2, values=True, lm_ratio=0.2)
    values = np.random.default_rng(0).integers(0, VOCAB, ROWS)
    batch = make_batch(
        torch.randint(VOCAB, (2, LENGTH + 1)),
        values.astype(np.uint8) if features == "embeddings" else None,
    )
    hood = batch.neighborhood
    batch = batch._replace(neighborhood=hood._replace(values=torch.from_numpy(values)[hood.rows]))
    model.training_log_probs(batch).mean().backward()
    assert all(p.grad is not None for p in model.network.parameters() if p.requires_grad)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lm." in name)
    with torch.no_grad():
        scored = model.eval().score(batch, Want(("own", "gnn"), entropy=True))
        hidden, _ = lm.hidden(batch.tokens)
        by_lm = lm.target_log_prob(hidden[batch.scored], scored.targets)
    torch.testing.assert_close(scored.lm_log_probs, by_lm)
    assert torch.equal(scored.keys["own"], 2 * hidden[batch.scored])
    by_network = lm.target_log_prob(scored.keys["gnn"], scored.targets)
    torch.testing.assert_close(scored.log_probs, mix(by_lm, by_network, 0.2))
    assert (model.vocab_size, model.max_target_positions) == (VOCAB, 32)
    assert (model.key_width("gnn"), model.key_width("own")) == (WIDTH, WIDTH)
    before = model.fingerprint
    lm.fingerprint = "another"
    assert model.eval().fingerprint != before
    for settings in ({"unfreeze": ["layers"]}, {"output_bias": True}):
        with pytest.raises(InputError, match=r"--model.(unfreeze|output_bias)"):
            GNNLM(lm, heads=2, **settings)


def test_lm_path():
    model = make_model(unfreeze=["adaptive_softmax"], lm_path_probability=0.999999)
    batch = make_batch(torch.randint(VOCAB, (2, LENGTH + 1)))
    by_lm = model.softmax.target_log_prob(
        model.lm.hidden(batch.tokens)[0][batch.scored], batch.targets[batch.scored]
    )
    torch.testing.assert_close(model.training_log_probs(batch), by_lm)
    assert not torch.allclose(model.score(batch, Want()).log_probs, by_lm)


def test_share_of_batches_that_take_the_lm_path():
    """A batch's number alone decides, so that all ranks take the same path."""
    model = make_model(unfreeze=["adaptive_softmax"], lm_path_probability=0.3)
    batch = make_batch(torch.randint(VOCAB, (2, LENGTH + 1)))
    by_lm = model.softmax.target_log_prob(
        model.lm.hidden(batch.tokens)[0][batch.scored], batch.targets[batch.scored]
    )

    def paths() -> list[bool]:
        taken = []
        for number in range(200):
            model.batch_seed = (1, number, 0)
            taken.append(torch.allclose(model.training_log_probs(batch), by_lm))
            torch.rand(3)  # what else a rank draws
        return taken

    first = paths()
    assert 0.2 < np.mean(first) < 0.4
    assert paths() == first


def test_training_begins_near_the_lm():
    """The distance from the LM shrinks; with `residual` it is zero from the start."""
    torch.manual_seed(0)
    model = GNNLM(TransformerLM(**LM), heads=2, dropout=0.0)
    torch.nn.init.normal_(model.lm.softmax.weight)
    batch = make_batch(torch.randint(VOCAB, (2, LENGTH + 1)))

    def distance() -> float:
        scores = model.eval().score(batch, Want())
        return (scores.log_probs - scores.lm_log_probs).abs().mean().item()

    before = distance()
    model.begin_as_lm([batch])
    assert model.training
    assert not model.lm.training
    assert distance() < before / 3
    residual = GNNLM(TransformerLM(**LM), heads=2, residual=True).eval().score(batch, Want())
    torch.testing.assert_close(residual.log_probs, residual.lm_log_probs)


@pytest.mark.parametrize("features", ["keys", "embeddings"])
def test_stored_token_features_take_the_lm_s_place(features):
    model = make_model().eval()
    values = np.random.default_rng(0).integers(0, VOCAB, ROWS).astype(np.uint8)
    batch = make_batch(
        torch.randint(VOCAB, (2, LENGTH + 1)), values if features == "embeddings" else None
    )
    online = model.score(batch, Want())
    hidden, _ = model.lm.hidden(batch.tokens)
    stored = model.score(batch._replace(token_features=hidden, tokens=batch.tokens * 0), Want())
    torch.testing.assert_close(stored.log_probs, online.log_probs)
    torch.testing.assert_close(stored.lm_log_probs, online.lm_log_probs)
    want = Want(("last_ffn_input",))  # which the LM computes all the same
    beside = model.score(batch._replace(token_features=hidden + 1), want)
    expected = model.score(batch, want).keys["last_ffn_input"]
    assert torch.equal(beside.keys["last_ffn_input"], expected)
    changed = model.lm.softmax.target_log_prob((hidden + 1)[batch.scored], online.targets)
    torch.testing.assert_close(beside.lm_log_probs, changed)


def save(model: pl.LightningModule, path: Path) -> None:
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
    assert torch.equal(model.score(batch, Want()).log_probs, again.score(batch, Want()).log_probs)
    assert (again.lm_fingerprint, again.neighbors) == ("0123", {"features": "keys"})
    start = str(tmp_path / "gnn.ckpt")
    further = make_gnn_lm(VOCAB, start_from=start, heads=2, **settings).eval()
    found = further.score(batch, Want()).log_probs
    torch.testing.assert_close(found, model.score(batch, Want()).log_probs)
    assert (further.lm_fingerprint, further.neighbors) == ("0123", {"features": "keys"})


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint of a network none of whose settings is the default."""
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
    second = make_gnn_lm(VOCAB, start_from=str(saved), unfreeze=["adaptive_softmax"]).eval()
    assert {name: second.hparams[name] for name in OF_NETWORK} == {
        **{"layers": 2, "width": 8, "heads": 2, "intra_context": 3},
        **{"residual": True, "values": True, "lm_ratio": 0.3, "output_bias": True},
    }
    one, two = (model.score(batch, Want()) for model in (first, second))
    assert torch.equal(one.log_probs, two.log_probs)
    assert torch.equal(one.lm_log_probs, two.lm_log_probs)


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
        make_gnn_lm(VOCAB, start_from=str(saved), **{name: value})


def test_a_trained_softmax_is_not_put_in_the_lm_s_place(tmp_path):
    save(make_model(unfreeze=["adaptive_softmax"]), tmp_path / "gnn.ckpt")
    with pytest.raises(InputError, match=r"expected --model.unfreeze to name adaptive_softmax"):
        make_gnn_lm(VOCAB, start_from=str(tmp_path / "gnn.ckpt"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"heads": 3}, "not a multiple of --model.heads 3"),
        ({"lm_ratio": 1.0}, "--model.lm_ratio is 1.0"),
        ({"lm_path_probability": 0.5}, "--model.unfreeze"),
        ({"layers": 0}, "--model.layers is 0"),
        ({"intra_context": -1}, "--model.intra_context is -1"),
        ({"lr": 0.0}, "--model.lr is 0.0"),
        ({"t_mult": 0.5}, "--model.t_mult is 0.5"),
    ],
)
def test_refusals(settings, said):
    with pytest.raises(InputError, match=said):
        GNNLM(TransformerLM(**LM), **{"heads": 2, **settings})


def test_checkpoints_to_train_on_that_do_not_serve(saved, tmp_path):
    with pytest.raises(InputError, match=r"--model.lm_checkpoint is missing"):
        make_gnn_lm(VOCAB)
    with pytest.raises(InputError, match=r"lm_checkpoint .*gnn.ckpt: holds a GNNLM; expected a Tr"):
        make_gnn_lm(VOCAB, lm_checkpoint=str(saved))
    save(TransformerLM(**LM), tmp_path / "lm.ckpt")
    with pytest.raises(InputError, match=r"start_from .*lm.ckpt: holds a TransformerLM; expected"):
        make_gnn_lm(VOCAB, start_from=str(tmp_path / "lm.ckpt"))
    for flag, path in (("lm_checkpoint", tmp_path / "lm.ckpt"), ("start_from", saved)):
        said = (
            rf"--model.{flag} .*: has a vocabulary of {VOCAB}, .* of 31; pass .*--data.dictionary"
        )
        with pytest.raises(InputError, match=said):
            make_gnn_lm(31, **{flag: str(path)})
    made = make_gnn_lm(VOCAB, lm_checkpoint=str(tmp_path / "lm.ckpt"))
    assert made.hparams.lm_checkpoint == str(tmp_path / "lm.ckpt")
    assert made.hparams.lm["width"] == made.hparams.width == WIDTH
