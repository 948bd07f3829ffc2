"""Perplexity of a trained model, plain or mixed with memories.

`evaluate` takes a model, a corpus and a run, makes what is missing of the memories, and returns the
figures.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from pytorch_lightning import Callback, Trainer

from neighborlm.callbacks.interpolation import Interpolation
from neighborlm.callbacks.tally import Tally
from neighborlm.callbacks.throughput import Throughput
from neighborlm.callbacks.token_scores import LMScores
from neighborlm.common.contracts import (
    LanguageModel,
    Memory,
    Mixer,
    Retriever,
    Scored,
    Want,
)
from neighborlm.common.errors import InputError
from neighborlm.common.files import digest_of
from neighborlm.datamodules.lm import LMDataModule
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.scorer import Scorer
from neighborlm.programs.places import check_writable
from neighborlm.programs.products import NeighborProducts, Products
from neighborlm.programs.reports import figures, log_tuning
from neighborlm.programs.run import Run
from neighborlm.programs.settings import KNNSettings, MemorySettings, NeighborSettings
from neighborlm.retrieval.cluster.distributed import open_distributed
from neighborlm.retrieval.memories import MEMORIES, MIXERS, ConstantMixer, KNNMemory
from neighborlm.retrieval.memories.cache import RetrievalCache, RetrievalCacheBuilder
from neighborlm.retrieval.memories.fitted import FittedOn, load_mixer, save_mixer
from neighborlm.retrieval.memories.knn_memory import opinion_from_cache
from neighborlm.retrieval.memories.text_order import lines_are_shuffled
from neighborlm.retrieval.memories.tuning import Tuning, tune
from neighborlm.retrieval.search import open_retriever
from neighborlm.retrieval.search.index import is_path, resolve
from neighborlm.retrieval.store.datastore import Datastore, fingerprint_of


@dataclass
class Subject:
    """What is evaluated.

    Attributes:
        model: trained.
        data: the corpus.
        run: how Lightning evaluates, and where files go.
        neighbors: what a GNN-LM reads besides the text; None for other models.
    """

    model: LanguageModel
    data: LMDataModule
    run: Run
    neighbors: NeighborProducts | None = None

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        data: LMDataModule,
        run: Run,
        neighbors: NeighborSettings | None = None,
        checkpoint: Path | str | None = None,
    ) -> "Subject":
        """What of these belongs together.

        Args:
            neighbors: what a GNN-LM is to see of its neighbours; by default as trained.
            checkpoint: of the model, for messages.

        Raises:
            InputError: the model was trained with another dictionary than the corpus has.
        """
        check_dictionary(model, data, checkpoint)
        products = None
        if isinstance(model, GNNLM):
            settings = neighbors or NeighborSettings()
            products = NeighborProducts(run, data, model, settings, "online", checkpoint)
        return cls(model, data, run, products)

    def keyed(self, key_type: str) -> LanguageModel:
        """The model whose feature a key type is: keys of an LM are those that it makes alone."""
        return self.model if self.neighbors is None or key_type == "gnn" else self.model.lm

    def give_neighbors(self, *splits: str) -> None:
        """Makes what a GNN-LM reads besides the text of some splits."""
        if self.neighbors is not None:
            self.neighbors.attach(*splits)

    def products(self, knn: KNNSettings) -> Products:
        """The datastores of its keys and their indexes."""
        shown = None if self.neighbors is None else self.neighbors.given
        return Products(self.run, self.data, self.keyed(knn.key_type), knn, shown=shown)


def check_dictionary(
    model: LanguageModel, data: LMDataModule, checkpoint: Path | str | None
) -> None:
    """Refuses a model that was trained with another dictionary than the corpus has."""
    expected = getattr(model, "dictionary_fingerprint", None)
    found = data.dictionary.fingerprint
    if model.vocab_size != data.vocab_size or expected not in (None, found):
        raise InputError(
            f"{checkpoint or 'the model'}: was trained with a dictionary of {model.vocab_size} "
            f"symbols ({expected}), but {data.settings.corpus} gives one of {data.vocab_size} "
            f"({found}); pass the training run's dict.txt as --data.dictionary"
        )


# -- one pass ------------------------------------------------------------------------------------


PLAIN = Want()
"""Log-probabilities alone."""


@dataclass(frozen=True)
class Pass:
    """One pass over a split.

    Attributes:
        results: `split`, `tokens` and the figures of the LM, and under `gnn` those of a graph
            network on top of it.
        seconds: wall time.
        trainer: that made it.
    """

    results: dict[str, Any]
    seconds: float
    trainer: Trainer


def score(
    subject: Subject, split: str, want: Want = PLAIN, callbacks: Sequence[Callback] = ()
) -> Pass:
    """Scores every token of a split once.

    Times are those of the whole pass, or of the model's steps alone where memories are asked beside
    it. Where Lightning is told to leave out batches, those that are scored are the first of the
    text.

    Raises:
        InputError: it is told to leave out all.
    """
    subject.give_neighbors(split)
    throughput, scorer = Throughput(), Scorer(subject.model, want)
    trainer = subject.run.trainer([throughput, *callbacks])
    asking = [callback for callback in callbacks if isinstance(callback, Interpolation)]
    in_order = subject.run.evaluates_part
    in_order |= any(memory.in_order for callback in asking for memory in callback.memories.values())
    loader = subject.data.evaluation_dataloader(split, in_text_order=in_order)
    trainer.test(scorer, loader, verbose=False)
    total = scorer.test_loss.compute()
    tokens = int(total["tokens"])
    if tokens == 0:
        raise InputError(
            f"--trainer.limit_test_batches leaves no token of the {split} split; expected a batch "
            "at least"
        )
    seconds = throughput.model_seconds if asking else throughput.seconds
    results = {"split": split, "tokens": tokens}
    own = figures(total["loss"].item(), tokens, seconds)
    if subject.neighbors is None:
        return Pass(results | own, throughput.seconds, trainer)
    lm_loss = scorer.lm_loss.compute()["loss"].item()
    of_network = own | asdict(subject.neighbors.settings)
    if subject.neighbors.exchange is not None:
        of_network["communication"] = subject.neighbors.exchange.communication
    results |= figures(lm_loss, tokens, seconds) | {"gnn": of_network}
    return Pass(results, throughput.seconds, trainer)


# -- what memories are made of -------------------------------------------------------------------


class MadeOnDemand:
    """The `Resources` of memories: whatever is missing is made when it is asked for.

    Args:
        subject: what is evaluated.
        settings: of the memories; a temperature that is to be tuned is 1 until it is.

    Attributes:
        products: the datastores, and how long each stage took that was not done before.
    """

    def __init__(self, subject: Subject, settings: MemorySettings) -> None:
        self.subject = subject
        self.settings = settings
        if settings.knn.temperature == "auto":
            self.mix_by(temperature=1.0)
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
        return self.products.root / name

    def datastore(self) -> Datastore:
        """See `Resources`."""
        return self._datastore

    @cached_property
    def _datastore(self) -> Datastore:
        missing = self.products.open_fitting_datastore("train") is None
        if self.knn.key_type == "gnn" and missing:
            self.subject.give_neighbors("train")
        return self.products.ensure_datastore_and_index("train")

    def retriever(self) -> Retriever:
        """See `Resources`."""
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
        products = self.subject.products(replace(self.knn, key_type=key_type, datastore=None))
        if key_type == "gnn" and products.open_fitting_datastore("train") is None:
            self.subject.give_neighbors("train")
        return products.ensure_datastore("train")


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
        raise InputError(f"--knn.k is {knn.k}, but {where} has only {n_keys} keys")
    if is_path(knn.index):
        if existing is None:
            raise InputError(
                f"--knn.index {knn.index} is a file, but its datastore {where} is missing"
            )
        open_retriever(existing, knn.search(subject.run.device))
    else:
        products.check_index()


def check_cache(subject: Subject, knn: KNNSettings, splits: Sequence[str]) -> None:
    """Refuses a `--knn.cache` that keeps a part of a split where all of it is wanted, and one that
    is missing where it cannot be written."""
    for split in splits if knn.cache is not None else ():
        path = cache_path(Path(knn.cache), split)
        if not RetrievalCache.is_complete(path):
            check_writable(path, "--knn.cache", "folder")
            continue
        kept, whole = RetrievalCache.open(path).n_scored, tokens_of(subject.data, split)
        if kept < whole and not subject.run.evaluates_part:
            raise InputError(
                f"--knn.cache {path}: keeps the first {kept} of {whole} tokens, as it was made "
                "with --trainer.limit_test_batches or --trainer.fast_dev_run; remove it, or choose "
                "another place"
            )


def cache_path(folder: Path, split: str) -> Path:
    """Where what is retrieved for a split is kept."""
    return folder / split.replace(":", "_")


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


# -- the evaluation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluated:
    """What came of an evaluation.

    Attributes:
        results: JSON-able: `split`, which `part` of it where that is not all, its `unit` (`word`,
            `char` or `byte`), the `window` that rows are read in, `tokens` and the figures of the
            LM; under `gnn` those of a graph network on top of it, and under `knn` (the one memory)
            or `mixture` those with memories.
        seconds: of each stage that was not done before.
        trainer: of the last pass.
        memories: that were asked, by name.
        mixer: that weighed them.
        scores: of every token in the order of the text, the columns of `Tally.table`; None where
            they were not kept.
    """

    results: dict[str, Any]
    seconds: dict[str, float]
    trainer: Trainer
    memories: dict[str, Memory] = field(default_factory=dict)
    mixer: Mixer | None = None
    scores: dict[str, np.ndarray] | None = None


def evaluate(
    subject: Subject,
    split: str = "test",
    memories: Sequence[str] = (),
    mixer: str = "constant",
    settings: MemorySettings | None = None,
    keep_scores: bool = False,
) -> Evaluated:
    """The perplexity of a model on a split, and with memories the mixture's.

    Args:
        subject: what is evaluated.
        split: of the corpus.
        memories: names of `MEMORIES`; none for the model alone.
        mixer: a name of `MIXERS`.
        settings: of the memories.
        keep_scores: keep every token's log-probabilities.

    Raises:
        InputError: something does not fit together; before any long work.
    """
    settings = settings or MemorySettings()
    settings.check()
    subject.data.stream(split)
    if memories:
        evaluated = evaluate_with_memories(subject, split, memories, mixer, settings, keep_scores)
    else:
        evaluated = evaluate_alone(subject, split, keep_scores)
    tokens, whole = evaluated.results["tokens"], tokens_of(subject.data, split)
    part = {"part": f"first {tokens} of {whole} tokens"} if tokens < whole else {}
    return replace(evaluated, results=measure_of(subject.data) | part | evaluated.results)


def tokens_of(data: LMDataModule, split: str) -> int:
    """How many tokens of a split are scored."""
    rows = data.rows(split, data.context_window)
    return int((rows.ends - rows.starts).sum())


def measure_of(data: LMDataModule) -> dict[str, Any]:
    """What figures of a corpus are figures of: a token's level, and the rows that it is read in."""
    window = ("tokens_per_sample", "context_window", "break_mode")
    return {"unit": data.settings.level, "window": {name: getattr(data, name) for name in window}}


