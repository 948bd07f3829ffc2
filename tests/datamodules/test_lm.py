"""The data module on a small text: what batches hold, how they are shuffled, dealt and resumed, and
which corpus they come from."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from neighborlm.common.errors import InputError
from neighborlm.datamodules import lm
from neighborlm.datamodules.binarize import TokenStream
from neighborlm.datamodules.corpora import SPLITS
from neighborlm.datamodules.dictionary import EOS, PAD, UNK, Dictionary
from neighborlm.datamodules.lm import LMDataModule

MODES = ["none", "complete", "eos"]
SHAPES = [  # tokens_per_sample, context_window, max_tokens, max_target_positions
    *((12, 0, 50, 12), (12, 5, 50, 12), (12, 5, 1, 12), (12, 11, 37, 30), (12, 5, 10_000, 30)),
    *((400, 100, 800, 400), (4, 3, 9, 4)),
]


def write_corpus(folder: Path, seed: int = 0) -> Path:
    """Lines of 0 to 24 words of 30; the validation text has words that the training text lacks."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    for split, lines in zip(SPLITS, (60, 20, 15), strict=True):
        words = 30 + 4 * (split == "valid")
        text = (
            " ".join(f"w{i}" for i in generator.integers(0, words, generator.integers(0, 25)))
            for _ in range(lines)
        )
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in text))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a corpus `words` and its cache."""
    folder = tmp_path_factory.mktemp("lm")
    write_corpus(folder / "words")
    return folder


@pytest.fixture
def make(place):
    """Makes a data module of the corpus."""

    def module(**settings) -> LMDataModule:
        settings = {"corpus": str(place / "words"), "cache_dir": str(place / "cache"), **settings}
        return LMDataModule(**settings)

    return module


def naive_stream(module: LMDataModule, split: str) -> list[int]:
    """The ids of a split, from its text, word by word."""
    symbols = module.dictionary.symbols
    ids = []
    for line in module.corpus.files.split(split).read_text().splitlines():
        ids += [symbols.index(w) if w in symbols else UNK for w in line.split()]
        ids.append(EOS)
    return ids


def check_batch(
    batch: lm.LMBatch, stream: list[int], max_tokens: int, kept: list[int] | None = None
) -> list[tuple[int, int]]:
    """Checks every cell of a batch; returns the scored offsets, each with its row's first one.
    Rows run along the offsets `kept`, all of them if None."""
    kept = list(range(len(stream))) if kept is None else kept
    assert [t.dtype for t in batch[:4]] == [torch.int64] * 3 + [torch.bool]
    height, width = batch.tokens.shape
    assert height * width <= max_tokens or height == 1
    scored = []
    for tokens, targets, positions, is_scored in zip(*(t.tolist() for t in batch[:4]), strict=True):
        length = sum(p >= 0 for p in positions)
        first = kept.index(positions[0])
        assert positions[:length] == kept[first : first + length]
        assert positions[length:] == [-1] * (width - length)
        assert targets == [stream[p] for p in positions[:length]] + [PAD] * (width - length)
        read = [stream[p - 1] if p > 0 else EOS for p in positions[:length]]
        assert tokens == read + [PAD] * (width - length)
        own = [p for p, s in zip(positions, is_scored, strict=True) if s]
        assert own == positions[length - len(own) : length]  # after the context, before padding
        assert own
        scored += [(p, positions[0]) for p in own]
    assert max(torch.sum(batch.positions >= 0, 1)) == width  # not wider than its longest row
    return scored


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_scores_every_token_once_whatever_the_batches(make, mode):
    module = make(break_mode=mode)
    stream = naive_stream(module, "valid")
    assert UNK in stream
    starts = {}
    for tokens_per_sample, context_window, max_tokens, longest in SHAPES:
        module = make(
            break_mode=mode,
            tokens_per_sample=tokens_per_sample,
            context_window=context_window,
            max_tokens=max_tokens,
        )
        module.max_target_positions = longest
        loader = module.evaluation_dataloader("valid")
        scored = [s for batch in loader for s in check_batch(batch, stream, max_tokens)]
        assert sorted(p for p, _ in scored) == list(range(len(stream)))
        # The context of a token is the same in batches of another size.
        known = starts.setdefault((tokens_per_sample, context_window, longest), sorted(scored))
        assert sorted(scored) == known


def test_validation_is_the_evaluation_of_valid(make):
    module = make(tokens_per_sample=12, context_window=5, max_tokens=60)
    ours, theirs = list(module.val_dataloader()), list(module.evaluation_dataloader("valid"))
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x[:4], y[:4], strict=True))


def test_dropped_lines_are_neither_scored_nor_context(make, capsys):
    module = make(
        break_mode="eos",
        tokens_per_sample=12,
        context_window=5,
        max_tokens=50,
        drop_long_lines=True,
    )
    stream, kept, line = naive_stream(module, "valid"), [], []
    for offset, word in enumerate(stream):
        line.append(offset)
        if word == EOS:
            kept += line if len(line) <= 12 else []
            line = []
    assert 0 < len(kept) < len(stream)
    batches = module.evaluation_dataloader("valid")
    module.evaluation_dataloader("valid")  # says nothing any more
    said = capsys.readouterr().out.splitlines()[-1:]
    dropped = f"have {len(stream) - len(kept):,} of {len(stream):,} tokens"
    assert len([line for line in said if dropped in line and "left out by" in line]) == 1
    scored = [[p for p, _ in check_batch(batch, stream, 50, kept)] for batch in batches]
    assert sorted(sum(scored[1:], scored[0])) == kept
    done = set(scored[1])
    rest = module.evaluation_dataloader("valid", skip=lambda p: done.issuperset(p.tolist()))
    left = [[p for p, _ in check_batch(batch, stream, 50, kept)] for batch in rest]
    assert left == scored[:1] + scored[2:]


def test_a_rank_without_rows_gets_a_batch_that_scores_nothing(make):
    dataset = make().evaluation_dataloader("valid").dataset
    batch = dataset[np.empty(0, dtype=np.int64)]
    assert [t.tolist() for t in batch[:4]] == [[[PAD]], [[PAD]], [[-1]], [[False]]]


# -- training -----------------------------------------------------------------------------------


def first_positions(batches) -> list[list[int]]:
    """The first offset of every row, which identifies batches and their order."""
    return [batch.positions[:, 0].tolist() for batch in batches]


def train_batches(module: LMDataModule, epochs: int) -> list[list[list[int]]]:
    """The batches of some epochs."""
    loader = module.train_dataloader()
    return [first_positions(loader) for _ in range(epochs)]


@pytest.mark.parametrize("mode", MODES)
def test_an_epoch_has_every_token_once_without_context(make, mode):
    module = make(break_mode=mode, tokens_per_sample=12, context_window=5, max_tokens=50)
    stream = naive_stream(module, "train")
    scored = [s for b in module.train_dataloader() for s in check_batch(b, stream, 50)]
    assert sorted(p for p, _ in scored) == list(range(len(stream)))
    if mode == "none":  # context takes nothing from the rows of training
        assert {first for _, first in scored} == set(range(0, len(stream), 12))


def test_epochs_are_shuffled_anew_and_seeds_repeat(make):
    settings = {"tokens_per_sample": 12, "max_tokens": 50}
    first, second = train_batches(make(**settings), 2)
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second))
    assert sorted(map(sorted, first)) != sorted(map(sorted, second))  # batches of other rows
    assert first != sorted(first)
    assert train_batches(make(**settings), 2) == [first, second]
    assert train_batches(make(**settings, seed=2), 1) != [first]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_goes_on_with_the_remaining_batches(make, workers):
    """The position is right even if a worker process has made batches in advance."""
    settings = {"tokens_per_sample": 12, "max_tokens": 50, "num_workers": workers}
    first, whole, following = train_batches(make(**settings), 3)
    interrupted = make(**settings).train_dataloader()
    assert first_positions(interrupted) == first
    batches = iter(interrupted)
    had = first_positions(next(batches) for _ in range(3))
    state = interrupted.state_dict()

    loader = make(**settings).train_dataloader()
    loader.load_state_dict(state)
    batches = iter(loader)
    had += first_positions([next(batches)])
    once_more = loader.state_dict()  # interrupted a second time
    assert had + first_positions(batches) == whole
    assert first_positions(loader) == following

    loader.load_state_dict(once_more)
    assert first_positions(loader) == whole[4:]
    loader.load_state_dict({"epoch": 1, "consumed": len(whole)})  # saved at the end of an epoch
    assert first_positions(loader) == following


class Recorder(pl.LightningModule):
    """Trains on nothing and records what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen += first_positions([batch])
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module, steps: int, save_to=None, go_on_from=None) -> list:
    """The batches that Lightning trains on."""
    recorder = Recorder()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(recorder, module.train_dataloader(), ckpt_path=go_on_from, weights_only=True)
    if save_to:
        trainer.save_checkpoint(save_to)
    return recorder.seen


