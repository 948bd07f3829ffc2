"""What a GNN-LM reads besides the text, made from the datastores of its LM: neighbour tables and
features of neighbours.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from neighborlm.callbacks.neighbor_table_writer import NeighborTableWriter
from neighborlm.common.errors import InputError
from neighborlm.common.progress import progress_bars
from neighborlm.datamodules.graphs import NeighborMemory
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.features import CodeDecoder
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.originals.neighbor_table import open_imported
from neighborlm.programs.products import Products
from neighborlm.programs.run import Run
from neighborlm.programs.settings import NeighborSettings
from neighborlm.retrieval.cluster.exchange import Exchange, ExchangedArray, share_files
from neighborlm.retrieval.neighbors.codec import (
    IMPORTED,
    Codes,
    build_codec,
    build_codes,
    check_codec,
    codec_files,
    has_codes,
    open_codes,
)
from neighborlm.retrieval.neighbors.tables import NeighborTable
from neighborlm.retrieval.store.artifact import refuse_mismatch
from neighborlm.retrieval.store.datastore import Datastore
from neighborlm.retrieval.store.shards import ShardedArray

Rows = np.ndarray | ShardedArray
"""Arrays by rows of a datastore."""


class NeighborProducts:
    """Neighbour tables and feature store of a GNN-LM, made from the datastores of its LM.

    Args:
        run: which the stages that make them belong to.
        data: the corpus; its batches get their neighbours by `attach`.
        model: gets what decodes their features.
        settings: what the model is to see.
        token_features: of the tokens themselves, where the settings leave it open; `stored` only
            if there are any.
        checkpoint: of the trained network, for messages: the one evaluated, or the one that
            training starts from.

    Raises:
        InputError: the settings contradict themselves, the model's or what it was trained with.
    """

    def __init__(
        self,
        run: Run,
        data: LMDataModule,
        model: GNNLM,
        settings: NeighborSettings,
        token_features: Literal["stored", "online"],
        checkpoint: Path | str | None,
    ) -> None:
        settings.check()
        if settings.shard is not None:
            check_hosts(run, data, settings)
        self.run = run
        self.data = data
        self.model = model
        self.given = settings
        """As they were before what they leave open was chosen."""
        self.settings = settings
        self.checkpoint = checkpoint
        self._choose_token_features(token_features)
        place = {"root": settings.datastores, "fingerprint": model.lm_fingerprint}
        place["place_flag"] = "--neighbors.datastores"
        self.products = Products(run, data, model.lm, settings.knn, **place)
        in_one = replace(settings.knn, shards=1, shard=None)
        self.copies = Products(run, data, model.lm, in_one, **place)
        """Of other splits, where hosts have but a shard of the training split."""
        self.exchange: Exchange | None = None
        model.lm_fingerprint = self.products.fingerprint
        width = model.lm.key_width(settings.key_type)
        if settings.features != "embeddings" and width != model.lm.width:
            raise InputError(
                f"--neighbors.key_type {settings.key_type}: has a width of {width}, but what the "
                f"softmax reads one of {model.lm.width}; expected last_hidden"
            )
        self.codec = settings.codec_for(width)
        seen = {
            "features": settings.features,
            "key_type": settings.key_type,
            "codec": self.codec if settings.features == "codes" else None,
        }
        if model.neighbors is not None:
            refuse_mismatch(self.checkpoint, model.neighbors, seen)
        model.neighbors = seen
        if settings.index != IMPORTED:
            self.products.check_index(len(data.stream("train").tokens))
        if settings.features == "codes" and self.codec != IMPORTED:
            check_codec(self.codec, width)

    def _choose_token_features(self, default: Literal["stored", "online"]) -> None:
        wanted = self.settings.token_features
        if wanted == "stored" and not self.are_token_features:
            raise InputError(
                "--neighbors.token_features is stored, but --neighbors.key_type "
                f"{self.settings.key_type} is not what the softmax reads; expected last_hidden"
            )
        default = default if self.are_token_features else "online"
        self.settings = replace(self.settings, token_features=wanted or default)

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took that was not done before."""
        return self.products.seconds

    def attach(self, *splits: str) -> None:
        """Gives batches of some splits their neighbours, making what is missing of datastores,
        index, tables and codes.

        Args:
            splits: of the corpus.
        """
        settings = self.settings
        missing = [split for split in splits if split not in self.data.memories]
        if not missing:
            return
        imported = settings.index == IMPORTED
        if imported:
            memory = self.products.ensure_datastore("train")
        else:
            memory = self.products.ensure_datastore_and_index("train")
        if memory.part is not None and self.exchange is None:
            self.exchange = Exchange(memory, self.run.join_ranks(self.model))
        features = self._features(memory)
        for split in missing:
            queries = self._queries(split)
            window = self._window(memory) if split == "train" else 0
            if imported:
                table = open_imported(queries, memory, settings.k)
            else:
                table = self._table(split, queries, memory, window)
            self.data.memories[split] = NeighborMemory(
                self._spread(table.nearest(settings.k), queries),
                self._spread(features, memory),
                settings.left_context,
                settings.right_context,
                self.model.hparams.layers,
                window if split == "train" else None,
                self._spread(queries.keys, queries)
                if settings.token_features == "stored"
                else None,
                self._spread(memory.values, memory) if self.model.of_values is not None else None,
            )

    def _queries(self, split: str) -> Datastore:
        """The split's own datastore. Where hosts have a shard each of the training split, they have
        those of the others whole."""
        if split == "train" or self.settings.shard is None:
            return self.products.ensure_datastore(split)
        datastore = self.copies.open_fitting_datastore(split)
        if datastore is None:
            raise InputError(
                f"{self.copies.datastore_path(split)}: no complete datastore; where hosts have a "
                f"shard each, each makes that of the {split} split alone (--save_datastore)"
            )
        return datastore

    def _spread(self, array: Rows, datastore: Datastore) -> Rows | ExchangedArray:
        """The array of a datastore, of all hosts where this one has but a part."""
        return array if datastore.part is None else ExchangedArray(array, self.exchange)

    def _table(
        self, split: str, queries: Datastore, memory: Datastore, window: int
    ) -> NeighborTable:
        settings = self.settings
        writer = NeighborTableWriter(
            queries.path if queries.part is None else queries.part.path,
            memory.path if memory.part is None else memory.part.path,
            settings.knn.search(self.run.device),
            settings.k,
            window,
            shard=settings.shard,
        )
        table = writer.build()
        if writer.seconds:
            self.seconds[f"neighbors_{split}"] = writer.seconds
        return table

    @property
    def are_token_features(self) -> bool:
        """Whether the keys are what the LM's softmax reads, and so a token's features."""
        lm = self.model.lm
        if self.settings.key_type == "last_hidden" or not isinstance(lm, TransformerLM):
            return self.settings.key_type == "last_hidden"
        last = f"layer:{lm.hparams.layers - 1}:output"
        return self.settings.key_type == last and not lm.hparams.final_norm

    def _features(self, memory: Datastore) -> Rows:
        """The feature store of neighbours, memory-mapped."""
        if self.settings.features == "keys":
            return memory.keys
        if self.settings.features == "embeddings":
            return memory.values
        codes = open_codes(memory, IMPORTED) if self.codec == IMPORTED else self._codes(memory)
        decoder = CodeDecoder(codes.decoder_arrays())
        if self.codec == IMPORTED:
            self._check_quantizer(codes, decoder)
        self.model.code_decoder = decoder
        return codes.codes

    def _codes(self, memory: Datastore) -> Codes:
        """The keys of the memory, quantised."""
        making, start = not has_codes(memory, self.codec), time.perf_counter()
        how = (memory, self.codec, self.run.seed)
        with progress_bars(f"codes {self.codec} of {memory.path.name}") as report:
            if self.exchange is not None:
                files = codec_files(memory, self.codec)
                share_files(self.exchange.ranks, files, lambda: build_codec(*how, report))
            codes = build_codes(*how, report)
        if making:
            self.seconds["codes"] = time.perf_counter() - start
        return codes

    def _check_quantizer(self, codes: Codes, decoder: CodeDecoder) -> None:
        """Refuses imported codes where a checkpoint of the original holds another quantiser than
        they were made by."""
        if self.model.code_decoder is None:
            return
        held, found = self.model.code_decoder.centroids, decoder.centroids
        rounding = 1e-3 * held.abs().max()  # a checkpoint may be in half precision
        if found is None or found.shape != held.shape or (found - held).abs().max() > rounding:
            raise InputError(
                f"{codes.path}: the centroids of its quantiser are not those that "
                f"{self.checkpoint} holds; expected the codes that it was trained with"
            )

    def _window(self, memory: Datastore) -> int:
        """Tokens within which a neighbour on the training split could show what is to be
        predicted: its chain's features have read as much as a row of the LM holds."""
        if self.settings.exclude_window is not None:
            return self.settings.exclude_window
        span = memory.manifest["made_from"].get("tokens_per_sample", self.data.tokens_per_sample)
        return span + max(self.settings.left_context, self.settings.right_context)


def check_hosts(run: Run, data: LMDataModule, settings: NeighborSettings) -> None:
    """Refuses what hosts that have a shard each cannot do."""
    given = f"--neighbors.shard {settings.shard} of {settings.shards}: this host has that alone"
    if not 1 < settings.shards <= run.hosts:
        raise InputError(
            f"{given}, but --trainer.num_nodes is {run.hosts}; expected two shards or more "
            "and a host for every one"
        )
    if data.num_workers > 0:
        raise InputError(
            f"{given}, but --data.num_workers is {data.num_workers}; expected 0, as all processes "
            "exchange neighbours for the same batch"
        )
    if IMPORTED in (settings.index, settings.codec):
        raise InputError(f"{given}, but what was {IMPORTED} is of a datastore in one piece")