def evaluate_alone(subject: Subject, split: str, keep_scores: bool) -> Evaluated:
    """The model without memories."""
    lm_scores = LMScores()
    alone = score(subject, split, callbacks=[lm_scores] if keep_scores else [])
    scores = lm_scores.table.gathered() if keep_scores else None
    return Evaluated(alone.results, seconds_of(subject), alone.trainer, scores=scores)


def evaluate_with_memories(
    subject: Subject,
    split: str,
    memories: Sequence[str],
    mixer: str,
    settings: MemorySettings,
    keep_scores: bool,
) -> Evaluated:
    """The model and its mixture with memories."""
    check_names(memories, mixer)
    check_mixing(memories, mixer, settings.knn)
    given = tuple(memories) == ("knn",) and mixer == "constant" and settings.knn.lmbda != "auto"
    if {"knn", "automaton"} & set(memories):
        splits = [split] if given else sorted({split, "valid"})
        check_search(subject, settings.knn, splits)
        check_cache(subject, settings.knn, splits)
    resources = MadeOnDemand(subject, settings)
    if tuple(memories) == ("knn",) and mixer == "constant":
        return evaluate_knn(subject, split, resources, keep_scores)
    if mixer in MIXERS:
        weighing = MIXERS[mixer]()
        if weighing.needs_fitting and split == "valid":
            raise InputError("--split valid: is what the mixer is fitted on; expected another")
    else:
        text, model = subject.data.fingerprint(split), subject.model.fingerprint
        remembered = identities(subject, memories, settings)
        weighing, _ = load_mixer(Path(mixer), MIXERS, text, model, remembered)
    if settings.knn.temperature == "auto" and {"knn", "automaton"} & set(memories):
        resources.mix_by(temperature=tuned_knn(subject, resources).temperature)
    kept = keep_mixer(subject, memories, mixer, settings) if mixer in MIXERS else None
    return evaluate_mixture(subject, split, memories, weighing, resources, keep_scores, kept)


