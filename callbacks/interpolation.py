"""`Interpolation`: mixes a model's test-time log-probabilities with what memories say.

The callback collects scored tokens, asks the memories in a thread beside Lightning's loop while the
model computes the next batches, mixes and tallies. Tokens before a rank's own part of the text
(`Scorer.first_position`) only bring the memories of the running text up to it.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any

import faiss
import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from neighborlm.callbacks.background import Background
from neighborlm.callbacks.core_sharing import CoreSharing
from neighborlm.callbacks.tally import Tally
from neighborlm.common.contracts import LanguageModel, Memory, Mixer, Opinion, Scored, Want
from neighborlm.common.errors import InputError
from neighborlm.common.names import named

FIRST_TOKENS, TOKENS_AT_ONCE = 2048, 10240
"""Tokens that memories are asked about the first time, few so that they begin soon, and at most,
many so that an inverted list is read once for all queries that visit it. The number doubles from
one question to the next."""


class Interpolation(Callback):
    """Mixes what `test_step` returns with the opinions of memories.

    Args:
        memories: by name.
        mixer: weighs them; None only to hear what they say.
        alone: by memory, what weighs the model and this memory alone, beside the mixture of all.
        text: integers `[N]`, the tokens of the split.
        keep_scores: keep every token's log-probabilities and the memories' features, in
            `tally.table`.
        tokens_at_once: see `TOKENS_AT_ONCE`.

    Attributes:
        tally: what the mixture says of the tokens of the last pass.
        seconds: spent on each memory and on mixing (`mix`) in the background, and by the model's
            loop on waiting for them (`wait`).
    """

    def __init__(
        self,
        memories: Mapping[str, Memory],
        mixer: Mixer | None,
        text: np.ndarray,
        keep_scores: bool = False,
        tokens_at_once: int = TOKENS_AT_ONCE,
        alone: Mapping[str, Mixer] | None = None,
    ) -> None:
        self.memories = memories
        self.mixer = mixer
        self.alone = alone or {}
        self.text = text
        self.keep_scores = keep_scores
        self.tokens_at_once = tokens_at_once
        self.tally = Tally(keep_scores, self.alone, len(text))
        self.seconds: Counter[str] = Counter()
        self.sharing: CoreSharing | None = None
        self.background: Background | None = None
        self.waiting: list[Scored] = []
        self.first_position = 0
        self.enough = 0
        self.submitted = self.begun = self.ended = 0
        """Times that memories were asked; each number is changed by one thread only."""

    @property
    def want(self) -> Want:
        """What the memories and the mixers need to be told of each token."""
        mixers = () if self.mixer is None else (self.mixer, *self.alone.values())
        asking = (*self.memories.values(), *mixers)
        return reduce(Want.and_also, (each.want for each in asking), Want())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The thread loads what the first question would wait for.

        Raises:
            InputError: a memory searches another model's keys.
        """
        for name, memory in self.memories.items():
            refuse_other_keys(name, memory, getattr(pl_module, "model", pl_module))
        self.sharing = CoreSharing(trainer.strategy.root_device.type == "cpu")
        self.background = Background(threads=self.sharing.share)
        for memory in self.memories.values():
            self.background.submit(memory.prepare)
        self.background.drain()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shares the cores; connects the ranks where memories search together."""
        self.sharing.begin(pl_module, lambda: self.submitted > self.ended)
        for memory in self.memories.values():
            memory.begin_pass(self.text)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the cores back."""
        self.sharing.end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Gives the cores back."""
        if self.sharing is not None:
            self.sharing.end()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts new sums."""
        self.seconds.clear()
        self.waiting, self.enough = [], min(FIRST_TOKENS, self.tokens_at_once)
        self.first_position = pl_module.first_position
        self.submitted = self.begun = self.ended = 0
        self.tally = Tally(self.keep_scores, self.alone, len(self.text))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Scored,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Queues the questions about a batch's tokens, once enough have come together."""
        self.waiting.append(outputs.on_cpu())
        if sum(len(scored.positions) for scored in self.waiting) >= self.enough:
            self.enough = min(2 * self.enough, self.tokens_at_once)
            self._submit()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for the last answers, which take the model's threads too, also those of the other
        ranks where all search together."""
        self.sharing.share = self.sharing.threads
        self._submit()
        with self._timed("wait"):
            for memory in self.memories.values():
                self.background.submit(memory.end_pass)
            self.background.drain()
        searches = {name: memory.searches for name, memory in self.memories.items()}
        self.tally.searches.update(searches)
        self.tally.to(pl_module.device)

    def _submit(self) -> None:
        if self.waiting:
            asked, self.waiting = Scored.joined(self.waiting), []
            self.submitted += 1
            with self._timed("wait"):
                self.background.submit(self._ask, asked)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start

    @torch.inference_mode()
    def _ask(self, asked: Scored) -> None:
        """Asks all memories about some tokens, and mixes what they say."""
        self.begun += 1
        if len(asked.positions):
            another_waits = self.submitted > self.begun
            threads = self.sharing.threads if another_waits else self.sharing.share
            faiss.omp_set_num_threads(threads)
            opinions = {}
            counted = asked.positions >= self.first_position
            own = asked if counted.all() else asked.some(counted)
            for name, memory in self.memories.items():
                with self._timed(name):
                    if memory.in_order:
                        opinions[name] = memory.say(asked).some(counted)
                        memory.observe(asked.targets)
                    elif counted.any():
                        opinions[name] = memory.say(own)
                        memory.observe(own.targets)
            with self._timed("mix"):
                if counted.any():
                    self._mix(own, opinions)
        self.ended += 1

    def _mix(self, asked: Scored, opinions: Mapping[str, Opinion]) -> None:
        """Mixes and tallies."""
        if self.mixer is None:
            self.tally.add(asked, opinions)
        else:
            self.tally.mix(asked, opinions, self.mixer, self.alone)


def refuse_other_keys(name: str, memory: Memory, model: LanguageModel) -> None:
    """Raises InputError where a memory searches keys of another model than is asked for queries.
    Keys may be those of the language model on which a graph network stands."""
    if memory.made_by is None or not hasattr(model, "fingerprint"):
        return
    own = [model.fingerprint]
    if hasattr(model, "lm"):
        own += [model.lm.fingerprint, getattr(model, "lm_fingerprint", None)]
    if memory.made_by not in own:
        raise InputError(
            f"the memory {name}: searches keys of the model {named(memory.made_by)}, but the "
            f"queries are those of {named(own[0])}; expected a datastore of this one"
        )
