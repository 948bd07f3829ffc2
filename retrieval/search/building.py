"""Building a faiss index over a datastore, resumably.

While it is built, `<name>.faiss.partial` holds the trained index with the keys added so far. An
index larger than `PART_BYTES` is built in parts, whose lists are merged on disk into
`<name>.faiss.lists`; the fast-scan types are not, since faiss can hold their lists only in memory.

Where a datastore lies in shards, each has an index of its own beside its keys. All begin with the
trained index `<name>.faiss.trained` beside the manifest of the whole, so that their distances can
be compared.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.ondisk import merge_ondisk

from neighborlm.common.contracts import Metric
from neighborlm.common.errors import InputError
from neighborlm.common.files import digest_of, publishing
from neighborlm.common.interrupts import interrupts_held
from neighborlm.common.progress import Report
from neighborlm.retrieval.search.factory import check_lists, warn_of_lists
from neighborlm.retrieval.search.index import (
    FORMAT,
    LARGEST_HALF,
    NUMBERED_RIGHTLY,
    artifact_of,
    check_numbers,
    index_path,
    make_index,
    read_index,
    write_index,
)
from neighborlm.retrieval.search.index_check import is_sound
from neighborlm.retrieval.search.index_file import files_of, list_file_of, open_file
from neighborlm.retrieval.search.index_recall import RecallSample
from neighborlm.retrieval.search.retriever import faiss_reason, normalized
from neighborlm.retrieval.store.arrays import check_room
from neighborlm.retrieval.store.artifact import Artifact, Format, Job
from neighborlm.retrieval.store.datastore import Datastore, fingerprint_of

TRAINED = Format("trained index", FORMAT.version, ("fingerprint",), FORMAT.libraries)
POINTS_PER_CENTROID = 64
SAMPLE_AT_LEAST = 65536
"""Smallest number of training vectors, which the quantiser needs whatever the number of lists."""
GPUS = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
PART_BYTES = 512 << 20
"""Largest size of inverted lists in memory while they are built."""
PARTIAL_EVERY = 60.0
"""Seconds of adding after which the partial index is saved; more where saving takes long."""


def sample_size(lists: int, n_keys: int) -> int:
    """Keys that an index with so many inverted lists is trained on, at most all there are."""
    return min(max(lists * POINTS_PER_CENTROID, SAMPLE_AT_LEAST), n_keys)


def _bytes_of_lists(index: faiss.Index) -> int:
    """Bytes of an index's codes and ids in memory; 0 where lists cannot be merged on disk."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None or GPUS:
        return 0
    if not isinstance(faiss.downcast_InvertedLists(ivf.invlists), faiss.ArrayInvertedLists):
        return 0
    return ivf.ntotal * (ivf.code_size + 8)


def on_gpus(index: faiss.Index) -> faiss.Index:
    """The index on all GPUs, for training and adding, where faiss sees any and knows the type
    there; the index itself otherwise."""
    if not GPUS:
        return index
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError as error:
        print(f"building on the CPU: faiss has no such index on GPUs ({faiss_reason(error)})")
        return index


