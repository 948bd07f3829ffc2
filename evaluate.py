"""Perplexity of a trained model, plain or with a nearest-neighbour memory.

    python evaluate.py --config configs/<corpus>/lm.yaml --ckpt_path CKPT [--knnlm]

`--save_datastore` and `--build_index` do one stage as a job of its own.
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback
from pytorch_lightning.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from callbacks.datastore_writer import DatastoreWriter
from callbacks.index_builder import IndexBuilder
from callbacks.knn_interpolation import KNNInterpolation
from callbacks.throughput import Throughput
from callbacks.token_scores import LMScores, ScoreTable, save_scores, sum_over_ranks
from cli import ProgramCLI, check_row_length
from datamodules.lm import LMDataModule
from errors import InputError, exit_with_one_sentence
from models.checkpoint import load_model, model_fingerprint
from models.transformer_lm import TransformerLM
from retrieval.datastore import Datastore, DatastoreBuilder
from retrieval.foreign import import_datastore, is_raw
from retrieval.index import is_path, make_index, open_retriever, resolve
from retrieval.knn import Tuning, tune
from retrieval.manifest import refuse_mismatch
from retrieval.settings import KNNSettings


class EvaluateCLI(ProgramCLI):
    """The command line of evaluate.py; the model is the checkpoint's, whatever the config says."""

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
        self.model.key_width(self.knn.key_type)
        config = self.config.clone()
        config.pop("model")
        self.config_init = self.parser.instantiate(config)
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
        self.model: TransformerLM = cli.model
        self.log_dir = cli.run_dir / "evaluate"
        self.seconds: dict[str, float] = {}
        self.check_dictionary()
        if cli.config.split is not None:
            self.data.stream(cli.config.split)

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

    # -- datastore and index ---------------------------------------------------------------------

    def datastore_path(self, split: str) -> Path:
        """`--knn.datastore`, else datastores/<corpus>/<split>[-<key type>]."""
        if self.knn.datastore is not None:
            return Path(self.knn.datastore)
        suffix = "" if self.knn.key_type == "last_ffn_input" else f"-{self.knn.key_type}"
        name = f"{split}{suffix}".replace(":", "_")
        return Path("datastores") / self.cli.corpus_name / name

    def expected_of_datastore(self) -> dict[str, Any]:
        """What any datastore must have been made from to be searched with this model."""
        return {
            "model": model_fingerprint(self.model),
            "dictionary": self.data.dictionary.fingerprint,
            "key_type": self.knn.key_type,
        }

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
            "precision": str(self.cli.config.trainer.precision or "32-true"),
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
        datastore = Datastore.open(path)
        if "raw" in datastore.manifest:
            return self.check_raw(datastore)
        made_from = datastore.manifest["made_from"]
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
            Path("datastores") / self.cli.corpus_name / f"imported-{source.name}",
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
        rows = self.data.rows(split, self.data.context_window)
        n_tokens = len(self.data.stream(split).tokens)
        masked = (rows.behind_less_context(self.knn.min_context), rows.dropped(n_tokens))
        builder = DatastoreBuilder(
            self.datastore_path(split),
            rows=n_tokens,
            dim=self.model.key_width(self.knn.key_type),
            dtype=self.knn.dtype,
            vocab_size=self.data.vocab_size,
            made_from=self.made_from(split),
            masked=np.sort(np.concatenate(masked)),
        )
        before = builder.n_written
        if before > len(builder.masked):
            print(f"{builder.path}: {before} of {len(builder.written)} rows are written; going on")
        self.model.key_type = self.knn.key_type
        loader = self.data.evaluation_dataloader(split, skip=builder.is_written)
        writer, throughput = DatastoreWriter(builder), Throughput()
        trainer = self.cli.make_trainer([writer, throughput, *after], self.log_dir)
        trainer.predict(self.model, loader, return_predictions=False)
        self.seconds["datastore"] = throughput.seconds
        return Datastore.open(builder.path)

    def ensure_datastore_and_index(self, split: str) -> Datastore:
        """Makes what is missing of a datastore and its index."""
        existing = self.open_fitting_datastore(split)
        builder = IndexBuilder(
            self.datastore_path(split) if existing is None else existing.path,
            self.knn.index,
            self.knn.metric,
            self.cli.config.seed_everything,
        )
        datastore = self.ensure_datastore(split, builder)
        builder.build()
        self.seconds |= {f"index_{stage}": s for stage, s in builder.seconds.items()}
        return datastore

    def check_search(self, split: str) -> None:
        """Everything about the search that can be wrong, before any long work."""
        existing = self.open_fitting_datastore("train")
        where = self.datastore_path("train")
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
            self.check_index()

    def check_index(self) -> None:
        """Refuses a factory string that faiss does not know."""
        if self.knn.index not in ("auto", "flat") and not is_path(self.knn.index):
            make_index(self.model.key_width(self.knn.key_type), self.knn.index, self.knn.metric)

    def make_products(self, split: str) -> None:
        """`--save_datastore` and `--build_index`: what they ask for and no more."""
        if not self.cli.config.save_datastore and self.open_fitting_datastore(split) is None:
            raise InputError(
                f"{self.datastore_path(split)}: no complete datastore to index; "
                "--save_datastore makes it"
            )
        if self.cli.config.build_index:
            self.check_index()
            datastore = self.ensure_datastore_and_index(split)
            print(f"index: {resolve(datastore, self.knn.index)}")
        else:
            datastore = self.ensure_datastore(split)
        print(f"datastore: {datastore.path}, {len(datastore)} keys of width {datastore.dim}")

    # -- scores ----------------------------------------------------------------------------------

    def score(self, split: str, *callbacks) -> dict[str, Any]:
        """One pass over a split: its loss and times, the model's alone where kNN runs beside it."""
        throughput = Throughput()
        trainer = self.cli.make_trainer([throughput, *callbacks], self.log_dir)
        trainer.test(self.model, self.data.evaluation_dataloader(split), verbose=False)
        total = self.model.test_loss.compute()
        tokens = int(total["tokens"])
        searching = any(isinstance(callback, KNNInterpolation) for callback in callbacks)
        seconds = throughput.model_seconds if searching else throughput.seconds
        self.trainer, self.pass_seconds = trainer, throughput.seconds
        return {
            "split": split,
            "tokens": tokens,
            **figures(total["loss"].item(), tokens, seconds),
        }

    def evaluate(self, split: str) -> dict[str, Any]:
        """LM perplexity of a split and, with `--knnlm`, the mixture's."""
        lm_scores = [LMScores()] if self.cli.config.token_scores else []
        if not self.cli.config.knnlm:
            self.model.key_type = None
            results = self.score(split, *lm_scores)
            self.save_scores(*(callback.table for callback in lm_scores))
            return results
        self.check_search(split)
        datastore = self.ensure_datastore_and_index("train")
        retriever = open_retriever(datastore, self.knn.index, self.knn.metric, self.knn.nprobe)
        self.model.key_type = self.knn.key_type
        knn = self.knn

        def interpolation(**kwargs) -> KNNInterpolation:
            return KNNInterpolation(
                datastore,
                retriever,
                knn.k,
                distances=knn.distances,
                similarity=knn.similarity,
                missing=knn.missing,
                **kwargs,
            )

        tuned = None
        if knn.lmbda == "auto":
            collecting = interpolation(lmbda=0.0, keep_retrieved=True)
            self.score("valid", collecting)
            start = time.perf_counter()
            tuned = tune(*collecting.retrieved(), sum_over_ranks)
            self.seconds["tuning"] = self.pass_seconds + time.perf_counter() - start
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
        split, knn = results["split"], results.get("knn")
        logged = {f"{split}/loss": results["loss"], f"{split}/ppl": results["ppl"]}
        table = Table("", "perplexity", "nats / token", "tokens / s", title=f"{split} split")
        rows = [("LM", results)]
        if knn:
            names = ("loss", "ppl", "lmbda", "temperature", "nearest_distance")
            names += ("kth_distance", "target_among_neighbors")
            logged |= {f"{split}/knn/{name}": knn[name] for name in names}
            rows += [(f"kNN-LM (lmbda {knn['lmbda']:g}, temperature {knn['temperature']:g})", knn)]
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