def identities(subject: Subject, names: Sequence[str], settings: MemorySettings) -> dict[str, str]:
    """By memory, what identifies what it remembers and how it is set: weights that were fitted
    beside it fit no other."""
    knn = {name: value for name, value in asdict(settings.knn).items() if name not in PLACES}
    sections = {"knn": [knn], "automaton": [knn, asdict(settings.automaton)]}
    sections["recent"] = [asdict(settings.recent)]
    remembered = subject.data.fingerprint("train")
    return {name: digest_of(json.dumps([remembered, sections.get(name)])) for name in names}


def keep_mixer(
    subject: Subject, names: Sequence[str], mixer: str, settings: MemorySettings
) -> Callable[[Mixer], Path]:
    """What keeps a fitted mixer in the run's directory, where `--mixer FILE` finds it."""
    path = subject.run.directory / "mixers" / f"{mixer}-{'+'.join(names)}.npz"
    text, model = subject.data.fingerprint("valid"), subject.model.fingerprint
    fitted_on = FittedOn("valid", text, model, identities(subject, names, settings))

    def keep(fitted: Mixer) -> Path:
        save_mixer(path, mixer, fitted, fitted_on)
        return path

    return keep


PLACES = ("datastore", "cache", "shards", "placement", "shard")
"""Settings of a datastore that change no vote."""


