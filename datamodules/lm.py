"""`LMDataModule`: from a corpus to batches of rows, for every model of this project.

Every token of a split is scored exactly once, whatever the batches, and however many ranks share
them (`dealing`).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from neighborlm.common.all_ranks import rank_and_ranks
from neighborlm.common.contracts import Corpus, NeighborReader, TextSize, TokenStream, Vocabulary
from neighborlm.common.errors import InputError
from neighborlm.datamodules.binarized import BinarizedCorpus, CorpusSettings, Protocol
from neighborlm.datamodules.blocks import BreakMode, Rows, make_rows, make_windows
from neighborlm.datamodules.corpora import SPLITS
from neighborlm.datamodules.dealing import DealtBatches, PartOfText
from neighborlm.datamodules.dictionary import Level
from neighborlm.datamodules.mapped import MappedByPath

DEFAULT_ROW = 1024
"""Longest row that is chosen by itself, in tokens."""


class LMBatch(NamedTuple):
    """Rows of a split, padded on the right; the first four are `[B, T]`.

    Attributes:
        tokens: int64, the model's input.
        targets: int64, the token that follows each.
        positions: int64, offset of each target in the split's stream, -1 where padded.
        scored: bool, False for padding and for tokens that only give context.
        neighborhood: the neighbours of the tokens, a `datamodules.graphs.Neighborhood`, for models
            that read them.
        token_features: fp32 `[B, T, d]`, stored features of the tokens, for models that do not
            compute them themselves.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    scored: Tensor
    neighborhood: tuple | None = None
    token_features: Tensor | None = None


class RowDataset(MappedByPath, Dataset):
    """The rows of one split; indexed by an array of row numbers, it gives an `LMBatch`.

    Args:
        stream: the tokens of the split.
        rows: which offsets each row reads and scores.
        vocabulary: has the ids of what stands before the text and behind a row.
        window_start: id that every row begins with in place of the token before its first target;
            None for that token.
        neighbors: gives the rows their neighbours, for models that read them.
    """

    def __init__(
        self,
        stream: TokenStream,
        rows: Rows,
        vocabulary: Vocabulary,
        window_start: int | None = None,
        neighbors: NeighborReader | None = None,
    ) -> None:
        self.stream = stream
        self.rows = rows
        self.pad, self.eos = vocabulary.pad, vocabulary.eos
        self.window_start = window_start
        self.neighbors = neighbors

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row_numbers: np.ndarray) -> LMBatch:
        """The batch of some rows. None give a batch that scores nothing, for ranks that have run
        out."""
        begin = self.rows.context_starts[row_numbers, None]
        scored_from = self.rows.starts[row_numbers, None]
        end = self.rows.ends[row_numbers, None]
        if len(row_numbers) == 0:
            begin = scored_from = end = np.zeros((1, 1), dtype=np.int64)
        width = max(int((end - begin).max()), 1)
        offsets = begin + np.arange(width)
        inside = offsets < end
        scored = inside & (offsets >= scored_from)
        positions = offsets
        if self.rows.kept is not None:
            positions = self.rows.kept[np.minimum(offsets, len(self.rows.kept) - 1)]
        tokens = np.full(positions.shape, self.pad, dtype=np.int64)
        targets = np.full(positions.shape, self.pad, dtype=np.int64)
        targets[inside] = self.stream.tokens[positions[inside]]
        before = positions[inside] - 1
        tokens[inside] = np.where(before < 0, self.eos, self.stream.tokens[np.maximum(before, 0)])
        if self.window_start is not None:
            tokens[inside[:, 0], 0] = self.window_start
        positions = np.where(inside, positions, -1)
        return LMBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            torch.from_numpy(positions),
            torch.from_numpy(scored),
            self.neighbors.neighborhood(positions) if self.neighbors else None,
            self.neighbors.features_of(positions) if self.neighbors else None,
        )


class ResumableLoader(DataLoader):
    """A training loader whose position within its epochs is saved in Lightning's checkpoints.

    It counts epochs itself: Lightning's number is one or two too high after resuming from a
    checkpoint that was saved at the end of an epoch or of the training.
    """

    epoch = 0
    consumed = 0

    def __iter__(self) -> Iterator[LMBatch]:
        """The rest of the epoch, or the next epoch if nothing is left."""
        if self.consumed >= len(self.sampler):
            self.epoch, self.consumed = self.epoch + 1, 0
        self.sampler.start_at(self.epoch, self.consumed)
        for batch in super().__iter__():
            self.consumed += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches this rank has consumed."""
        return {"epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resumes after the batches that were consumed."""
        self.epoch, self.consumed = state.get("epoch", 0), state["consumed"]


