"""Data sets in other processes: their pickles are small, and their batches are the same."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from small import write_corpus
from torch.utils.data import DataLoader

from neighborlm.datamodules.graphs import NeighborMemory
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.datamodules.mapped import MappedByPath


class Holder(MappedByPath):
    def __init__(self, **attributes) -> None:
        self.__dict__.update(attributes)


@pytest.fixture
def mapped(tmp_path) -> np.memmap:
    """A thousand rows of eight, in a .npy file."""
    array = np.arange(8000, dtype=np.int32).reshape(1000, 8)
    np.save(tmp_path / "a.npy", array)
    return np.load(tmp_path / "a.npy", mmap_mode="r")


@pytest.mark.parametrize(
    "part",
    [
        lambda a: a,
        lambda a: a[100:200],
        lambda a: a[:, :3],
        lambda a: a[5:, 2:][::7],
        lambda a: a.T,
        lambda a: a[::-1],
        lambda a: a[3],
        lambda a: a[:0],
        lambda a: a.reshape(-1)[17:],
        lambda a: a.view(np.uint8)[2:, 1],
    ],
)
def test_any_part_of_a_map_is_mapped_again(mapped, part):
    there = part(mapped)
    sent = pickle.dumps(Holder(deep=[{"array": there}], name="x"))
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert again.name == "x"
    array = again.deep[0]["array"]
    assert (array.dtype, array.shape) == (there.dtype, there.shape)
    np.testing.assert_array_equal(array, there)
    assert not array.flags.writeable
    assert array.size == 0 or isinstance(array.base, np.memmap)


def test_raw_maps_with_an_offset(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "raw")
    there = np.memmap(tmp_path / "raw", np.uint16, "r", 14, (5, 4))
    again = pickle.loads(pickle.dumps(Holder(a=there[1:]))).a
    np.testing.assert_array_equal(again, np.arange(11, 27).reshape(4, 4))


def test_what_may_be_written_is_copied(tmp_path, mapped):
    private = np.load(tmp_path / "a.npy", mmap_mode="c")
    private[0] = -1
    again = pickle.loads(pickle.dumps(Holder(a=private, b=np.arange(3)))).__dict__
    assert again["a"][0].tolist() == [-1] * 8
    assert again["b"].tolist() == [0, 1, 2]


def test_workers_that_are_not_forked_from_here(tmp_path: Path, mapped):
    """But begin with what is pickled for them: spawn is the default of macOS, forkserver that of
    Python 3.14."""
    data = LMDataModule(
        str(write_corpus(tmp_path / "words")),
        tokens_per_sample=24,
        max_tokens=240,
        cache_dir=str(tmp_path / "cache"),
    )
    n_tokens = len(data.stream("train").tokens)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "table.npy", rng.integers(-1, 1000, (n_tokens, 4)))
    table = np.load(tmp_path / "table.npy", mmap_mode="r")
    data.memories["train"] = NeighborMemory(table[:, :3], mapped, 1, 1, 2)
    loader = data.evaluation_dataloader("train")
    assert len(pickle.dumps(loader.dataset)) < 20_000  # rows and names, of no token anything
    spawned = DataLoader(
        loader.dataset,
        sampler=loader.sampler,
        batch_size=None,
        num_workers=1,
        multiprocessing_context="forkserver",
    )
    batches = list(zip(loader, spawned, strict=True))
    assert len(batches) > 3
    for ours, theirs in batches:
        assert all(torch.equal(a, b) for a, b in zip(ours[:4], theirs[:4], strict=True))
        assert torch.equal(ours.neighborhood.neighbors, theirs.neighborhood.neighbors)
        assert torch.equal(ours.neighborhood.features, theirs.neighborhood.features)
