"""kNN-LM: one weight for all tokens, given or tuned with the temperature; and the cache of what was
retrieved, from which it can be evaluated without the model and without a search."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist

from neighborlm.callbacks.interpolation import Interpolation
from neighborlm.callbacks.tally import Tally
from neighborlm.common.errors import InputError
from neighborlm.common.files import digest_of
from neighborlm.programs.made_with import as_made
from neighborlm.programs.mixture import mixed_figures, seconds_in
from neighborlm.programs.places import check_writable
from neighborlm.programs.reports import log_tuning
from neighborlm.programs.resources import MadeOnDemand
from neighborlm.programs.settings import KNNSettings
from neighborlm.programs.subject import Evaluated, Pass, Subject, score, seconds_of, tokens_of
from neighborlm.retrieval.memories import ConstantMixer, KNNMemory
from neighborlm.retrieval.memories.cache import TOP, Extent, RetrievalCache
from neighborlm.retrieval.memories.cache_builder import RetrievalCacheBuilder
from neighborlm.retrieval.memories.knn_memory import opinion_from_cache
from neighborlm.retrieval.memories.tuning import Tuning, tune
from neighborlm.retrieval.search.index import is_path, resolve
from neighborlm.retrieval.store.datastore import fingerprint_of


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
        **as_made(datastore.whole),
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
    memory = KNNMemory.of(resources)
    extent = Extent(weighted=memory.weights is not None)
    if knn.cache is not None:
        rows, on_lm = memory.datastore.whole["rows"], subject.neighbors is not None
        extent = extent._replace(datastore_rows=rows, top=TOP, on_lm=on_lm)
    builder = RetrievalCacheBuilder(path, k=knn.k, **sizes, made_from=made_from, extent=extent)
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


def temporary_folder(subject: Subject, resources: MadeOnDemand, split: str) -> Path:
    """Where all ranks keep what is retrieved until the command ends."""
    content = [retrieved_from(subject, split, resources), subject.run.evaluates_part]
    name = f"retrieved-{digest_of(json.dumps(content))}"
    return subject.run.directory / name


def mixed_from_cache(
    subject: Subject,
    split: str,
    resources: MadeOnDemand,
    mixer: ConstantMixer,
    keep_scores: bool,
) -> tuple[Pass, Tally, dict[str, Any]]:
    """A pass over what `--knn.cache` keeps, retrieved first where it is missing."""
    knn = resources.knn
    cache, made = retrieved(subject, split, resources, Path(knn.cache))
    if keep_scores and subject.neighbors is not None and cache.alone_log_prob is None:
        raise InputError(
            f"--token_scores: {cache.path} was made by an earlier version, which did not keep what "
            "the LM of a GNN-LM says alone; expected another --knn.cache"
        )
    start = time.perf_counter()
    tally = Tally(keep_scores)
    for block in islice(cache, *own_part()):
        opinion = opinion_from_cache(block, knn.temperature, knn.similarity or knn.metric)
        asked = cache.scored(block)
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
