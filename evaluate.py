"""Perplexity of a trained model, plain or with a nearest-neighbour memory.

    python evaluate.py --config configs/<corpus>/lm.yaml --ckpt_path CKPT [--knnlm]

`--save_datastore` and `--build_index` do one stage as a job of its own.
"""

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pytorch_lightning.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from callbacks.knn_interpolation import KNNInterpolation
from callbacks.throughput import Throughput
from callbacks.token_scores import LMScores, ScoreTable, save_scores, sum_over_ranks
from cli import ProgramCLI, check_row_length
from datamodules.lm import LMDataModule
from errors import InputError, exit_with_one_sentence
from models.checkpoint import load_model
from models.gnn_lm import GNNLM
from models.language_model import LanguageModel
from products import NeighborProducts, Products
from retrieval.datastore import Datastore
from retrieval.index import is_path, open_retriever, resolve
from retrieval.knn import Tuning, tune
from retrieval.settings import KNNSettings, NeighborSettings


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
        cli.make_trainer([], cli.run_dir / "evaluate")  # refuses what it cannot do before any work
        self.check_dictionary()
        if cli.config.split is not None:
            self.data.stream(cli.config.split)
        if isinstance(self.model, GNNLM):
            settings = NeighborSettings(**cli.config.neighbors.as_dict())
            self.neighbors = NeighborProducts(cli, self.data, self.model, settings)
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
        existing = self.products.open_fitting_datastore("train")
        where = self.products.datastore_path("train")
        if existing is None:
            stored, n_keys = self.data.fingerprint("train"), len(self.data.stream("train").tokens)
        else:
            stored, n_keys = existing.manifest["made_from"].get("corpus"), existing.n_keys
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
            open_retriever(existing, self.knn.index, self.knn.metric, self.knn.nprobe)
        else:
            self.products.check_index()

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
        settings = asdict(self.neighbors.settings)
        return results | figures(lm_loss, tokens, seconds) | {"gnn": own | settings}

    def evaluate(self, split: str) -> dict[str, Any]:
        """The model's perplexity on a split and, with `--knnlm`, the mixture's."""
        lm_scores = [LMScores()] if self.cli.config.token_scores else []
        if not self.cli.config.knnlm:
            self.give_neighbors(split)
            self.model.key_type = None
            results = self.score(split, *lm_scores)
            self.save_scores(*(callback.table for callback in lm_scores))
            return results
        self.check_search(split)
        if self.gnn_keys and self.products.open_fitting_datastore("train") is None:
            self.give_neighbors("train")
        datastore = self.products.ensure_datastore_and_index("train")
        rescoring = self.ensure_rescoring()
        self.give_neighbors(split, *(["valid"] if self.knn.lmbda == "auto" else []))
        retriever = open_retriever(datastore, self.knn.index, self.knn.metric, self.knn.nprobe)
        knn = self.knn
        self.model.key_type, self.model.rescoring_key_type = knn.key_type, knn.rescore_key_type

        def interpolation(**kwargs) -> KNNInterpolation:
            return KNNInterpolation(
                datastore,
                retriever,
                knn.k,
                distances=knn.distances,
                similarity=knn.similarity,
                missing=knn.missing,
                rescoring=rescoring,
                **kwargs,
            )

        tuned = None
        if knn.lmbda == "auto":
            collecting = interpolation(lmbda=0.0, keep_retrieved=True)
            self.score("valid", collecting)
            start = time.perf_counter()
            tuned = tune(*collecting.retrieved(), sum_over_ranks)
            self.products.seconds["tuning"] = self.pass_seconds + time.perf_counter() - start
            self.log_tuning(tuned)
        lmbda = tuned.lmbda if tuned else knn.lmbda
        temperature = tuned.temperature if tuned else knn.temperature
        mixing = interpolation(
            lmbda=lmbda, temperature=temperature, keep_scores=bool(self.cli.config.token_scores)
        )
        results = self.score(split, *lm_scores, mixing)
        self.save_scores(*(c.table for c in (*lm_scores, mixing) if c.table is not None))
        results["knn"] = {
            "tokens": results["tokens"],
            **figures(mixing.loss.compute()["loss"].item(), results["tokens"], self.pass_seconds),
            **asdict(knn),
            "index": resolve(datastore, knn.index),
            "lmbda": lmbda,
            "temperature": temperature,
            "tuned": tuned is not None,
            "datastore": str(datastore.path),
            "datastore_rows": len(datastore),
            **mixing.statistics(),
            "seconds_of": dict(mixing.seconds),
        }
        return results

    def save_scores(self, *tables: ScoreTable) -> None:
        """Writes `--token_scores`, if asked for."""
        if self.cli.config.token_scores:
            save_scores(Path(self.cli.config.token_scores), *tables)

    # -- what the user sees ----------------------------------------------------------------------

    def log_tuning(self, tuned: Tuning) -> None:
        """The tuning as two curves: validation perplexity over lmbda (in per cent) at the best
        temperature, and over log2 of the temperature (in quarters) at the best lmbda."""
        row = int(tuned.losses.min(axis=1).argmin())
        column = int(tuned.losses[row].argmin())
        for lmbda, loss in zip(tuned.lmbdas, tuned.losses[row], strict=True):
            self.log({"tuning/valid_ppl_over_lmbda_percent": math.exp(loss)}, round(100 * lmbda))
        for temperature, loss in zip(tuned.temperatures, tuned.losses[:, column], strict=True):
            step = round(4 * math.log2(temperature)) + 200
            self.log({"tuning/valid_ppl_over_4_log2_temperature_plus_200": math.exp(loss)}, step)

    def log(self, figures: dict[str, float], step: int) -> None:
        """To TensorBoard, or whatever logger the trainer has."""
        for logger in self.trainer.loggers:
            logger.log_metrics(figures, step)

    def publish(self, results: dict[str, Any]) -> None:
        """Writes results.json, logs the figures and prints a table."""
        if not self.trainer.is_global_zero:
            return
        results |= {"checkpoint": str(self.cli.ckpt_path), "stage_seconds": self.seconds}
        output = Path(self.cli.config.output or self.cli.run_dir / "results.json")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
        split, gnn, knn = results["split"], results.get("gnn"), results.get("knn")
        logged = {f"{split}/loss": results["loss"], f"{split}/ppl": results["ppl"]}
        table = Table("", "perplexity", "nats / token", "tokens / s", title=f"{split} split")
        rows = [("LM", results)]
        if gnn:
            logged |= {f"{split}/gnn/{name}": gnn[name] for name in ("loss", "ppl")}
            rows += [("GNN-LM", gnn)]
        if knn:
            names = ("loss", "ppl", "lmbda", "temperature", "nearest_distance")
            names += ("kth_distance", "target_among_neighbors")
            logged |= {f"{split}/knn/{name}": knn[name] for name in names}
            name = "GNN-LM + kNN" if gnn else "kNN-LM"
            rows += [(f"{name} (lmbda {knn['lmbda']:g}, temperature {knn['temperature']:g})", knn)]
        self.log(logged, self.model.updates)
        for logger in self.trainer.loggers:
            logger.finalize("success")
        for name, r in rows:
            table.add_row(
                name, f"{r['ppl']:.2f}", f"{r['loss']:.4f}", f"{r['tokens_per_second']:.0f}"
            )
        Console().print(table, f"results: {output}")


def figures(loss: float, tokens: int, seconds: float) -> dict[str, float]:
    """The figures that every way of predicting is reported by."""
    ppl = math.exp(loss) if loss < 700 else math.inf
    rate = tokens / seconds if seconds else math.inf
    return {"loss": loss, "ppl": ppl, "seconds": seconds, "tokens_per_second": rate}


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