def check_names(memories: Sequence[str], mixer: str) -> None:
    """Refuses unknown memories and mixers, and a memory that is named twice."""
    for name in memories:
        if name not in MEMORIES:
            known = ", ".join(MEMORIES)
            raise InputError(f"--memories: {name} is no memory; expected some of {known}")
    if len(set(memories)) < len(memories):
        raise InputError(f"--memories are {','.join(memories)}; expected each once")
    if mixer not in MIXERS and Path(mixer).suffix != ".npz":
        known = ", ".join(MIXERS)
        raise InputError(f"--mixer is {mixer}; expected one of {known}, or a fitted one's .npz")


def check_mixing(memories: Sequence[str], mixer: str, knn: KNNSettings) -> None:
    """Refuses weights and temperatures that something else decides on."""
    alone = tuple(memories) == ("knn",) and mixer == "constant"
    if alone and knn.lmbda == "auto" and knn.temperature != "auto":
        raise InputError(
            f"--knn.temperature {knn.temperature}: has no effect with --knn.lmbda auto, which "
            "tunes both; expected a number as --knn.lmbda too, or no such flag"
        )
    if not alone and knn.cache is not None:
        raise InputError(
            f"--knn.cache {knn.cache}: keeps what the memory knn alone retrieves; expected no such "
            f"flag with --memories {','.join(memories)} and --mixer {mixer}"
        )
    if not alone and knn.lmbda != "auto":
        raise InputError(
            f"--knn.lmbda {knn.lmbda}: has no effect with --memories {','.join(memories)} and "
            f"--mixer {mixer}, which weighs them; expected no such flag"
        )