BATCHES = 7  # of an epoch of the next test


@pytest.mark.parametrize("stop", [2, BATCHES, BATCHES + 1])
def test_training_goes_on_as_if_it_had_not_stopped(make, tmp_path, stop):
    """The checkpoint is the one that train.py saves at the end, within or at the end of an
    epoch."""
    settings = {"tokens_per_sample": 12, "max_tokens": 120}
    assert len(make(**settings).train_dataloader()) == BATCHES
    whole = fit(make(**settings), 2 * BATCHES + 2)
    had = fit(make(**settings), stop, save_to=tmp_path / "last.ckpt")
    rest = fit(make(**settings), 2 * BATCHES + 2, go_on_from=tmp_path / "last.ckpt")
    assert had + rest == whole


# -- batches that are left out ------------------------------------------------------------------


def test_skip_leaves_out_what_is_wholly_done(make):
    module = make(break_mode="complete", tokens_per_sample=12, context_window=5, max_tokens=40)
    every = list(module.evaluation_dataloader("test"))
    scored = [set(batch.positions[batch.scored].tolist()) for batch in every]
    done = scored[0] | scored[3] | set(sorted(scored[1])[:-1]) | scored[-1]
    remaining = module.evaluation_dataloader("test", skip=lambda p: done.issuperset(p.tolist()))
    expected = [b for b, s in zip(every, scored, strict=True) if not s <= done]
    assert len(expected) == len(every) - 3
    assert len(remaining) == len(expected)
    for batch, same in zip(remaining, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch[:4], same[:4], strict=True))


