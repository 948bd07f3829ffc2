"""Perplexity of a trained model, plain or with a nearest-neighbour memory.

    python evaluate.py --config configs/<corpus>/lm.yaml --ckpt_path CKPT [--knnlm]

`--save_datastore` and `--build_index` do one stage as a job of its own.
"""

import json
import shutil
import time
from dataclasses import asdict, replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pytorch_lightning.cli import LightningArgumentParser

from neighborlm.callbacks.knn_interpolation import KNNInterpolation
from neighborlm.callbacks.mixture import Mixture
from neighborlm.callbacks.throughput import Throughput
from neighborlm.callbacks.token_scores import LMScores, ScoreTable, save_scores
from neighborlm.common.contracts import Retriever
from neighborlm.common.errors import InputError
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.language_model import LanguageModel
from neighborlm.programs.checkpoints import load_model, model_fingerprint
from neighborlm.programs.cli import ProgramCLI, check_row_length
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.products import NeighborProducts, Products
from neighborlm.programs.reports import figures, log_tuning, publish
from neighborlm.programs.settings import KNNSettings, NeighborSettings
from neighborlm.retrieval.cluster.distributed import open_distributed
from neighborlm.retrieval.memories.cache import RetrievalCache, RetrievalCacheBuilder
from neighborlm.retrieval.memories.knn import votes_of_scores
from neighborlm.retrieval.memories.tuning import Tuning, tune
from neighborlm.retrieval.search.index import is_path, open_retriever, resolve
from neighborlm.retrieval.store.datastore import Datastore, fingerprint_of