def seconds_of(subject: Subject, *products: Products) -> dict[str, float]:
    """How long each stage took that was not done before."""
    own = subject.neighbors.seconds if subject.neighbors else {}
    return {name: s for of in (own, *(p.seconds for p in products)) for name, s in of.items()}


def evaluate_mixture(
    subject: Subject,
    split: str,
    names: Sequence[str],
    mixer: Mixer,
    resources: MadeOnDemand,
    keep_scores: bool,
    keep: Callable[[Mixer], Path] | None = None,
) -> Evaluated:
    """A mixture of any memories, weighed by a mixer that is fitted on the validation split unless
    it was before.

    Args:
        keep: writes the mixer to a file once it is fitted.
    """
    memories = {name: MEMORIES[name](resources) for name in names}
    check_order(subject, memories)
    stream = subject.data.stream(split)
    if "recent" in names and lines_are_shuffled(stream.tokens, stream.line_starts):
        print(
            f"--memories recent: the lines of the {split} split have no more rare words in common "
            "with the next line than with any other, as if they were shuffled; the running text "
            "has little to remember"
        )
    mixing = Interpolation(memories, mixer, resources.tokens(split), keep_scores)
    described = {"memories": list(names), "mixer": type(mixer).__name__}
    untuned = [name for name, memory in memories.items() if getattr(memory, "needs_tuning", False)]
    if mixer.needs_fitting or untuned:
        hearing = Interpolation(memories, None, resources.tokens("valid"), keep_scores=True)
        heard = score(subject, "valid", mixing.want, [hearing])
        opinions = hearing.tally.opinions(names)
        opinions |= {name: memories[name].tune() for name in untuned}
        if mixer.needs_fitting:
            mixer.fit(opinions)
            if keep is not None and mixer.state() and heard.trainer.is_global_zero:
                described["mixer_file"] = str(keep(mixer))
    made = score(subject, split, mixing.want, [mixing])
    if {"knn", "automaton"} & set(names):
        described["knn_temperature"] = resources.knn.temperature
    results = {"mixture": described | mixed_figures(mixing.tally, made) | seconds_in(mixing)}
    seconds = seconds_of(subject, resources.products)
    scores = mixing.tally.table.gathered() if keep_scores else None
    return Evaluated(made.results | results, seconds, made.trainer, memories, mixer, scores)


def check_order(subject: Subject, memories: Mapping[str, Memory]) -> None:
    """Refuses several ranks where tokens must come in the order of the text."""
    ranks = subject.run.trainer().world_size
    for name, memory in memories.items():
        if memory.in_order and ranks > 1:
            raise InputError(
                f"--memories {name}: reads tokens in the order of the text, but {ranks} ranks "
                "share them out; expected --trainer.devices 1"
            )


def mixed_figures(tally: Tally, made: Pass) -> dict[str, Any]:
    """Figures of the mixture of a pass."""
    tokens, loss = made.results["tokens"], tally.loss.compute()["loss"].item()
    return {"tokens": tokens, **figures(loss, tokens, made.seconds), **tally.statistics()}


def seconds_in(mixing: Interpolation) -> dict[str, dict[str, float]]:
    """What the time of a pass with memories was spent on."""
    seconds, alone = dict(mixing.seconds), len(mixing.memories) == 1
    for name, memory in mixing.memories.items():
        for what, spent in getattr(memory, "seconds", {}).items():
            seconds[what if alone else f"{name}.{what}"] = spent
    return {"seconds_of": seconds}


