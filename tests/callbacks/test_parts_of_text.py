"""Several ranks, each with a part of the running text, say together what one says of the whole."""

from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch

from neighborlm.callbacks.interpolation import Interpolation
from neighborlm.common.contracts import Scored
from neighborlm.datamodules.blocks import make_rows
from neighborlm.datamodules.dealing import PartOfText
from neighborlm.models.metrics import TokenLoss
from neighborlm.models.scorer import Scorer
from neighborlm.retrieval.memories import recent
from neighborlm.retrieval.memories.automaton import AutomatonMemory, AutomatonSettings
from neighborlm.retrieval.memories.knn_memory import KNNMemory
from neighborlm.retrieval.memories.mixers import ConstantMixer
from neighborlm.retrieval.memories.recent import RecentMemory
from neighborlm.retrieval.search.retriever import FlatRetriever

N, DIM, VOCAB, KEYS = 400, 6, 12, "last_ffn_input"


class Parrot(torch.nn.Module):
    """A model that says of tokens what it was told."""

    def __init__(self, told: Scored) -> None:
        super().__init__()
        self.told = told

    def score(self, positions, want) -> Scored:
        return self.told.some(positions)


@pytest.fixture
def told() -> Scored:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, VOCAB, (N,), generator=generator)
    keys = torch.randn(N, DIM, generator=generator) + torch.nn.functional.one_hot(targets % DIM)
    log_probs = -torch.rand(N, generator=generator) * 4 - 0.5
    return Scored(torch.arange(N), targets, log_probs, {KEYS: keys})


def memories_of(store) -> dict:
    retriever = FlatRetriever(store, "l2")
    walking = AutomatonSettings(min_pointers=2, walk_length=32)
    return {
        "recent": RecentMemory(70, 1.0),
        "automaton": AutomatonMemory(store, retriever, 8, 2.0, walking),
        "knn": KNNMemory(store, retriever, 8, 2.0),
    }


def evaluated(memories, mixer, told: Scored, rank: int, ranks: int) -> tuple[Interpolation, Scorer]:
    """A pass of one rank over its part of the text."""
    rows = make_rows(np.arange(N + 1), "none", 9, 2, 9)
    warm_up = max(memory.warm_up for memory in memories.values() if memory.in_order)
    sampler = PartOfText(rows, 30, warm_up)
    mixing = Interpolation(
        memories, mixer, told.targets.numpy(), keep_scores=True, tokens_at_once=64
    )
    scorer = Scorer(Parrot(told), mixing.want)
    scorer.first_position = sampler.first_position(rank, ranks)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    mixing.setup(trainer, scorer, "test")
    mixing.background.submit(faiss.omp_set_num_threads, 1)
    mixing.on_test_start(trainer, scorer)
    mixing.on_test_epoch_start(trainer, scorer)
    begin, _, end = sampler.part(rank, ranks)
    for batch in [*sampler.batches[begin:end], np.empty(0, dtype=np.int64)]:
        positions = rows.scored_by(batch) if len(batch) else batch
        outputs = scorer.test_step(torch.from_numpy(positions), 0)
        mixing.on_test_batch_end(trainer, scorer, outputs, None, 0)
    mixing.on_test_epoch_end(trainer, scorer)
    mixing.on_test_end(trainer, scorer)
    return mixing, scorer


def added_up(losses: list[TokenLoss]) -> tuple[float, int]:
    """Mean loss and tokens."""
    found = [loss.compute() for loss in losses]
    tokens = sum(int(of_rank["tokens"]) for of_rank in found)
    return sum(
        of_rank["loss"].item() * of_rank["tokens"].item() for of_rank in found
    ) / tokens, tokens


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_figures_are_those_of_one_rank(make_store, told, ranks):
    store, *_ = make_store(dim=DIM)
    mixer = ConstantMixer((0.4, 0.3, 0.2, 0.1))
    whole, alone = evaluated(memories_of(store), mixer, told, 0, 1)
    parts = [evaluated(memories_of(store), mixer, told, rank, ranks) for rank in range(ranks)]
    for losses, expected in (
        ([mixing.tally.loss for mixing, _ in parts], whole.tally.loss),
        ([scorer.test_loss for _, scorer in parts], alone.test_loss),
    ):
        loss, tokens = added_up(losses)
        assert tokens == N
        assert loss == pytest.approx(expected.compute()["loss"].item(), rel=1e-9)
    tables = [mixing.tally.table.gathered() for mixing, _ in parts]
    for name, column in whole.tally.table.gathered().items():
        joined = np.concatenate([table[name] for table in tables])
        np.testing.assert_allclose(joined, column, rtol=1e-6, err_msg=name)


def test_ranks_tune_by_the_whole_text(told, monkeypatch):
    """Of parts that overlap by a warm-up."""
    monkeypatch.setattr("neighborlm.retrieval.memories.recent_tuning.SIZES", (10, 40))
    alone, rank = RecentMemory(None, None), RecentMemory(None, None)
    heard = [told.some(slice(0, 210)), told.some(slice(180, N))]
    alone.heard, rank.heard = [told], heard[1:]
    monkeypatch.setattr(recent, "from_all_ranks", lambda mine: [heard[:1], mine])
    opinion = rank.tune()
    monkeypatch.undo()
    monkeypatch.setattr("neighborlm.retrieval.memories.recent_tuning.SIZES", (10, 40))
    assert torch.equal(opinion.log_probs, alone.tune().log_probs)
    assert (rank.size, rank.temperature) == (alone.size, alone.temperature)