# -- settings and corpora -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"context_window": 512}, ("--data.context_window is 512", "--data.tokens_per_sample 512")),
        ({"context_window": -1}, ("--data.context_window is -1",)),
        ({"tokens_per_sample": 0}, ("--data.tokens_per_sample 0",)),
        ({"max_tokens": 0}, ("--data.max_tokens is 0",)),
    ],
)
def test_settings_that_contradict_one_another(settings, words):
    with pytest.raises(InputError) as error:
        LMDataModule("words", **settings)
    assert all(word in str(error.value) for word in words)


def test_lines_that_are_all_dropped_are_one_sentence(make):
    module = make(break_mode="eos", tokens_per_sample=12, drop_long_lines=True)
    assert 0 < len(module.rows("train", 0)) < 60
    shortest = np.diff(module.stream("train").line_starts).min()
    module.max_target_positions = module.tokens_per_sample = shortest - 1
    with pytest.raises(InputError) as error:
        module.train_dataloader()
    assert str(error.value).startswith("--data.drop_long_lines leaves nothing of the train split")
    assert f"longer than the {shortest - 1} tokens" in str(error.value)


class Counting:
    """A corpus without files: consecutive numbers, a hundred per line."""

    name = "counting"
    dictionary = Dictionary(map(str, range(96)), [1] * 96)

    def __init__(self, settings) -> None:
        self.settings = settings

    def has(self, split: str) -> bool:
        return split == "train"

    def stream(self, split: str) -> TokenStream:
        return TokenStream(np.arange(1000) % 96 + 4, np.arange(0, 1001, 100))

    def fingerprint(self, split: str) -> str:
        return "one"


def test_any_reader_of_a_corpus_can_be_handed_in():
    class CountingData(LMDataModule):
        open_corpus = Counting

    module = CountingData("numbers", tokens_per_sample=50)
    assert module.corpus.settings.corpus == "numbers"
    assert module.vocab_size == 100
    assert module.fingerprints == {"dictionary": Counting.dictionary.fingerprint, "train": "one"}
    targets = torch.cat([batch.targets.ravel() for batch in module.evaluation_dataloader("train")])
    assert targets.tolist() == (np.arange(1000) % 96 + 4).tolist()


def test_fingerprints_tell_that_a_text_has_changed_in_its_place(place, make, tmp_path):
    before = make().fingerprints
    shutil.copytree(place / "words", tmp_path / "moved" / "words")
    elsewhere = LMDataModule(
        f"{tmp_path}/moved/words/", cache_dir=str(tmp_path / "cache"), tokens_per_sample=7
    )
    assert elsewhere.fingerprints == before
    with open(tmp_path / "moved" / "words" / "valid.txt", "a") as file:
        file.write("w1\n")
    again = LMDataModule(str(tmp_path / "moved" / "words"), cache_dir=str(tmp_path / "cache"))
    assert {k for k, v in again.fingerprints.items() if v != before[k]} == {"valid"}