# -- kNN-LM --------------------------------------------------------------------------------------


def evaluate_knn(
    subject: Subject, split: str, resources: MadeOnDemand, keep_scores: bool
) -> Evaluated:
    """kNN-LM, or a GNN-LM with the same memory: one weight for all tokens, given or tuned with the
    temperature; from `--knn.cache` where that is given, so that no model and no search is needed.
    """
    knn = resources.knn
    tuned = tuned_knn(subject, resources) if knn.lmbda == "auto" else None
    mixed_by = {
        "lmbda": tuned.lmbda if tuned else knn.lmbda,
        "temperature": tuned.temperature if tuned else knn.temperature,
    }
    resources.mix_by(**mixed_by)
    memory = KNNMemory.of(resources)
    mixer = ConstantMixer((1 - mixed_by["lmbda"], mixed_by["lmbda"]))
    if knn.cache is None:
        mixing = Interpolation({"knn": memory}, mixer, resources.tokens(split), keep_scores)
        made = score(subject, split, memory.want, [mixing])
        tally, how = mixing.tally, seconds_in(mixing)
    else:
        made, tally, how = mixed_from_cache(subject, split, resources, mixer, keep_scores)
    figures_of_knn = mixed_figures(tally, made)
    for ours, reported in REPORTED.items():
        figures_of_knn[reported] = figures_of_knn.pop(f"knn.{ours}", float("nan"))
    datastore = resources.datastore()
    described = {
        **asdict(knn),
        "index": resolve(datastore, knn.index),
        **mixed_by,
        "tuned": tuned is not None,
        "datastore": str(datastore.path),
        "datastore_rows": datastore.whole["rows"],
    }
    communication = memory.retriever.communication
    if communication:
        how["communication"] = dict(communication)
    results = made.results | {"knn": figures_of_knn | described | how}
    seconds = seconds_of(subject, resources.products)
    scores = tally.table.gathered() if keep_scores else None
    return Evaluated(results, seconds, made.trainer, {"knn": memory}, mixer, scores)


REPORTED = {
    "nearest_distance": "nearest_distance",
    "kth_distance": "kth_distance",
    "has_target": "target_among_neighbors",
}
"""What results call the means of the memory knn."""


def mixed_from_cache(
    subject: Subject,
    split: str,
    resources: MadeOnDemand,
    mixer: ConstantMixer,
    keep_scores: bool,
) -> tuple[Pass, Tally, dict[str, Any]]:
    """A pass over what `--knn.cache` keeps, retrieved first where it is missing."""
    if keep_scores and subject.neighbors is not None:
        raise InputError(
            "--token_scores of a GNN-LM cannot come from --knn.cache, which does not keep what the "
            "LM says alone; expected one of the two"
        )
    knn = resources.knn
    cache, made = retrieved(subject, split, resources, Path(knn.cache))
    start = time.perf_counter()
    tally = Tally(keep_scores)
    for block in islice(cache, *own_part()):
        opinion = opinion_from_cache(block, knn.temperature, knn.similarity or knn.metric)
        asked = Scored(block.positions, block.targets, block.lm_log_prob)
        log_probs = (asked.log_probs.double(), opinion.log_probs.double())
        tally.add(asked, {"knn": opinion}, mixer.mixed(log_probs))
    seconds = made.seconds + time.perf_counter() - start
    how = {"cached_k": cache.manifest["k"]}
    return Pass(dict(cache.manifest["results"]), seconds, made.trainer), tally, how