class IndexBuilding:
    """Builds one index: trains it on a sample, adds every key, and saves its state on the way.

    Args:
        datastore: its keys are indexed.
        factory: faiss factory string.
        metric: how keys are compared.
        seed: of the training sample.
        trained: the trained index that `train` has published, where the datastore is a shard.
    """

    def __init__(
        self,
        datastore: Datastore,
        factory: str,
        metric: Metric,
        seed: int = 1,
        trained: Path | None = None,
    ) -> None:
        self.datastore = datastore
        self.factory = factory
        self.metric = metric
        self.seed = seed
        self.trained = trained
        self.path = index_path(datastore, factory, metric)
        self.artifact = artifact_of(self.path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.seconds = {"train": 0.0, "add": 0.0, "measure": 0.0}
        self.recall: dict[str, Any] = {}
        """The result of `RecallSample.measure`, once the index is built."""
        self.parts: list[str] = []
        """Names of the files that hold the first keys, in order."""
        self.n_in_parts = 0
        self.consistent = True
        """False while faiss adds keys: after an exception the index is not fit to go on from."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the index."""
        identity = {
            "factory": self.factory,
            "metric": self.metric,
            "dim": self.datastore.dim,
            "keys": self.datastore.n_keys,
            "datastore": self.datastore.fingerprint,
            "seed": self.seed,
        }
        if self.trained is not None:
            identity["trained"] = self._trained_fingerprint
        return identity

    @cached_property
    def _trained_fingerprint(self) -> str:
        return Artifact.file(TRAINED, self.trained).open()["fingerprint"]

    def is_complete(self) -> bool:
        """Whether this very index is there already.

        Raises:
            InputError: an index of this name is there, but made from something else.
        """
        if not (self.path.is_file() and self.artifact.is_complete(self.identity)):
            return False
        check_numbers(self.path, self.artifact.read())
        return True

    def job(self, work: Callable[[], object]) -> Job:
        """The job of building it, unless it is there, by `work`, which must call `run`."""
        return Job(self.artifact.lock(), self.is_complete, work)

    @property
    def trained_path(self) -> Path:
        """The file that `train` publishes, with a `.json` beside it."""
        part = self.datastore.part
        path = self.path if part is None else part.path / self.path.name
        return path.with_name(f"{path.name}.trained")

    def training_job(self, report: Report) -> Job:
        """The job of training it, unless that is done."""
        artifact = Artifact.file(TRAINED, self.trained_path)
        return Job(artifact.lock(), self._is_trained, lambda: self.train(report))

    def train(self, report: Report = lambda *_: None) -> Path:
        """Publishes the trained index, without any key, in the directory of the whole, unless it is
        there already; the shards' indexes begin with it. Where the datastore is one shard, the
        sample comes from its keys.

        Raises:
            InputError: one of this name is there, but made from something else.
        """
        if not self._is_trained():
            path = self.trained_path
            self._write(self._begin(report), path)
            is_sound(path)
            fields = {**self._identity_of_trained, "fingerprint": digest_of(path)}
            Artifact.file(TRAINED, path).write(fields, complete=True, files=[path])
        return self.trained_path

    @property
    def _identity_of_trained(self) -> dict[str, Any]:
        identity, part = self.identity, self.datastore.part
        if part is None:
            return identity
        n_keys = self.datastore.n_keys_of_whole
        return {**identity, "keys": n_keys, "datastore": fingerprint_of(part.manifest)}

    def _is_trained(self) -> bool:
        artifact = Artifact.file(TRAINED, self.trained_path)
        return self.trained_path.is_file() and artifact.is_complete(self._identity_of_trained)

    def run(self, report: Report = lambda *_: None) -> Path:
        """Trains, adds, measures and publishes the index; continues from a partial one.

        Args:
            report: called with a stage, how much of it is done, and how much there is.
        """
        index = self._open_partial()
        if index is None:
            for left_over in self.path.parent.glob(f"{self.path.name}.part-*"):
                left_over.unlink()
            index = self._begin(report)
            self._keep(index)
        sample = RecallSample(self.datastore, self.metric)
        start = time.perf_counter()
        try:
            self._add(index, sample, report)
        except KeyboardInterrupt:
            if self.consistent:
                self._keep(index)
            raise
        if self.parts:
            self._merge(index, report)
        self._write(index, self.path)
        is_sound(self.path)
        self.seconds["add"] = time.perf_counter() - start - self.seconds["measure"]
        with self._timed("measure"):
            self.recall = sample.measure(read_index(self.path))
        fields = {**self.identity, "seconds": self.seconds, "recall": self.recall}
        self.artifact.write(fields, complete=True, files=files_of(self.path))
        self.partial.unlink(missing_ok=True)
        self._of_partial.manifest.unlink(missing_ok=True)
        for part in self.parts:
            self.path.with_name(part).unlink()
        return self.path

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    @property
    def _of_partial(self) -> Artifact:
        return artifact_of(self.partial)

    def _open_partial(self) -> faiss.Index | None:
        if not (self.partial.is_file() and self._of_partial.says(self.identity)):
            return None
        manifest = self._of_partial.read()
        if manifest["parts"] and manifest["version"] < NUMBERED_RIGHTLY:
            return None
        files = [self.path.with_name(part) for part in manifest["parts"]]
        try:
            index = on_gpus(faiss.read_index(str(self.partial)))
            self.n_in_parts = sum(open_file(file).ntotal for file in files)
        except RuntimeError as error:
            print(f"{self.partial}: cannot be read ({faiss_reason(error)}); building anew")
            return None
        self.parts = manifest["parts"]
        return index

    def _begin(self, report: Report) -> faiss.Index:
        """A trained index without any key."""
        if self.trained is not None:
            return on_gpus(faiss.read_index(str(self.trained)))
        index = make_index(self.datastore.dim, self.factory, self.metric)
        ivf = faiss.try_extract_index_ivf(index)  # hidden once the index is on GPUs
        lists = ivf.nlist if ivf is not None else 0
        index = on_gpus(index)
        warn_of_lists(self.factory, lists, self.datastore.n_keys)
        report("training", 0, 1)
        with self._timed("train"):
            self._train(index, lists)
        report("training", 1, 1)
        return index

    def _train(self, index: faiss.Index, lists: int) -> None:
        """Trains on a seeded random sample, read in file order."""
        size = sample_size(lists, self.datastore.n_keys)
        check_lists(self.factory, lists, size)
        _, sample = self.datastore.sample(size, self.seed)
        try:
            index.train(normalized(sample, self.metric))
        except RuntimeError as error:
            raise InputError(
                f"--knn.index {self.factory} cannot be trained on {size:,} keys "
                f"({faiss_reason(error)})"
            ) from None

    def _add(self, index: faiss.Index, sample: RecallSample, report: Report) -> None:
        total = self.datastore.n_keys
        done = self.n_in_parts + index.ntotal
        report("adding", done, total)
        self._show_again(sample, done, report)
        last_kept, pause = time.perf_counter(), PARTIAL_EVERY
        for block in self.datastore.blocks(start=done):
            keys = normalized(block, self.metric)
            with self._timed("measure"):
                sample.show(keys)
            self.consistent = False
            with interrupts_held() as held:
                self._add_block(index, keys, done)
            self.consistent = True
            done += len(block)
            report("adding", done, total)
            if held:
                raise KeyboardInterrupt
            if done == total:
                break
            if _bytes_of_lists(index) > PART_BYTES:
                self._put_aside(index)
            if time.perf_counter() - last_kept > pause:
                start = time.perf_counter()
                self._keep(index)
                last_kept = time.perf_counter()
                pause = max(PARTIAL_EVERY, 10 * (last_kept - start))

    def _show_again(self, sample: RecallSample, done: int, report: Report) -> None:
        """Compares the recall sample with the first `done` keys, which an interrupted run added."""
        blocks = self.datastore.blocks()
        while sample.n_shown < done:
            block = next(blocks)[: done - sample.n_shown]
            with self._timed("measure"):
                sample.show(normalized(block, self.metric))
            report("measuring", sample.n_shown, done)

    def _add_block(self, index: faiss.Index, keys: np.ndarray, first: int) -> None:
        """Adds keys fp32 `[n, d]`, of which `first` is the number of the first."""
        self._refuse_too_large(index, keys)
        if self.n_in_parts:  # faiss would count them from the beginning of this part
            index.add_with_ids(keys, np.arange(first, first + len(keys)))
        else:
            index.add(keys)

    def _refuse_too_large(self, index: faiss.Index, keys: np.ndarray) -> None:
        """Half precision would make infinities of larger numbers, which nobody finds."""
        if self.datastore.manifest["dtype"] == "fp16" or "SQfp16" not in self.factory:
            return
        rotated = isinstance(index, faiss.IndexPreTransform)
        largest = (np.linalg.norm(keys, axis=1) if rotated else np.abs(keys)).max()
        if largest > LARGEST_HALF:
            raise InputError(
                f"--knn.index {self.factory}: {self.datastore.path} has keys up to {largest:.4g}, "
                f"but SQfp16 holds at most {LARGEST_HALF:.0f}; expected "
                f"{self.factory.replace('SQfp16', 'Flat')} or {self.factory.replace('fp16', '8')}"
            )

    def _put_aside(self, index: faiss.Index) -> None:
        """Writes the keys added since the last part as a new part, and empties the index."""
        part = self.path.with_name(f"{self.path.name}.part-{len(self.parts)}")
        self._write(index, part)
        self.n_in_parts += index.ntotal
        self.parts.append(part.name)
        index.reset()
        self._keep(index)

    def _merge(self, index: faiss.Index, report: Report) -> None:
        """Merges the lists of all parts into a file, which becomes the index's lists."""
        report("merging", 0, 1)
        self._put_aside(index)
        files = [self.path.with_name(part) for part in self.parts]
        # It is written through a memory map, where a full disk would end the program.
        needed = sum(file.stat().st_size for file in files)
        check_room({self.path.parent: needed}, "index", "make room")
        lists = list_file_of(self.path)
        with publishing(lists) as making:
            merge_ondisk(index, list(map(str, files)), str(making))
        # Beside the index, wherever that will be.
        on_disk = faiss.downcast_InvertedLists(faiss.extract_index_ivf(index).invlists)
        on_disk.filename = lists.name
        report("merging", 1, 1)

    def _keep(self, index: faiss.Index) -> None:
        self._of_partial.manifest.unlink(missing_ok=True)
        self._write(index, self.partial)
        self._of_partial.write({**self.identity, "parts": self.parts}, complete=False)

    def _write(self, index: faiss.Index, path: Path) -> None:
        if GPUS:
            index = faiss.index_gpu_to_cpu(index)
        with publishing(path) as making:
            write_index(index, making)
