"""What the benchmarks of memories share: a small LM of the first words of a corpus, made once, and
texts whose keys and log-probabilities are known, so that memories can be asked about them at once.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import CONFIGS
from neighborlm.common.contracts import Memory, Opinion, Scored
from neighborlm.common.files import publishing
from neighborlm.datamodules.corpora import resolve_corpus
from neighborlm.programs import train
from neighborlm.programs.evaluate import EvaluateCLI, subject_of
from neighborlm.programs.evaluation import evaluate
from neighborlm.programs.settings import KNNSettings
from neighborlm.programs.subject import Subject
from neighborlm.retrieval.memories.mixers import ConstantMixer, mixture
from neighborlm.retrieval.store.datastore import Datastore

AT_ONCE = 10240
"""Tokens asked about at a time, as in evaluate.py."""
KEY_TYPE = "last_ffn_input"


@dataclass(frozen=True)
class Base:
    """The LM that memories are compared on, of the first words of a corpus. What is there already
    is taken as it is.

    Args:
        corpus: see --data.corpus.
        train_words: of the training text that are read, up to the end of a line.
        other_words: of either other text.
        updates: of the LM.
        folder: where the part of the corpus is written.
    """

    corpus: str
    train_words: int = 500_000
    other_words: int = 40_000
    updates: int = 400
    folder: Path = Path(".cache/parts")

    def part(self) -> Path:
        """The folder of the first words; its name names run and datastores.

        Raises:
            InputError: there is no such corpus, or it lacks a text.
        """
        files = resolve_corpus(self.corpus, Path(".cache"))
        name = f"{files.name}-{self.train_words}-{self.other_words}-{self.updates}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / name).is_dir():
            with publishing(self.folder / name) as folder:
                folder.mkdir()
                for split in files.splits:
                    words = self.train_words if split == "train" else self.other_words
                    text = files.split(split).read_text(encoding="utf-8")
                    lines = text.splitlines(keepends=True)
                    counts = accumulate(len(line.split()) + 1 for line in lines)
                    kept = sum(count <= words for count in counts)
                    text = "".join(lines[: max(kept, 1)])
                    (folder / f"{split}.txt").write_text(text, encoding="utf-8")
        return self.folder / name

    def flags(self, config: str) -> list[str]:
        """Flags of train.py and evaluate.py for a model of one of configs/text."""
        return ["--config", str(CONFIGS / config), "--data.corpus", str(self.part())]

    @cached_property
    def checkpoint(self) -> Path:
        """The LM, trained unless it was."""
        return trained(self.flags("lm.yaml"), Path("runs") / self.part().name, self.updates)

    @cached_property
    def subject(self) -> Subject:
        """What is evaluated."""
        flags = [*self.flags("lm.yaml"), "--ckpt_path", str(self.checkpoint)]
        return subject_of(EvaluateCLI(flags))

    def on_network(self, updates: int) -> Subject:
        """A GNN-LM on the LM, trained unless it was."""
        flags = self.flags("gnn_lm.yaml")
        run = Path("runs") / f"{self.part().name}-gnn_lm-{updates}"
        of_lm = ["--model.lm_checkpoint", str(self.checkpoint)]
        checkpoint = trained([*flags, *of_lm], run, updates)
        return subject_of(EvaluateCLI([*flags, "--ckpt_path", str(checkpoint)]))

    def texts(self, split: str) -> "Text":
        """A split, in order, with keys and log-probabilities."""
        scores = evaluate(self.subject, split, keep_scores=True).scores
        datastore = self.subject.products(KNNSettings()).ensure_datastore(split)
        return Text.of(datastore, scores)


def trained(flags: list[str], run: Path, updates: int) -> Path:
    """The best checkpoint of a run, trained unless it was, with a schedule for so many updates."""
    warmup = min(100, updates // 4)
    schedule = {
        "trainer.max_steps": updates,
        "trainer.val_check_interval": max(updates // 2, 1),
        "model.warmup_updates": warmup,
        "model.lr_period_updates": max(updates - warmup, 1),
        "trainer.default_root_dir": run,
    }
    if not (run / "training.json").is_file():
        train.main([*flags, *(f"--{name}={value}" for name, value in schedule.items())])
    return run / "checkpoints" / "best.ckpt"


@dataclass(frozen=True)
class Text:
    """The first tokens of a split, in order."""

    tokens: Scored

    @classmethod
    def of(
        cls, datastore: Datastore, scores: dict[str, np.ndarray], limit: int = 1 << 40
    ) -> "Text":
        """Those whose log-probabilities are known.

        Args:
            datastore: of the split.
            scores: of `evaluate`, or what `evaluate.py --token_scores` wrote.
            limit: how many at most.
        """
        order = np.argsort(scores["position"])[:limit]
        positions = scores["position"][order]
        tokens = Scored(
            torch.from_numpy(positions.astype(np.int64)),
            torch.from_numpy(datastore.values[positions].astype(np.int64)),
            torch.from_numpy(scores["lm_log_prob"][order]),
            {KEY_TYPE: torch.from_numpy(datastore.read(positions))},
        )
        return cls(tokens)

    def __len__(self) -> int:
        return len(self.tokens.positions)

    def blocks(self) -> Iterator[Scored]:
        """Tokens to be asked about together."""
        for first in range(0, len(self), AT_ONCE):
            yield self.tokens.some(slice(first, first + AT_ONCE))


@dataclass(frozen=True)
class Asked:
    """What a memory said of a text: log-probabilities `[n]`, seconds on the clock and of all
    processors, and further figures."""

    log_probs: Tensor
    seconds: float
    processor_seconds: float
    figures: dict[str, float] = field(default_factory=dict)


def ask(memory: Memory, text: Text) -> Asked:
    """As evaluate.py asks."""
    memory.begin_pass(text.tokens.targets.numpy())
    said, clocks = [], read_clocks()
    for block in text.blocks():
        said.append(memory.say(block).log_probs)
        memory.observe(block.targets)
    seconds = read_clocks() - clocks
    memory.end_pass()
    return Asked(torch.cat(said), *seconds.tolist())


def read_clocks() -> np.ndarray:
    """Seconds on the clock, and those that all processors have spent on this process."""
    return np.array([time.perf_counter(), time.process_time()])


def mixed(valid: Text, on_valid: Asked, test: Text, on_test: Asked) -> dict[str, float]:
    """The weight that is best on `valid`, and the perplexity that it gives on `test`."""
    mixer = ConstantMixer()
    mixer.fit({"lm": Opinion(valid.tokens.log_probs), "memory": Opinion(on_valid.log_probs)})
    log_probs = mixture(
        [test.tokens.log_probs.double(), on_test.log_probs.double()], mixer.shares.tolist()
    )
    return {
        "weight": mixer.shares[1].item(),
        "perplexity": math.exp(-log_probs.mean().item()),
        "seconds": on_test.seconds,
        "processor_seconds": on_test.processor_seconds,
        **on_test.figures,
    }
