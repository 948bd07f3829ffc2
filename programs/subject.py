"""What is evaluated, and one pass over a split."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback, Trainer

from neighborlm.callbacks.interpolation import Interpolation
from neighborlm.callbacks.throughput import Throughput
from neighborlm.common.contracts import LanguageModel, Memory, Mixer, Scored, TextSize, Want
from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.scorer import Scorer
from neighborlm.programs.belonging import join
from neighborlm.programs.neighbor_products import NeighborProducts
from neighborlm.programs.plausibility import check_ids
from neighborlm.programs.products import Products
from neighborlm.programs.reports import figures
from neighborlm.programs.run import Run
from neighborlm.programs.settings import KNNSettings, NeighborSettings


@dataclass
class Subject:
    """What is evaluated.

    Attributes:
        model: trained.
        data: the corpus.
        run: how Lightning evaluates, and where files go.
        neighbors: what a GNN-LM reads besides the text; None for other models.

    Raises:
        InputError: the model was trained with another dictionary than the corpus has, or cannot
            read rows that long.
    """

    model: LanguageModel
    data: LMDataModule
    run: Run
    neighbors: NeighborProducts | None = None

    def __post_init__(self) -> None:
        join(self.model, self.data)
        check_ids(self.model, self.data, self.run)

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        data: LMDataModule,
        run: Run,
        neighbors: NeighborSettings | None = None,
        checkpoint: Path | str | None = None,
    ) -> "Subject":
        """What of these belongs together.

        Args:
            neighbors: what a GNN-LM is to see of its neighbours; by default as trained.
            checkpoint: of the model, for messages.

        Raises:
            InputError: they do not, see the class.
        """
        products = None
        if isinstance(model, GNNLM):
            settings = neighbors or NeighborSettings()
            products = NeighborProducts(run, data, model, settings, "online", checkpoint)
        return cls(model, data, run, products)

    def keyed(self, key_type: str) -> LanguageModel:
        """The model whose feature a key type is: keys of an LM are those that it makes alone."""
        return self.model if self.neighbors is None or key_type == "gnn" else self.model.lm

    def give_neighbors(self, *splits: str) -> None:
        """Makes what a GNN-LM reads besides the text of some splits."""
        if self.neighbors is not None:
            self.neighbors.attach(*splits)

    def products(self, knn: KNNSettings) -> Products:
        """The datastores of its keys and their indexes."""
        shown = None if self.neighbors is None else self.neighbors.given
        return Products(self.run, self.data, self.keyed(knn.key_type), knn, shown=shown)


PLAIN = Want()
"""Log-probabilities alone."""


@dataclass(frozen=True)
class Pass:
    """One pass over a split.

    Attributes:
        results: `split`, `tokens` and the figures of the LM, and under `gnn` those of a graph
            network on top of it.
        seconds: wall time.
        trainer: that made it.
    """

    results: dict[str, Any]
    seconds: float
    trainer: Trainer


def score(
    subject: Subject,
    split: str,
    want: Want = PLAIN,
    callbacks: Sequence[Callback] = (),
    wanted: np.ndarray | None = None,
) -> Pass:
    """Scores every token of a split once.

    Args:
        wanted: bool `[tokens]`; only rows that score at least one of these are read.

    Times are those of the whole pass, or of the model's steps alone where memories are asked beside
    it. Where Lightning is told to leave out batches, those that are scored are the first of the
    text.

    Raises:
        InputError: it is told to leave out all.
    """
    subject.give_neighbors(split)
    throughput, scorer = Throughput(), Scorer(subject.model, want)
    trainer = subject.run.trainer([throughput, *callbacks])
    asking = [callback for callback in callbacks if isinstance(callback, Interpolation)]
    memories = [memory for callback in asking for memory in callback.memories.values()]
    warm_ups = [memory.warm_up or 0 for memory in memories if memory.in_order]
    loader = subject.data.evaluation_dataloader(
        split,
        wanted=wanted,
        in_text_order=subject.run.evaluates_part,
        warm_up=max(warm_ups, default=None),
    )
    if warm_ups:
        part = (trainer.global_rank, trainer.world_size)
        scorer.first_position = loader.sampler.first_position(*part)
    trainer.test(scorer, loader, verbose=False)
    total = scorer.test_loss.compute()
    tokens = int(total["tokens"])
    if tokens == 0:
        raise InputError(
            f"--trainer.limit_test_batches leaves no token of the {split} split; expected a batch "
            "at least"
        )
    seconds = throughput.model_seconds if asking else throughput.seconds
    results = {"split": split, "tokens": tokens}
    own = figures(total["loss"].item(), tokens, seconds)
    if subject.neighbors is None:
        return Pass(results | own, throughput.seconds, trainer)
    lm_loss = scorer.lm_loss.compute()["loss"].item()
    of_network = own | asdict(subject.neighbors.settings)
    if subject.neighbors.exchange is not None:
        of_network["communication"] = subject.neighbors.exchange.communication
    results |= figures(lm_loss, tokens, seconds) | {"gnn": of_network}
    return Pass(results, throughput.seconds, trainer)


def tokens_of(data: LMDataModule, split: str) -> int:
    """How many tokens of a split are scored."""
    rows = data.rows(split, data.context_window)
    return int((rows.ends - rows.starts).sum())


def measure_of(data: LMDataModule) -> dict[str, Any]:
    """What figures of a corpus are figures of: what a token is, the rows that are read, how far one
    is from the next (`stride`), and what the first token of a row is predicted from."""
    names = ("tokens_per_sample", "context_window", "break_mode")
    window = {name: getattr(data, name) for name in names}
    window["stride"] = data.tokens_per_sample - data.context_window
    window["protocol"] = data.settings.protocol
    window["first_token"] = FIRST_TOKEN[data.settings.protocol, data.window_start is not None]
    return {"unit": data.settings.unit, "window": window}


FIRST_TOKEN = {
    ("neighborlm", False): "scored, after the token before it; the split's after an end token",
    ("neighborlm", True): "scored, after the tokenizer's start token",
    ("knn-transformers", False): "not scored in a group of lines",
}
"""What becomes of the first token of a row, by protocol and whether rows get a start token."""


def text_size_of(data: LMDataModule, split: str, tokens: int) -> TextSize | None:
    """The size of the raw text that the first so many scored tokens of a split stand for; None
    where it is not known."""
    n_tokens = len(data.stream(split).tokens)
    if tokens == n_tokens:
        return data.text_size(split)
    dropped = data.rows(split, data.context_window).dropped(n_tokens)
    return data.text_size(split, np.delete(np.arange(n_tokens), dropped)[:tokens])


@dataclass(frozen=True)
class Evaluated:
    """What came of an evaluation.

    Attributes:
        results: JSON-able: `split`, which `part` of it where that is not all, its `unit` (`word`,
            `char`, `byte` or `subword`), the `window` that rows are read in, `tokens` and, where
            they are known, `words` and `bytes` of the raw text, and the figures of the LM; under
            `gnn` those of a graph network on top of it, under `knn` (the one memory) or `mixture`
            those with memories, and under `table` a row for each way of predicting, see
            `mixture.table_of`.
        seconds: of each stage that was not done before.
        trainer: of the last pass.
        memories: that were asked, by name.
        mixer: that weighed them.
        scores: of every token in the order of the text, the columns of `Tally.table`; None where
            they were not kept.
        sample: of tokens that lie evenly over the split, see `Tally.sample`; None without memories.
        shown: some of these with their keys, see `Tally.shown`.
    """

    results: dict[str, Any]
    seconds: dict[str, float]
    trainer: Trainer
    memories: dict[str, Memory] = field(default_factory=dict)
    mixer: Mixer | None = None
    scores: dict[str, np.ndarray] | None = None
    sample: dict[str, np.ndarray] | None = None
    shown: Scored | None = None


def seconds_of(subject: Subject, *products: Products) -> dict[str, float]:
    """How long each stage took that was not done before."""
    own = subject.neighbors.seconds if subject.neighbors else {}
    return {name: s for of in (own, *(p.seconds for p in products)) for name, s in of.items()}