def own_part() -> tuple[int, None, int]:
    """Which of all blocks are this rank's, as arguments of `islice`."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, None, 1
    return dist.get_rank(), None, dist.get_world_size()


def tuned_knn(subject: Subject, resources: MadeOnDemand) -> Tuning:
    """The best lmbda and temperature for the validation split, from one retrieval pass."""
    knn, kept = resources.knn, resources.knn.cache is not None
    folder = Path(knn.cache) if kept else temporary_folder(subject, resources, "valid")
    start = time.perf_counter()
    cache, made = retrieved(subject, "valid", resources, folder)
    tuned = tune(cache)
    resources.products.seconds["tuning"] = time.perf_counter() - start
    log_tuning(tuned, made.trainer.loggers)
    made.trainer.strategy.barrier()
    if not kept and made.trainer.is_global_zero:
        shutil.rmtree(folder)
    return tuned


def temporary_folder(subject: Subject, resources: MadeOnDemand, split: str) -> Path:
    """Where all ranks keep what is retrieved until the command ends."""
    content = [retrieved_from(subject, split, resources), subject.run.evaluates_part]
    name = f"retrieved-{digest_of(json.dumps(content))}"
    return subject.run.directory / name


def retrieved(
    subject: Subject, split: str, resources: MadeOnDemand, folder: Path
) -> tuple[RetrievalCache, Pass]:
    """What the search finds for a split, kept in a folder, found there again or retrieved now; and
    the pass that retrieved it, which took no time where it was there."""
    knn, data = resources.knn, subject.data
    path = cache_path(folder, split)
    made_from = retrieved_from(subject, split, resources)
    sizes = {"rows": len(data.stream(split).tokens), "vocab_size": data.vocab_size}
    if RetrievalCache.is_complete(path):
        cache = RetrievalCache.open(path)
        cache.fits({**made_from, **sizes, "k": knn.k})
        made = Pass(dict(cache.manifest["results"]), 0.0, subject.run.trainer())
        return cache.nearest(knn.k), made
    subject.give_neighbors(split)
    builder = RetrievalCacheBuilder(path, k=knn.k, **sizes, made_from=made_from)
    memory = KNNMemory.of(resources)
    memory.cache = builder
    keeping = Interpolation({"knn": memory}, None, resources.tokens(split))
    made = score(subject, split, memory.want, [keeping])
    made.trainer.strategy.barrier()
    if made.trainer.is_global_zero:
        builder.finish(made.results)
    made.trainer.strategy.barrier()
    if not RetrievalCache.is_complete(path):
        raise InputError(
            f"{path}: rank 0 has finished it, but not as this host sees it; expected a folder that "
            "all hosts share, or no --knn.lmbda auto and no --knn.cache"
        )
    return RetrievalCache.open(path), made


def retrieved_from(subject: Subject, split: str, resources: MadeOnDemand) -> dict[str, Any]:
    """What determines the content of a cache of retrieved neighbours."""
    knn, datastore = resources.knn, resources.datastore()
    index = resolve(datastore, knn.index)
    return {
        **resources.products.made_from(split),
        "model": subject.model.fingerprint,
        "neighbors": asdict(subject.neighbors.settings) if subject.neighbors else None,
        "datastore": fingerprint_of(datastore.whole),
        "index": [index, Path(index).stat().st_size] if is_path(index) else index,
        "seed": subject.run.seed,
        "nprobe": knn.nprobe,
        "metric": knn.metric,
        "similarity": knn.similarity or knn.metric,
        "distances": knn.distances,
        "missing": knn.missing,
        "rescore_key_type": knn.rescore_key_type,
    }


# -- products alone ------------------------------------------------------------------------------


def make_products(
    subject: Subject, split: str, knn: KNNSettings, with_index: bool
) -> tuple[Datastore, dict[str, float]]:
    """The datastore of a split, and the index that the settings name if it is wanted, made or
    finished unless they are there; and how long each stage took."""
    products = subject.products(knn)
    if with_index:
        products.check_index()
    if knn.key_type == "gnn":
        subject.give_neighbors(split)
    make = products.ensure_datastore_and_index if with_index else products.ensure_datastore
    return make(split), seconds_of(subject, products)
