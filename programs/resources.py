"""What memories are made of: datastores, indexes and retrievers, made when they are asked for; and
everything about them that can be wrong, said before any long work."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from neighborlm.common.contracts import Retriever
from neighborlm.common.errors import InputError
from neighborlm.programs.products import folder_of_corpus
from neighborlm.programs.run import Run
from neighborlm.programs.settings import KNNSettings, MemorySettings
from neighborlm.programs.subject import Subject, seconds_of
from neighborlm.retrieval.cluster.distributed import open_distributed
from neighborlm.retrieval.search import open_retriever
from neighborlm.retrieval.search.index import index_path, is_path, resolve
from neighborlm.retrieval.store.datastore import Datastore


class MadeOnDemand:
    """The `Resources` of memories: whatever is missing is made when it is asked for.

    Args:
        subject: what is evaluated.
        settings: of the memories; a temperature that is neither given nor tuned is 1.

    Attributes:
        given: the settings as they were given.
        products: the datastores, and how long each stage took that was not done before.
        used: what a memory has asked for: `datastore`, `index`, `rescoring` and names of folders;
            to be emptied before the next one is made.
    """

    def __init__(self, subject: Subject, settings: MemorySettings) -> None:
        self.subject = subject
        self.given = self.settings = settings
        if settings.knn.temperature == "auto" and settings.knn.lmbda != "auto":
            self.mix_by(temperature=1.0)
        self.used: set[str] = set()
        self.products = subject.products(settings.knn)
        self.vocab_size = subject.data.vocab_size
        self.device = subject.run.device

    @property
    def knn(self) -> KNNSettings:
        """How datastores are made, searched and mixed."""
        return self.settings.knn

    def mix_by(self, **chosen: float) -> None:
        """Sets what was tuned of the section `knn`."""
        self.settings = replace(self.settings, knn=replace(self.knn, **chosen))

    def tokens(self, split: str) -> np.ndarray:
        """See `Resources`."""
        return self.subject.data.stream(split).tokens

    def made_from(self, split: str) -> dict[str, str]:
        """See `Resources`."""
        data = self.subject.data
        return {"corpus": data.fingerprint(split), "dictionary": data.dictionary.fingerprint}

    def folder(self, name: str) -> Path:
        """See `Resources`."""
        self.used.add(name)
        return folder_of_corpus(self.subject.data) / name

    def datastore(self) -> Datastore:
        """See `Resources`."""
        self.used.add("datastore")
        return self._datastore

    @cached_property
    def _datastore(self) -> Datastore:
        missing = self.products.open_fitting_datastore("train") is None
        if self.knn.key_type == "gnn" and missing:
            self.subject.give_neighbors("train")
        return self.products.ensure_datastore_and_index("train")

    def retriever(self) -> Retriever:
        """See `Resources`."""
        self.used.add("index")
        return self._retriever

    @cached_property
    def _retriever(self) -> Retriever:
        search = self.knn.search(self.subject.run.device)
        # Distances between other keys, or by another measure, are computed by whoever asks.
        own = self.knn.rescore_key_type is None
        own &= self.knn.similarity in (None, self.knn.metric)
        rescore = own and self.knn.distances == "exact"
        return open_distributed(self.datastore(), search, rescore)

    def rescoring_datastore(self) -> Datastore | None:
        """The datastore of `--knn.rescore_key_type`."""
        key_type = self.knn.rescore_key_type
        if key_type is None:
            return None
        self.used.add("rescoring")
        products = self.subject.products(replace(self.knn, key_type=key_type, datastore=None))
        if key_type == "gnn" and products.open_fitting_datastore("train") is None:
            self.subject.give_neighbors("train")
        return products.ensure_datastore("train")

    def bytes_of(self, used: Collection[str]) -> int:
        """What some of the things that memories ask for take on disk."""
        total = 0
        for name in used:
            if name == "datastore":
                total += stored_bytes(self._datastore)
            elif name == "rescoring":
                total += stored_bytes(self.rescoring_datastore())
            elif name == "index":
                total += sum(path.stat().st_size for path in self._index_files())
            else:
                files = (folder_of_corpus(self.subject.data) / name).rglob("*")
                total += sum(path.stat().st_size for path in files if path.is_file())
        return total

    def _index_files(self) -> Iterable[Path]:
        """The file of the index, or those of its shards; none where no index is needed."""
        datastore, index = self._datastore, resolve(self._datastore, self.knn.index)
        if is_path(index):
            return [Path(index)]
        return datastore.path.rglob(index_path(datastore, index, self.knn.metric).name)


def stored_bytes(datastore: Datastore) -> int:
    """What the keys and values of all its shards take on disk."""
    row = datastore.dim * datastore.keys.dtype.itemsize + datastore.values.dtype.itemsize
    return datastore.whole["rows"] * row


def check_search(subject: Subject, knn: KNNSettings, splits: Sequence[str]) -> None:
    """Everything about the search that can be wrong, before any long work.

    Args:
        splits: that will be searched for.
    """
    products = subject.products(knn)
    if knn.shard is not None:
        check_search_by_hosts(subject.run, knn)
    existing = products.open_fitting_datastore("train")
    where = products.datastore_path("train")
    if existing is None:
        stored = subject.data.fingerprint("train")
        n_keys = len(subject.data.stream("train").tokens)
    else:
        stored = existing.manifest["made_from"].get("corpus")
        n_keys = existing.n_keys_of_whole
    for split in splits:
        if stored == subject.data.fingerprint(split):
            raise InputError(
                f"--split {split}: {where} holds this very split, so that every token would find "
                "its own key; expected another split, or another --knn.datastore"
            )
    if knn.k > n_keys:
        raise InputError(f"--knn.k is {knn.k}, but {where} has only {n_keys:,} keys")
    if is_path(knn.index):
        if existing is None:
            raise InputError(
                f"--knn.index {knn.index} is a file, but its datastore {where} is missing"
            )
        open_retriever(existing, knn.search(subject.run.device))
    else:
        products.check_index(n_keys)


def check_search_by_hosts(run: Run, knn: KNNSettings) -> None:
    """What hosts that have one shard each can do."""
    given = f"--knn.shard {knn.shard} of {knn.shards}: this host has that shard alone"
    if run.hosts < knn.shards:
        raise InputError(
            f"{given}, but --trainer.num_nodes is {run.hosts}; expected a host for every shard, or "
            "all of them assembled (neighborlm datastore assemble)"
        )
    similarity = knn.similarity or knn.metric
    needs_all = {
        "--knn.missing last_row": knn.missing == "last_row",
        f"--knn.rescore_key_type {knn.rescore_key_type}": knn.rescore_key_type is not None,
        f"--knn.similarity {similarity}": similarity != knn.metric,
        f"--knn.index {knn.index}": is_path(knn.index),
    }
    for flag, is_given in needs_all.items():
        if is_given:
            raise InputError(f"{given}, but {flag} needs them all; expected another value")


def make_products(
    subject: Subject, split: str, knn: KNNSettings, with_index: bool
) -> tuple[Datastore, dict[str, float]]:
    """The datastore of a split, and the index that the settings name if it is wanted, made or
    finished unless they are there; and how long each stage took."""
    products = subject.products(knn)
    if with_index:
        products.check_index(len(subject.data.stream(split).tokens))
    if knn.key_type == "gnn":
        subject.give_neighbors(split)
    make = products.ensure_datastore_and_index if with_index else products.ensure_datastore
    return make(split), seconds_of(subject, products)
