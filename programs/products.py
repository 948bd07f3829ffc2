"""What the programs make once of a model and a corpus, and find again: datastores and their
indexes; where they lie, and whether what lies there is what it is taken for.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback

from neighborlm.callbacks.datastore_writer import DatastoreWriter
from neighborlm.callbacks.index_builder import IndexBuilder
from neighborlm.callbacks.throughput import Throughput
from neighborlm.common.contracts import LanguageModel
from neighborlm.common.errors import InputError
from neighborlm.common.names import call
from neighborlm.common.progress import progress_bars
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.scorer import Scorer
from neighborlm.originals.raw_datastore import import_datastore, is_raw
from neighborlm.programs.made_with import (
    comparable,
    differences,
    differences_in_shards,
    refuse_differences,
    remark_on,
)
from neighborlm.programs.places import check_writable
from neighborlm.programs.plausibility import check_keys
from neighborlm.programs.run import Run, run_of
from neighborlm.programs.settings import KNNSettings, NeighborSettings
from neighborlm.retrieval.cluster.exchange import share_files
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import check_index, is_factory, resolve
from neighborlm.retrieval.store.artifact import as_read, refuse_mismatch
from neighborlm.retrieval.store.datastore import Datastore, artifact_of, fingerprint_of
from neighborlm.retrieval.store.sharded_builder import new_datastore
from neighborlm.retrieval.store.shards import shard_name

PLACE = Path("datastores")
"""Where datastores are made unless a flag says otherwise."""


def folder_of_corpus(data: LMDataModule) -> Path:
    """Where products lie that are made from a corpus alone."""
    return PLACE / data.name


def folder_of(model: LanguageModel, data: LMDataModule) -> Path:
    """Where the datastores of a model lie: datastores/<run>, by the run that its checkpoint lies
    in, so that models of one corpus do not share a place; that of the corpus for other models."""
    run = run_of(getattr(model, "checkpoint", None))
    return folder_of_corpus(data) if run is None else PLACE / run.resolve().name


class Products:
    """The datastores of one model's keys and their indexes.

    Args:
        run: which the stages that make them belong to.
        data: the corpus.
        model: whose keys they hold.
        knn: which keys, and how they are indexed.
        root: folder of the datastores; by default datastores/<run>, see `folder_of`.
        fingerprint: of the model that made them; by default that of `model`.
        shown: the settings by which a graph network sees neighbours, where the keys are its
            outputs.
        place_flag: the flag that names another place.
    """

    def __init__(
        self,
        run: Run,
        data: LMDataModule,
        model: LanguageModel,
        knn: KNNSettings,
        root: str | None = None,
        fingerprint: str | None = None,
        shown: NeighborSettings | None = None,
        place_flag: str = "--knn.datastore",
    ) -> None:
        self.run = run
        self.data = data
        self.model = model
        self.knn = knn
        self.root = Path(root) if root else folder_of(model, data)
        self.earlier_root = self.root if root else folder_of_corpus(data)
        """Where version 0.1 would have made them."""
        self.own_fingerprint = model.fingerprint
        self.fingerprint = fingerprint or self.own_fingerprint
        if getattr(model, "checkpoint", None) is not None:
            call(self.fingerprint, model.checkpoint)
        self.shown = shown
        self.place_flag = place_flag
        self.seconds: dict[str, float] = {}

    def datastore_path(self, split: str) -> Path:
        """Where the datastore is; with `--knn.shard`, the shard."""
        whole = self.whole_path(split)
        if self.knn.shard is None:
            return whole
        return whole / shard_name(self.knn.shard, self.knn.shards)

    def whole_path(self, split: str) -> Path:
        """`--knn.datastore`, else <split>[-<key type>] under the root; or where an earlier version
        has made it, if it is there."""
        if self.knn.datastore is not None:
            return Path(self.knn.datastore)
        suffix = "" if self.knn.key_type == "last_ffn_input" else f"-{self.knn.key_type}"
        name = f"{split}{suffix}".replace(":", "_")
        place, earlier = self.root / name, artifact_of(self.earlier_root / name)
        if place == self.earlier_root / name or artifact_of(place).exists():
            return place
        expected = self.expected_of_datastore() | {"corpus": self.corpus(split)}
        with suppress(InputError):
            made_from = earlier.read()["made_from"] if earlier.exists() else {}
            if as_read(comparable(expected, made_from)).items() <= made_from.items():
                return earlier.name
        return place

    def expected_of_datastore(self) -> dict[str, Any]:
        """What any datastore must have been made from to be searched with this model."""
        expected = {
            "model": self.fingerprint,
            "dictionary": self._called(self.data.dictionary.fingerprint, "the dictionary"),
            "key_type": self.knn.key_type,
        }
        if self.knn.key_type == "gnn":  # they depend on all that the network was shown
            shown = {**asdict(self.shown), **self.model.neighbors}
            for place in ("datastores", "shards", "placement", "shard"):
                del shown[place]
            expected |= {"neighbors": shown, "lm": self.model.lm.fingerprint}
        return expected

    def corpus(self, split: str) -> str:
        """Fingerprint of a split."""
        return self._called(self.data.fingerprint(split), f"the {split} split")

    def _called(self, fingerprint: str, what: str) -> str:
        """A fingerprint of the corpus, by which messages then call this."""
        call(fingerprint, f"{what} of {self.data.settings.corpus}")
        return fingerprint

    def made_from(self, split: str) -> dict[str, Any]:
        """What determines the content of the datastore that this command would write."""
        data = self.data
        place = getattr(self.model, "key_places", {}).get(self.knn.key_type)
        return {
            **self.expected_of_datastore(),
            "corpus": self.corpus(split),
            "split": split,
            "break_mode": data.break_mode,
            "tokens_per_sample": data.tokens_per_sample,
            "context_window": data.context_window,
            "max_tokens": data.max_tokens,
            "drop_long_lines": data.drop_long_lines,
            "precision": self.run.precision,
            "min_context": self.knn.min_context,
            **({"keys": place} if place else {}),
        }

    def open_fitting_datastore(self, split: str) -> Datastore | None:
        """The datastore if it is complete; None where it must be made or finished. One whose keys
        have read other contexts than now is remarked upon.

        Raises:
            InputError: another model's, dictionary's, key type's or (at the default place)
                corpus's.
        """
        path = self.datastore_path(split)
        if is_raw(path):
            return self.open_raw_datastore(path)
        if not Datastore.is_complete(path):
            if self.knn.datastore is not None:
                refuse_other_folder(Path(self.knn.datastore))
            return None
        datastore = self._open(split)
        made_from = datastore.manifest["made_from"]
        if "model" not in made_from:  # the original program's, or a copy of it
            return self.check_raw(datastore)
        expected = self.expected_of_datastore()
        if self.knn.datastore is None:
            expected |= {"corpus": self.corpus(split)}
        self.refuse_mismatch(path, made_from, expected)
        self.refuse_mismatch(path, datastore.manifest, {"dtype": self.knn.dtype})
        call(fingerprint_of(datastore.whole), self.whole_path(split))
        if found := differences(made_from, self.made_from(split)):
            self.run.remark(remark_on(path, found, self.place_flag))
        return datastore

    def refuse_mismatch(
        self, path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]
    ) -> None:
        """As `retrieval.store.artifact.refuse_mismatch`, naming the flag of another place."""
        advice = f"use a matching one, or another place ({self.place_flag})"
        refuse_mismatch(path, found, as_read(comparable(expected, found)), advice)

    def refuse_other(self, split: str) -> None:
        """Refuses to take what is there for the datastore that this command is to make.

        Raises:
            InputError: it was made from another text, or with other settings.
        """
        path = self.datastore_path(split)
        if not is_raw(path) and not artifact_of(path).exists():
            return
        manifest = {"made_from": {}} if is_raw(path) else artifact_of(path).read()
        made_from, now = manifest["made_from"], self.made_from(split)
        other = None if "model" in made_from else "is of the original program"
        if "thinned" in made_from:
            other = "was made smaller, by neighborlm datastore thin or merge-entries"
        if other is not None:
            raise InputError(
                f"{path}: {other}; expected another place for the one that this command makes "
                f"({self.place_flag} FOLDER)"
            )
        names = (*self.expected_of_datastore(), "corpus", "split")
        self.refuse_mismatch(path, made_from, {name: now[name] for name in names})
        found = differences(made_from, now) + differences_in_shards(manifest, self.knn)
        refuse_differences(path, found, self.place_flag)

    def open_raw_datastore(self, source: Path) -> Datastore:
        """Takes over the original program's datastore, with a manifest under datastores/."""
        name = f"imported-{source.name}"
        places = [root / name for root in (self.root, self.earlier_root)]
        datastore = import_datastore(
            source,
            next((place for place in places if artifact_of(place).exists()), places[0]),
            self.knn.size,
            self.knn.dim,
            vocab_size=self.data.vocab_size,
        )
        if len(datastore.masked):
            self.run.remark(
                f"{source}: {len(datastore.masked):,} rows that are zeros or not finite are masked"
            )
        return self.check_raw(datastore)

    def check_raw(self, datastore: Datastore) -> Datastore:
        """All that can be checked of a datastore that does not say what made it: its width, and
        whether its keys are what the model computes."""
        width = self.model.key_width(self.knn.key_type)
        refuse_mismatch(datastore.path, {"dim": datastore.dim}, {"dim": width})
        if "thinned" not in datastore.manifest["made_from"]:  # values follow one another
            check_keys(self.model, self.knn.key_type, datastore, self.data, self.run)
        return datastore

    def ensure_datastore(self, split: str, *after: Callback) -> Datastore:
        """Writes the split's datastore, or the rest of it, unless it is there.

        Args:
            after: callbacks that work on the datastore once it is written.
        """
        datastore = self.open_fitting_datastore(split)
        if datastore is not None:
            return datastore
        if self.fingerprint != self.own_fingerprint:
            raise InputError(
                f"{self.datastore_path(split)}: no such datastore, and it cannot be made any more: "
                "the LM that made the others was changed by training"
            )
        if self.knn.shard is not None and self.run.hosts > 1:
            raise InputError(
                f"--knn.shard {self.knn.shard} is made by the processes of one host, but "
                f"--trainer.num_nodes is {self.run.hosts}; expected 1"
            )
        self.refuse_other(split)  # than the unfinished one that this command goes on with
        check_writable(self.datastore_path(split), self.place_flag, "folder")
        rows = self.data.rows(split, self.data.context_window)
        n_tokens = len(self.data.stream(split).tokens)
        masked = (rows.behind_less_context(self.knn.min_context), rows.dropped(n_tokens))
        builder = new_datastore(
            self.whole_path(split),
            rows=n_tokens,
            dim=self.model.key_width(self.knn.key_type),
            dtype=self.knn.dtype,
            vocab_size=self.data.vocab_size,
            made_from=self.made_from(split),
            masked=np.sort(np.concatenate(masked)),
            shards=self.knn.shards,
            kind=self.knn.placement,
            only=self.knn.shard,
        )
        before = builder.n_written
        if before > len(builder.masked):
            print(f"{builder.path}: {before:,} of {builder.n_rows:,} rows are written; going on")
        wanted = None if self.knn.shard is None else builder.is_wanted()
        loader = self.data.evaluation_dataloader(split, builder.is_written, wanted)
        writer, throughput = DatastoreWriter(builder, self.knn.key_type), Throughput()
        trainer = self.run.trainer([writer, throughput, *after])
        trainer.predict(Scorer(self.model, writer.want), loader, return_predictions=False)
        stage = "datastore" if split == "train" else f"datastore_{split}"
        self.seconds[stage] = throughput.seconds
        return self._open(split)

    def _open(self, split: str) -> Datastore:
        """With `--knn.shard`, the shard as part of the whole."""
        return Datastore.open(self.whole_path(split), self.knn.shard)

    def ensure_datastore_and_index(self, split: str) -> Datastore:
        """Makes what is missing of a datastore and its index; of the datastores of hosts that have
        a shard each, of the index."""
        if self.knn.shard is not None and self.run.hosts > 1:
            self._share_trained_index(self.ensure_datastore(split))
        existing = self.open_fitting_datastore(split)
        taken_over = existing is not None and is_raw(self.whole_path(split))
        builder = IndexBuilder(
            existing.path if taken_over else self.whole_path(split),
            self.knn.search(),
            self.run.seed,
            self.knn.shard,
        )
        datastore = self.ensure_datastore(split, builder)
        builder.build()
        self.seconds |= {f"index_{stage}": s for stage, s in builder.seconds.items()}
        return datastore

    def _share_trained_index(self, shard: Datastore) -> None:
        """Has the indexes of all hosts begin with the same, which one of them trains."""
        factory = resolve(shard, self.knn.index)
        if not is_factory(factory):
            return
        seed = self.run.seed
        building = IndexBuilding(shard, factory, self.knn.metric, seed)
        path = building.trained_path
        files = [path, path.with_name(f"{path.name}.json")]

        def train() -> None:
            with progress_bars(f"index {factory} of {shard.path}") as report:
                building.train(report)

        share_files(self.run.join_ranks(self.model), files, train)

    def check_index(self, n_keys: int) -> None:
        """Refuses a factory string that faiss does not know, or that this many keys do not suit."""
        width = self.model.key_width(self.knn.key_type)
        check_index(self.knn.index, width, self.knn.metric, n_keys)


OF_DATASTORES = ("*.npy*", "*.json*", "*.faiss*", ".*", "shard-*")
"""Files and folders that a datastore may have before its manifest is there, also while another rank
writes them."""


def refuse_other_folder(path: Path) -> None:
    """Refuses to make a datastore among other files.

    Raises:
        InputError: the folder has files that no datastore has.
    """
    if not path.is_dir() or (path / "manifest.json").exists():
        return
    for entry in sorted(path.iterdir()):
        if not any(entry.match(pattern) for pattern in OF_DATASTORES):
            raise InputError(
                f"--knn.datastore {path}: holds {entry.name} and no datastore; expected a "
                "datastore, or an empty or missing folder to make one in"
            )
