"""What the programs make once of a model and a corpus, and find again: datastores, their indexes,
and for a GNN-LM neighbour tables and codes.
"""

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
from neighborlm.common.progress import progress_bars
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.scorer import Scorer
from neighborlm.originals.raw_datastore import import_datastore, is_raw
from neighborlm.programs.run import Run
from neighborlm.programs.settings import KNNSettings, NeighborSettings
from neighborlm.retrieval.cluster.exchange import share_files
from neighborlm.retrieval.search.building import IndexBuilding
from neighborlm.retrieval.search.index import check_index, is_factory, resolve
from neighborlm.retrieval.store.artifact import refuse_mismatch
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.sharded_builder import new_datastore
from neighborlm.retrieval.store.shards import ShardedArray, shard_name

Rows = np.ndarray | ShardedArray
"""Arrays by rows of a datastore."""


class Products:
    """The datastores of one model's keys and their indexes.

    Args:
        run: which the stages that make them belong to.
        data: the corpus.
        model: whose keys they hold.
        knn: which keys, and how they are indexed.
        root: folder of the datastores; by default datastores/<corpus>.
        fingerprint: of the model that made them; by default that of `model`.
        shown: the settings by which a graph network sees neighbours, where the keys are its
            outputs.
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
    ) -> None:
        self.run = run
        self.data = data
        self.model = model
        self.knn = knn
        self.root = Path(root) if root else Path("datastores") / data.name
        self.own_fingerprint = model.fingerprint
        self.fingerprint = fingerprint or self.own_fingerprint
        self.shown = shown
        self.seconds: dict[str, float] = {}

    def datastore_path(self, split: str) -> Path:
        """Where the datastore is; with `--knn.shard`, the shard."""
        whole = self.whole_path(split)
        if self.knn.shard is None:
            return whole
        return whole / shard_name(self.knn.shard, self.knn.shards)

    def whole_path(self, split: str) -> Path:
        """`--knn.datastore`, else <split>[-<key type>] under the root."""
        if self.knn.datastore is not None:
            return Path(self.knn.datastore)
        suffix = "" if self.knn.key_type == "last_ffn_input" else f"-{self.knn.key_type}"
        name = f"{split}{suffix}".replace(":", "_")
        return self.root / name

    def expected_of_datastore(self) -> dict[str, Any]:
        """What any datastore must have been made from to be searched with this model."""
        expected = {
            "model": self.fingerprint,
            "dictionary": self.data.dictionary.fingerprint,
            "key_type": self.knn.key_type,
        }
        if self.knn.key_type == "gnn":  # they depend on all that the network was shown
            shown = {**asdict(self.shown), **self.model.neighbors}
            for place in ("datastores", "shards", "placement", "shard"):
                del shown[place]
            expected["neighbors"] = shown
        return expected

    def made_from(self, split: str) -> dict[str, Any]:
        """What determines the content of the datastore that this command would write."""
        data = self.data
        return {
            **self.expected_of_datastore(),
            "corpus": data.fingerprint(split),
            "split": split,
            "break_mode": data.break_mode,
            "tokens_per_sample": data.tokens_per_sample,
            "context_window": data.context_window,
            "max_tokens": data.max_tokens,
            "drop_long_lines": data.drop_long_lines,
            "precision": self.run.precision,
            "min_context": self.knn.min_context,
        }

    def open_fitting_datastore(self, split: str) -> Datastore | None:
        """The datastore if it is complete; None where it must be made or finished.

        Raises:
            InputError: another model's, dictionary's, key type's or (at the default place)
                corpus's.
        """
        path = self.datastore_path(split)
        if is_raw(path):
            return self.open_raw_datastore(path)
        if not Datastore.is_complete(path):
            return None
        datastore = self._open(split)
        made_from = datastore.manifest["made_from"]
        if "model" not in made_from:  # the original program's, or a copy of it
            return self.check_raw(datastore)
        expected = self.expected_of_datastore()
        if self.knn.datastore is None:
            expected |= {"corpus": self.data.fingerprint(split)}
        refuse_mismatch(path, made_from, expected)
        refuse_mismatch(path, datastore.manifest, {"dtype": self.knn.dtype})
        return datastore

    def open_raw_datastore(self, source: Path) -> Datastore:
        """Takes over the original program's datastore, with a manifest under datastores/."""
        datastore = import_datastore(
            source,
            self.root / f"imported-{source.name}",
            self.knn.size,
            self.knn.dim,
            vocab_size=self.data.vocab_size,
        )
        if len(datastore.masked):
            print(f"{source}: {len(datastore.masked)} rows of zeros at its end are masked")
        return self.check_raw(datastore)

    def check_raw(self, datastore: Datastore) -> Datastore:
        """All that can be checked of a datastore that does not say what made it: its width."""
        width = self.model.key_width(self.knn.key_type)
        refuse_mismatch(datastore.path, {"dim": datastore.dim}, {"dim": width})
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
            print(f"{builder.path}: {before} of {builder.n_rows} rows are written; going on")
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
            with progress_bars(f"index {factory}") as report:
                building.train(report)

        share_files(self.run.join_ranks(self.model), files, train)

    def check_index(self, n_keys: int) -> None:
        """Refuses a factory string that faiss does not know, or that this many keys do not suit."""
        width = self.model.key_width(self.knn.key_type)
        check_index(self.knn.index, width, self.knn.metric, n_keys)
