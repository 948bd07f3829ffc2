"""Any language model in Lightning's test and prediction runs: figures and keys follow the present
want, whatever was wanted before."""

import math
from itertools import pairwise

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from neighborlm.common.contracts import LanguageModel, Scored, Want
from neighborlm.datamodules.graphs import NeighborMemory
from neighborlm.datamodules.lm import LMBatch
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.scorer import Scorer
from neighborlm.models.transformer_lm import TransformerLM

VOCAB, WIDTH = 12, 8


class Bigram:
    """p(w | v) is the share of w among the tokens after v in a text, with add-one smoothing."""

    max_target_positions, fingerprint, vocab_size = 1 << 20, "bigram", VOCAB

    def __init__(self, text: torch.Tensor) -> None:
        counts = torch.ones(VOCAB, VOCAB).index_put_((text[:-1], text[1:]), torch.ones(()), True)
        self.log_probs = (counts / counts.sum(dim=1, keepdim=True)).log()

    def key_width(self, key_type: str) -> int:
        return VOCAB

    def score(self, batch: LMBatch, want: Want) -> Scored:
        tokens, targets = batch.tokens[batch.scored], batch.targets[batch.scored]
        keys = {key_type: self.log_probs[tokens] for key_type in want.keys}
        log_probs = self.log_probs[tokens, targets] if want.log_probs else None
        return Scored(batch.positions[batch.scored], targets, log_probs, keys)


def make_batches(with_neighbors: bool = False) -> list[LMBatch]:
    """Four batches of two rows of a random text; the first token of each row only gives context."""
    text = torch.randint(VOCAB, (8, 7), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(48).view(8, 6)
    scored = (torch.arange(6) > 0).expand(8, 6)
    memory = None
    if with_neighbors:
        rng = np.random.default_rng(0)
        keys = rng.standard_normal((20, WIDTH), dtype=np.float32)
        memory = NeighborMemory(rng.integers(0, 20, (48, 3)), keys, 1, 1, layers=2)
    return [
        LMBatch(
            *(text[rows, :-1], text[rows, 1:], positions[rows], scored[rows]),
            memory and memory.neighborhood(positions[rows].numpy()),
        )
        for rows in (slice(first, first + 2) for first in range(0, 8, 2))
    ]


class Collect(pl.Callback):
    """Collects what each step returned."""

    def __init__(self) -> None:
        self.scored: list[Scored] = []

    def on_test_batch_end(self, trainer, pl_module, outputs, *_) -> None:
        self.scored.append(outputs)

    on_predict_batch_end = on_test_batch_end


def run(stage: str, scorer: Scorer, batches: list[LMBatch]) -> list[Scored]:
    """A test or prediction run."""
    collect = Collect()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[collect]
    )
    loader = DataLoader(batches, batch_size=None)
    if stage == "test":
        trainer.test(scorer, loader, verbose=False)
    else:
        trainer.predict(scorer, loader, return_predictions=False)
    return collect.scored


def test_a_model_of_no_kind_of_ours():
    batches = make_batches()
    text = torch.tensor([0, 1, 2, 1, 2, 1, 3, 5, 5, 5, 7, 11, 0])
    model = Bigram(text)
    assert isinstance(model, LanguageModel)
    scorer = Scorer(model, Want(("row",)))
    scored = run("test", scorer, batches)
    following, log_probs = text.tolist(), []
    for batch in batches:
        for row in range(2):
            for place in range(1, 6):
                v, w = int(batch.tokens[row, place]), int(batch.targets[row, place])
                pairs = list(pairwise(following))
                count = sum(first == v for first, _ in pairs)
                log_probs.append(math.log((pairs.count((v, w)) + 1) / (count + VOCAB)))
    total = scorer.test_loss.compute()
    assert total["tokens"] == len(log_probs) == 40
    assert total["loss"].item() == pytest.approx(-np.mean(log_probs), rel=1e-6)
    assert scorer.lm_loss.update_count == 0
    found = torch.cat([part.log_probs for part in scored]).tolist()
    assert found == pytest.approx(log_probs, rel=1e-6)
    predicted = run("predict", Scorer(model, Want(("row",), log_probs=False)), batches)
    for of_test, of_prediction in zip(scored, predicted, strict=True):
        assert of_prediction.log_probs is None
        assert torch.equal(of_prediction.keys["row"], of_test.keys["row"])


def transformer() -> tuple[TransformerLM, list[LMBatch], tuple[str, str]]:
    torch.manual_seed(0)
    model = TransformerLM(VOCAB, WIDTH, 12, 2, 2, dropout=0.2)
    return model, make_batches(), ("last_ffn_input", "layer:0:output")


def graph_network() -> tuple[GNNLM, list[LMBatch], tuple[str, str]]:
    model = GNNLM(transformer()[0], heads=2, layers=2, lm_ratio=0.3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model, make_batches(with_neighbors=True), ("gnn", "last_ffn_input")


@pytest.mark.parametrize("make", [transformer, graph_network])
@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 1)])
def test_passes_of_different_wants_over_one_model(make, order):
    """One want changes neither the figures nor the keys of another, in either order."""
    model, batches, types = make()
    wants = Want(types[:1]), Want((*types[1:], *types[:1]), entropy=True)
    with torch.enable_grad():  # so that no state of a neighbour is kept
        expected = [model.eval().score(batch, Want(types)) for batch in batches]
    loss = -torch.cat([part.log_probs for part in expected]).double().mean().item()
    model.train()
    for number in order:
        scorer = Scorer(model, wants[number])
        found = run("test", scorer, batches)
        assert scorer.test_loss.compute()["tokens"] == 40
        assert scorer.test_loss.compute()["loss"].item() == pytest.approx(loss, rel=1e-5)
        for part, of in zip(found, expected, strict=True):
            assert tuple(part.keys) == wants[number].keys
            for key_type, keys in part.keys.items():
                torch.testing.assert_close(keys, of.keys[key_type].detach())
            assert (part.entropy is None) != wants[number].entropy
        if isinstance(model, GNNLM):
            lm_loss = -torch.cat([part.lm_log_probs for part in expected]).double().mean().item()
            assert lm_loss != pytest.approx(loss, rel=1e-3)
            assert scorer.lm_loss.compute()["loss"].item() == pytest.approx(lm_loss, rel=1e-5)
        assert model.training  # as it was


def test_each_pass_starts_new_sums():
    model, batches, _ = transformer()
    scorer = Scorer(model, Want())
    for few in (batches, batches[:1]):
        run("test", scorer, few)
        assert scorer.test_loss.compute()["tokens"] == 10 * len(few)