class EvaluateCLI(ProgramCLI):
    """The command line of evaluate.py; the model is the checkpoint's, whatever the config says."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The sections; what the one of the model says is only carried along."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items()})
        parser.add_argument(
            "--model", type=dict, default={}, help="settings of training; the checkpoint has them"
        )
        parser.add_lightning_class_args(LMDataModule, "data")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is not a section of train.py."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="trained model (default: checkpoints/best.ckpt of the run directory)",
        )
        parser.add_argument(
            "--split",
            type=str | None,
            default=None,
            help="what to evaluate (default: test) or to store (default: train): train, valid, "
            "test, or any split that a data-bin has",
        )
        parser.add_argument(
            "--knnlm", action="store_true", help="mix with the kNN distribution of a datastore"
        )
        parser.add_argument(
            "--save_datastore", action="store_true", help="only write the split's datastore"
        )
        parser.add_argument(
            "--build_index", action="store_true", help="only build the datastore's index"
        )
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="where results are written (default: results.json in the run directory)",
        )
        parser.add_argument(
            "--token_scores",
            type=str | None,
            default=None,
            help="write every token's log-probabilities to this .npz file",
        )
        parser.add_class_arguments(KNNSettings, "knn")

    def instantiate_classes(self) -> None:
        """Makes the settings, then the data module; the model comes from the checkpoint."""
        self.knn = KNNSettings(**self.config.knn.as_dict())
        self.knn.check()
        path = self.config.ckpt_path or self.run_dir / "checkpoints" / "best.ckpt"
        self.ckpt_path = Path(path)
        self.model = load_model(self.ckpt_path)
        if isinstance(self.model, GNNLM) != (self.arch == "gnn_lm"):
            raise InputError(
                f"{self.ckpt_path}: holds a {type(self.model).__name__}, but --arch is {self.arch} "
                "(the first line of a gnn_lm.yaml); expected the config that it was trained with"
            )
        for key_type in filter(None, (self.knn.key_type, self.knn.rescore_key_type)):
            self.model.key_width(key_type)
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule: LMDataModule = self.config_init.data
        check_row_length(self.config.data.tokens_per_sample, self.model.max_target_positions)
        self.datamodule.max_target_positions = self.model.max_target_positions


class Evaluation:
    """The stages of one evaluation, in the order in which they need one another.

    Args:
        cli: the parsed command line with its data module and model.
    """

    def __init__(self, cli: EvaluateCLI) -> None:
        self.cli = cli
        self.knn = cli.knn
        self.data: LMDataModule = cli.datamodule
        self.model: LanguageModel = cli.model
        self.neighbors: NeighborProducts | None = None
        # Made before any work, to refuse what it cannot do.
        cli.make_trainer([], cli.run_dir / "evaluate")
        self.check_dictionary()
        if cli.config.split is not None:
            self.data.stream(cli.config.split)
        if isinstance(self.model, GNNLM):
            settings = NeighborSettings(**cli.config.neighbors.as_dict())
            self.neighbors = NeighborProducts(cli, self.data, self.model, settings, "online")
        self.products = Products(cli, self.data, self.keyed(self.knn.key_type), self.knn)

    def keyed(self, key_type: str) -> LanguageModel:
        """The model whose feature a key type is: keys of an LM are those that it makes alone."""
        return self.model if self.neighbors is None or key_type == "gnn" else self.model.lm

    def ensure_rescoring(self) -> Datastore | None:
        """The datastore of `--knn.rescore_key_type`."""
        key_type = self.knn.rescore_key_type
        if key_type is None:
            return None
        knn = replace(self.knn, key_type=key_type, datastore=None)
        products = Products(self.cli, self.data, self.keyed(key_type), knn)
        if key_type == "gnn" and products.open_fitting_datastore("train") is None:
            self.give_neighbors("train")
        return products.ensure_datastore("train")

    @property
    def gnn_keys(self) -> bool:
        """Whether keys are features of the graph network."""
        return self.knn.key_type == "gnn"

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took that was not done before."""
        return self.products.seconds | (self.neighbors.seconds if self.neighbors else {})

    def check_dictionary(self) -> None:
        """Refuses a checkpoint that was trained with another dictionary than the corpus has."""
        expected = self.model.dictionary_fingerprint
        found = self.data.dictionary.fingerprint
        size = self.model.hparams.vocab_size
        if size != self.data.vocab_size or expected not in (None, found):
            raise InputError(
                f"{self.cli.ckpt_path}: was trained with a dictionary of {size} symbols "
                f"({expected}), but {self.data.corpus} gives one of {self.data.vocab_size} "
                f"({found}); pass the training run's dict.txt as --data.dictionary"
            )

    def check_search(self, split: str) -> None:
        """Everything about the search that can be wrong, before any long work."""
        if self.knn.shard is not None:
            self.check_search_by_hosts()
        existing = self.products.open_fitting_datastore("train")
        where = self.products.datastore_path("train")
        if existing is None:
            stored, n_keys = self.data.fingerprint("train"), len(self.data.stream("train").tokens)
        else:
            stored = existing.manifest["made_from"].get("corpus")
            n_keys = existing.n_keys_of_whole
        for predicted in {split, "valid"} if self.knn.lmbda == "auto" else {split}:
            if stored == self.data.fingerprint(predicted):
                raise InputError(
                    f"--split {predicted}: {where} holds this very split, so that every token "
                    "would find its own key; expected another split, or another --knn.datastore"
                )
        if self.knn.k > n_keys:
            raise InputError(f"--knn.k is {self.knn.k}, but {where} has only {n_keys} keys")
        if is_path(self.knn.index):
            if existing is None:
                raise InputError(
                    f"--knn.index {self.knn.index} is a file, but its datastore {where} is missing"
                )
            open_retriever(existing, self.knn.search())
        else:
            self.products.check_index()

    def check_search_by_hosts(self) -> None:
        """What hosts that have one shard each can do."""
        knn, hosts = self.knn, self.cli.config.trainer.num_nodes
        given = f"--knn.shard {knn.shard} of {knn.shards}: this host has that shard alone"
        if hosts < knn.shards:
            raise InputError(
                f"{given}, but --trainer.num_nodes is {hosts}; expected a host for every shard, or "
                "all of them assembled (neighborlm datastore assemble)"
            )
        needs_all = {
            "--knn.missing last_row": knn.missing == "last_row",
            f"--knn.rescore_key_type {knn.rescore_key_type}": knn.rescore_key_type is not None,
            f"--knn.similarity {self.similarity}": self.similarity != knn.metric,
            f"--knn.index {knn.index}": is_path(knn.index),
        }
        for flag, is_given in needs_all.items():
            if is_given:
                raise InputError(f"{given}, but {flag} needs them all; expected another value")

    def give_neighbors(self, *splits: str) -> None:
        """Makes what a GNN-LM reads besides the text of some splits."""
        if self.neighbors is not None:
            self.neighbors.attach(*splits)

    def make_products(self, split: str) -> None:
        """`--save_datastore` and `--build_index`: what they ask for and no more."""
        products = self.products
        if not self.cli.config.save_datastore and products.open_fitting_datastore(split) is None:
            raise InputError(
                f"{products.datastore_path(split)}: no complete datastore to index; "
                "--save_datastore makes it"
            )
        if self.cli.config.build_index:
            products.check_index()
        if self.gnn_keys:
            self.give_neighbors(split)
        if self.cli.config.build_index:
            datastore = products.ensure_datastore_and_index(split)
            print(f"index: {resolve(datastore, self.knn.index)}")
        else:
            datastore = products.ensure_datastore(split)
        print(f"datastore: {datastore.path}, {len(datastore)} keys of width {datastore.dim}")

    # -- scores ----------------------------------------------------------------------------------

    def score(self, split: str, *callbacks) -> dict[str, Any]:
        """One pass over a split: losses of the LM and, under `gnn`, of the graph network on top of
        it, and times, the model's alone where kNN runs beside it."""
        throughput = Throughput()
        trainer = self.cli.make_trainer([throughput, *callbacks], self.cli.run_dir / "evaluate")
        trainer.test(self.model, self.data.evaluation_dataloader(split), verbose=False)
        total = self.model.test_loss.compute()
        tokens = int(total["tokens"])
        searching = any(isinstance(callback, KNNInterpolation) for callback in callbacks)
        seconds = throughput.model_seconds if searching else throughput.seconds
        self.trainer, self.pass_seconds = trainer, throughput.seconds
        results = {"split": split, "tokens": tokens}
        own = figures(total["loss"].item(), tokens, seconds)
        if self.neighbors is None:
            return results | own
        lm_loss = self.model.lm_loss.compute()["loss"].item()
        of_network = own | asdict(self.neighbors.settings)
        if self.neighbors.exchange is not None:
            of_network["communication"] = self.neighbors.exchange.communication
        return results | figures(lm_loss, tokens, seconds) | {"gnn": of_network}

    def evaluate(self, split: str) -> dict[str, Any]:
        """The model's perplexity on a split and, with `--knnlm`, the mixture's."""
        if not self.cli.config.knnlm:
            self.give_neighbors(split)
            self.model.key_type = None
            lm_scores = self.lm_scores()
            results = self.score(split, *lm_scores)
            self.save_scores(*(callback.table for callback in lm_scores))
            return results
        self.check_search(split)
        if self.gnn_keys and self.products.open_fitting_datastore("train") is None:
            self.give_neighbors("train")
        datastore = self.products.ensure_datastore_and_index("train")
        knn = self.knn
        retriever = self.open_search(datastore)
        self.search = partial(
            KNNInterpolation,
            datastore,
            retriever,
            knn.k,
            distances=knn.distances,
            similarity=knn.similarity,
            missing=knn.missing,
            rescoring=self.ensure_rescoring(),
        )
        self.model.key_type, self.model.rescoring_key_type = knn.key_type, knn.rescore_key_type
        tuned = self.tuned(datastore) if knn.lmbda == "auto" else None
        mixed_by = {
            "lmbda": tuned.lmbda if tuned else knn.lmbda,
            "temperature": tuned.temperature if tuned else knn.temperature,
        }
        results, mixture, how = self.mix(split, datastore, mixed_by)
        loss, tokens = mixture.loss.compute()["loss"].item(), results["tokens"]
        results["knn"] = {
            "tokens": tokens,
            **figures(loss, tokens, how.pop("seconds")),
            **asdict(knn),
            "index": resolve(datastore, knn.index),
            **mixed_by,
            "tuned": tuned is not None,
            "datastore": str(datastore.path),
            "datastore_rows": datastore.whole["rows"],
            **mixture.statistics(),
            **how,
        }
        if retriever.communication:
            results["knn"]["communication"] = dict(retriever.communication)
        return results

    def open_search(self, datastore: Datastore) -> Retriever:
        """What `--knn.index` names; of a datastore in shards, each rank searches some for all."""
        knn = self.knn
        # Distances between other keys, or by another measure, are computed by whoever asks.
        own = knn.rescore_key_type is None and self.similarity == knn.metric
        rescore = own and knn.distances == "exact"
        return open_distributed(datastore, knn.search(self.cli.device), rescore)

    def mix(
        self, split: str, datastore: Datastore, mixed_by: dict[str, float]
    ) -> tuple[dict[str, Any], Mixture, dict[str, Any]]:
        """Mixes the model with the kNN distribution, from `--knn.cache` where it is given.

        Returns:
            the results of the model alone, those of the mixture, and how long it took.
        """
        keep_scores = bool(self.cli.config.token_scores)
        if self.knn.cache is None:
            self.give_neighbors(split)
            lm_scores, mixing = self.lm_scores(), self.search(**mixed_by, keep_scores=keep_scores)
            results = self.score(split, *lm_scores, mixing)
            self.save_scores(*(callback.table for callback in lm_scores), mixing.mixture.table)
            seconds_of = dict(mixing.seconds)
            return results, mixing.mixture, {"seconds": self.pass_seconds, "seconds_of": seconds_of}
        if keep_scores and self.neighbors is not None:
            raise InputError(
                "--token_scores of a GNN-LM cannot come from --knn.cache, which does not keep what "
                "the LM says alone; expected one of the two"
            )
        cache, seconds = self.retrieved(split, datastore, Path(self.knn.cache))
        start = time.perf_counter()
        mixture = Mixture(mixed_by["lmbda"], self.similarity, keep_scores)
        lm_scores = ScoreTable()
        for block in islice(cache, *own_part()):
            votes = votes_of_scores(block.scores, block.hits, mixed_by["temperature"])
            mixture.add(block.positions, block.lm_log_prob, votes)
            lm_scores.add(
                position=block.positions.numpy(),
                target=block.targets.numpy(),
                lm_log_prob=block.lm_log_prob.numpy(),
            )
        self.save_scores(lm_scores, mixture.table)
        seconds += time.perf_counter() - start
        how = {"seconds": seconds, "cached_k": cache.manifest["k"]}
        return dict(cache.manifest["results"]), mixture, how

    def tuned(self, datastore: Datastore) -> Tuning:
        """The best lmbda and temperature for the validation split, from one retrieval pass."""
        kept = self.knn.cache is not None
        folder = Path(self.knn.cache) if kept else self.temporary("valid", datastore)
        start = time.perf_counter()
        cache, _ = self.retrieved("valid", datastore, folder)
        tuned = tune(cache)
        self.products.seconds["tuning"] = time.perf_counter() - start
        log_tuning(tuned, self.trainer.loggers)
        self.trainer.strategy.barrier()
        if not kept and self.trainer.is_global_zero:
            shutil.rmtree(folder)
        return tuned

    def temporary(self, split: str, datastore: Datastore) -> Path:
        """Where all ranks keep what is retrieved until the command ends."""
        content = json.dumps(self.retrieved_from(split, datastore)).encode()
        return self.cli.run_dir / f"retrieved-{blake2b(content, digest_size=8).hexdigest()}"

    @property
    def similarity(self) -> str:
        """What neighbours are weighed by."""
        return self.knn.similarity or self.knn.metric

    def retrieved(
        self, split: str, datastore: Datastore, folder: Path
    ) -> tuple[RetrievalCache, float]:
        """What the search finds for a split, kept in a folder, found there again or retrieved now;
        and how many seconds that took."""
        path = folder / split.replace(":", "_")
        made_from = self.retrieved_from(split, datastore)
        sizes = {"rows": len(self.data.stream(split).tokens), "vocab_size": self.data.vocab_size}
        self.trainer = self.cli.make_trainer([], self.cli.run_dir / "evaluate")
        if RetrievalCache.is_complete(path):
            cache = RetrievalCache.open(path)
            cache.fits({**made_from, **sizes, "k": self.knn.k})
            return cache.nearest(self.knn.k), 0.0
        self.give_neighbors(split)
        builder = RetrievalCacheBuilder(path, k=self.knn.k, **sizes, made_from=made_from)
        results = self.score(split, self.search(lmbda=0.0, cache=builder))
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            builder.finish(results)
        self.trainer.strategy.barrier()
        if not RetrievalCache.is_complete(path):
            raise InputError(
                f"{path}: rank 0 has finished it, but not as this host sees it; expected a folder "
                "that all hosts share, or no --knn.lmbda auto and no --knn.cache"
            )
        return RetrievalCache.open(path), self.pass_seconds

    def retrieved_from(self, split: str, datastore: Datastore) -> dict[str, Any]:
        """What determines the content of a cache of retrieved neighbours."""
        knn, index = self.knn, resolve(datastore, self.knn.index)
        return {
            **self.products.made_from(split),
            "model": model_fingerprint(self.model),
            "neighbors": asdict(self.neighbors.settings) if self.neighbors else None,
            "datastore": fingerprint_of(datastore.whole),
            "index": [index, Path(index).stat().st_size] if is_path(index) else index,
            "seed": self.cli.config.seed_everything,
            "nprobe": knn.nprobe,
            "metric": knn.metric,
            "similarity": self.similarity,
            "distances": knn.distances,
            "missing": knn.missing,
            "rescore_key_type": knn.rescore_key_type,
        }

    def lm_scores(self) -> list[LMScores]:
        """What keeps the model's own part of `--token_scores`, if asked for."""
        return [LMScores()] if self.cli.config.token_scores else []

    def save_scores(self, *tables: ScoreTable | None) -> None:
        """Writes `--token_scores`, if asked for."""
        if self.cli.config.token_scores:
            save_scores(Path(self.cli.config.token_scores), *tables)

    def publish(self, results: dict[str, Any]) -> None:
        """Writes results.json, logs the figures and prints a table."""
        if not self.trainer.is_global_zero:
            return
        results |= {"checkpoint": str(self.cli.ckpt_path), "stage_seconds": self.seconds}
        output = Path(self.cli.config.output or self.cli.run_dir / "results.json")
        publish(results, output, self.model.updates, self.trainer.loggers)


def own_part() -> tuple[int, None, int]:
    """Which of all blocks are this rank's, as arguments of `islice`."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, None, 1
    return dist.get_rank(), None, dist.get_world_size()


@exit_with_one_sentence
def main() -> None:
    """Does the stages that the flags ask for."""
    cli = EvaluateCLI()
    evaluation = Evaluation(cli)
    if cli.config.save_datastore or cli.config.build_index:
        evaluation.make_products(cli.config.split or "train")
        if not cli.config.knnlm:
            return
    evaluation.publish(evaluation.evaluate(cli.config.split or "test"))


if __name__ == "__main__":
    main()