class LMDataModule(pl.LightningDataModule):
    """Blocks of tokens of a corpus, with left context in evaluation.

    Args:
        corpus: a folder with train.txt, valid.txt (or val.txt) and test.txt, or with
            wiki.{train,valid,test}.tokens (or .raw), or with nanoGPT's train.bin and val.bin; or
            the name of a known corpus: python_docs, wikitext-2, wikitext-103, enwik8, lm1b. The
            programs also read a fairseq data-bin. With a tokenizer also .jsonl and .parquet files
            and saved datasets, and any text that is not divided into splits.
        break_mode: where blocks end: `none`, after any token; `complete`, at the end of a line,
            with as many lines as fit; `eos`, at the end of every line. Use `eos` for a text of
            unrelated lines.
        tokens_per_sample: length of a row in tokens, its left context included; at most what the
            model reads. null: that, but no more than 1,024.
        context_window: how many tokens of a row only give context in evaluation; more improves
            perplexity and takes longer. null: half of a row.
        max_tokens: most tokens in a batch, padding included; lower it if memory runs out.
        level: what a token is: a `word` between white space, a `char`(acter) or a `byte`.
        threshold: words that occur less often than this in the training text become <unk>; without
            effect on a given dictionary. Raise it for a smaller vocabulary.
        dictionary: an existing dict.txt to use in place of the training text's own, such as that of
            an existing model; required for a data-bin without one.
        drop_long_lines: leave out blocks longer than the model reads, as fairseq does, instead of
            cutting them into pieces.
        tokenizer: tokenizer of transformers, a directory or a name on the hub, which reads the
            text as it is; level, threshold and dictionary are without effect then. By default that
            of --model.pretrained, if there is one.
        tokenizer_revision: branch, tag or commit of a tokenizer on the hub.
        text_column: column of the text in .jsonl and .parquet files and saved datasets; by default
            `text`, or else the only one with text.
        separator: with a tokenizer, a line that stands between the documents of a .txt file, '' for
            a blank one; by default each file is a document.
        protocol: how a text becomes rows: neighborlm scores every token once; knn-transformers does
            as the program of this name, only to compare with its figures.
        cache_dir: folder of downloads and binarised corpora.
        num_workers: processes that make batches; with 0 the main process makes them. Raise it if
            the GPU waits for batches.
        seed: seed of the order of the training batches.

    Attributes:
        open_corpus: makes the corpus from its settings; replace it to read other files.

    Raises:
        InputError: the settings contradict one another.
    """

    open_corpus: Callable[[CorpusSettings], Corpus] = BinarizedCorpus

    def __init__(
        self,
        corpus: str,
        break_mode: BreakMode = "none",
        tokens_per_sample: int | None = 512,
        context_window: int | None = 0,
        max_tokens: int = 4096,
        level: Level = "word",
        threshold: int = 0,
        dictionary: str | None = None,
        drop_long_lines: bool = False,
        tokenizer: str | None = None,
        tokenizer_revision: str | None = None,
        text_column: str | None = None,
        separator: str | None = None,
        protocol: Protocol = "neighborlm",
        cache_dir: str = ".cache",
        num_workers: int = 0,
        seed: int = 1,
    ) -> None:
        super().__init__()
        if max_tokens < 1:
            raise InputError(f"--data.max_tokens is {max_tokens}; expected at least 1")
        of_raw_text = {"text_column": text_column, "separator": separator}
        if protocol != "neighborlm":
            of_raw_text["protocol"] = protocol
        for name, value in of_raw_text.items():
            if tokenizer is None and value is not None:
                raise InputError(
                    f"--data.{name} {value!r}: is for text that a tokenizer of transformers reads; "
                    "expected --data.tokenizer too"
                )
        if tokenizer is not None and dictionary is not None:
            raise InputError(
                f"--data.dictionary {dictionary}: has no effect with --data.tokenizer {tokenizer}; "
                "expected one of the two"
            )
        self.settings = CorpusSettings(
            corpus,
            level,
            threshold,
            dictionary,
            Path(cache_dir),
            tokenizer,
            tokenizer_revision,
            text_column,
            separator,
            protocol,
        )
        self.break_mode = break_mode
        self.tokens_per_sample = tokens_per_sample
        self.context_window = context_window
        self.max_tokens = max_tokens
        self.drop_long_lines = drop_long_lines
        self.num_workers = num_workers
        self.seed = seed
        self.max_target_positions = tokens_per_sample or DEFAULT_ROW
        """Longest row that the model reads, see `read_by`; longer lines are cut."""
        self.memories: dict[str, NeighborReader] = {}
        """Gives the tokens of a split their neighbours, for models that read them; by split."""
        self._told: set[str] = set()  # splits of whose long lines has been told
        if tokens_per_sample is not None:
            self.read_by(self.max_target_positions)

    def read_by(self, max_target_positions: int) -> None:
        """Sets how many tokens the model reads at most, and by it what was left open.

        Raises:
            InputError: rows do not fit the model, or leave nothing to score.
        """
        self.max_target_positions = max_target_positions
        if self.tokens_per_sample is None:
            self.tokens_per_sample = min(max_target_positions, DEFAULT_ROW)
        if self.context_window is None:
            self.context_window = self.tokens_per_sample // 2
        length, context = self.tokens_per_sample, self.context_window
        if length < 1 or not 0 <= context < length:
            raise InputError(
                f"--data.context_window is {context} and --data.tokens_per_sample {length}; "
                "expected 0 <= context window < tokens per sample"
            )
        check_row_length(length, max_target_positions)

    # -- the corpus ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Names the folders of what is made from the corpus, such as `runs/<name>`."""
        return self.corpus.name

    @cached_property
    def corpus(self) -> Corpus:
        """The text as token ids."""
        if self.settings.protocol != "neighborlm" and self.tokens_per_sample is None:
            raise InputError(
                f"--data.protocol {self.settings.protocol}: cuts the text by the length of a row; "
                "expected --data.tokens_per_sample too"
            )
        return self.open_corpus(replace(self.settings, window=self.tokens_per_sample))

    @property
    def dictionary(self) -> Vocabulary:
        """The vocabulary."""
        return self.corpus.dictionary

    @property
    def vocab_size(self) -> int:
        """Number of ids, special symbols included."""
        return len(self.dictionary)

    def stream(self, split: str) -> TokenStream:
        """The tokens of `train`, `valid`, `test` or any other split that the corpus has.

        Raises:
            InputError: the corpus has no such split.
        """
        return self.corpus.stream(split)

    def has(self, split: str) -> bool:
        """Whether the corpus has a split."""
        return self.corpus.has(split)

    def fingerprint(self, split: str) -> str:
        """Identifies the tokens of a split and the ends of its lines."""
        return self.corpus.fingerprint(split)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the `dictionary` and of each split that the corpus has: they are equal
        for equal texts, wherever these are stored."""
        splits = {split: self.fingerprint(split) for split in SPLITS if self.has(split)}
        return {"dictionary": self.dictionary.fingerprint, **splits}

    # -- batches ---------------------------------------------------------------------------------

    def rows(self, split: str, context_window: int) -> Rows:
        """How a split is cut into rows.

        Raises:
            InputError: `drop_long_lines` leaves nothing.
        """
        line_starts = self.stream(split).line_starts
        if self.settings.protocol == "knn-transformers":
            stride = self.tokens_per_sample - context_window
            return make_windows(line_starts, self.tokens_per_sample, stride)
        rows = make_rows(
            line_starts,
            self.break_mode,
            self.tokens_per_sample,
            context_window,
            self.max_target_positions,
            self.drop_long_lines,
        )
        if len(rows) == 0:
            raise InputError(
                f"--data.drop_long_lines leaves nothing of the {split} split: all its lines are "
                f"longer than the {self.max_target_positions} tokens that the model reads, the "
                f"shortest of {np.diff(line_starts).min()}; expected shorter lines, or "
                "--data.drop_long_lines false, which cuts them"
            )
        self._tell_of_long_lines(split, np.diff(line_starts), context_window)
        return rows

    def _tell_of_long_lines(self, split: str, lengths: np.ndarray, context_window: int) -> None:
        """Says, once for each split, how many lines are longer than the model reads, and what
        becomes of them.

        Args:
            lengths: int64 `[lines]`, tokens of each.
        """
        longest = max(self.max_target_positions, self.tokens_per_sample - context_window)
        long = lengths[lengths > longest]
        if self.break_mode == "none" or split in self._told or len(long) == 0:
            return
        self._told.add(split)
        fate = "left out by --data.drop_long_lines" if self.drop_long_lines else "cut into pieces"
        if rank_and_ranks()[0] == 0:
            print(
                f"{self.name}, {split}: {len(long):,} of {len(lengths):,} lines, which have "
                f"{long.sum():,} of {lengths.sum():,} tokens, are longer than the {longest:,} that "
                f"the model reads, and are {fate}"
            )

    def evaluation_dataloader(
        self,
        split: str,
        skip: Callable[[np.ndarray], bool] | None = None,
        wanted: np.ndarray | None = None,
        in_text_order: bool = False,
        warm_up: int | None = None,
    ) -> DataLoader:
        """Scores every token of `split` once, in rows with left context.

        Args:
            skip: called with the int64 offsets that a batch scores; True leaves the batch out.
            wanted: bool `[tokens]`; only rows that score at least one of these are read.
            in_text_order: whether rows come in the order of the text, not by length.
            warm_up: if given, rows come in the order of the text, and each of several ranks gets a
                contiguous part of it, behind at least so many tokens before it; see `PartOfText`.
        """
        rows = self.rows(split, self.context_window)
        if wanted is not None:
            wanted = wanted if rows.kept is None else wanted[rows.kept]
            which = np.logical_or.reduceat(wanted, rows.starts)
            ranges = (rows.context_starts, rows.starts, rows.ends)
            rows = Rows(*(offsets[which] for offsets in ranges), rows.kept)
        dataset = self._dataset(split, rows)
        if warm_up is not None:
            sampler = PartOfText(dataset.rows, self.max_tokens, warm_up)
        else:
            lengths = dataset.rows.lengths
            sampler = DealtBatches(lengths, self.max_tokens, in_text_order=in_text_order)
        if skip is not None:
            sampler.batches = [b for b in sampler.batches if not skip(dataset.rows.scored_by(b))]
        dataset.split = split  # for whoever says how far a pass over it is
        return self._loader(DataLoader, dataset, sampler)

    def train_dataloader(self) -> DataLoader:
        """The training split in blocks of `tokens_per_sample`, shuffled."""
        rows = self.rows("train", context_window=0)
        dataset = self._dataset("train", rows)
        return self._loader(
            ResumableLoader,
            dataset,
            DealtBatches(dataset.rows.lengths, self.max_tokens, self.seed),
        )

    def val_dataloader(self) -> DataLoader:
        """The validation split, as `evaluate.py --split valid` scores it."""
        return self.evaluation_dataloader("valid")

    @property
    def window_start(self) -> int | None:
        """Id that every row begins with in place of the token before its first target."""
        as_it_is = self.settings.protocol == "knn-transformers"
        return None if as_it_is else self.dictionary.window_start

    def text_size(self, split: str, scored: np.ndarray | None = None) -> TextSize | None:
        """The size of the raw text that a split's tokens stand for; None where it is not known.

        Args:
            scored: int64, the offsets of the tokens that count; None for all of them.
        """
        return self.corpus.text_size(split, scored)

    def _dataset(self, split: str, rows: Rows) -> RowDataset:
        memory = self.memories.get(split)
        return RowDataset(self.stream(split), rows, self.dictionary, self.window_start, memory)

    def _loader(self, kind: type[DataLoader], dataset: RowDataset, sampler: Sampler) -> DataLoader:
        return kind(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def check_row_length(tokens_per_sample: int | None, max_target_positions: int) -> None:
    """Raises InputError where rows do not fit the model."""
    if tokens_per_sample is not None and tokens_per_sample > max_target_positions:
        raise InputError(
            f"--data.tokens_per_sample is {tokens_per_sample}, but the model reads at most "
            f"{max_target_positions} tokens (--model.max_target_positions, or what a pretrained "
            "model was made for)"
        )
