"""What the model and its memories say of a whole split: heard in one pass, in which memories are
tuned too, or read from `--knn.cache`, which keeps it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_only

from neighborlm.callbacks.interpolation import TOKENS_AT_ONCE, Interpolation
from neighborlm.callbacks.tally import Tally
from neighborlm.common.all_ranks import rank_and_ranks
from neighborlm.common.contracts import LanguageModel, Memory, Mixer, Opinion, Scored, Want
from neighborlm.common.errors import InputError
from neighborlm.common.files import digest_of
from neighborlm.programs.made_with import comparable
from neighborlm.programs.places import check_writable, own_folder
from neighborlm.programs.resources import MadeOnDemand
from neighborlm.programs.run import Run
from neighborlm.programs.settings import KNNSettings, MemorySettings
from neighborlm.programs.subject import PLAIN, Pass, Subject, score, tokens_of
from neighborlm.retrieval.memories import KNNMemory
from neighborlm.retrieval.memories.cache import TOP, Extent, RetrievalCache
from neighborlm.retrieval.memories.cache_builder import RetrievalCacheBuilder
from neighborlm.retrieval.memories.fitted import load_opinion, save_opinion
from neighborlm.retrieval.memories.mixers import lm_opinion
from neighborlm.retrieval.search.index import is_path, resolve
from neighborlm.retrieval.store.datastore import fingerprint_of


@dataclass(frozen=True)
class Heard:
    """What was said of all scored tokens of a split, in the order of the text.

    Attributes:
        asked: what the model says; no keys.
        opinions: by memory.
        made: the pass; it took no time where all was kept.
        searches: queries that each memory has searched for, of this rank.
        seconds: what the time of the pass was spent on.
        cached_k: neighbours of a token that `--knn.cache` keeps; None without it.
    """

    asked: Scored
    opinions: dict[str, Opinion]
    made: Pass
    searches: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    cached_k: int | None = None

    def sources(self, *memories: str) -> dict[str, Opinion]:
        """The opinions of the model, as `lm`, and of some memories, all by default."""
        names = memories or tuple(self.opinions)
        return {"lm": lm_opinion(self.asked), **{name: self.opinions[name] for name in names}}

    def tallied(self, mixer: Mixer, alone: Mapping[str, Mixer], keep_scores: bool) -> Tally:
        """What `Interpolation` would have tallied with these mixers; each rank takes its part."""
        n = len(self.asked.positions)
        tally = Tally(keep_scores, alone, n)
        rank, ranks = rank_and_ranks()
        for first in islice(range(0, n, TOKENS_AT_ONCE), rank, None, ranks):
            part = slice(first, first + TOKENS_AT_ONCE)
            opinions = {name: opinion.some(part) for name, opinion in self.opinions.items()}
            tally.mix(self.asked.some(part), opinions, mixer, alone)
        tally.searches.update(self.searches)
        return tally


def hear(
    subject: Subject,
    split: str,
    memories: Mapping[str, Memory],
    resources: MadeOnDemand,
    want: Want = PLAIN,
) -> Heard:
    """Asks memories about all tokens of a split in one pass, and has those tune themselves that
    lack settings. With `--knn.cache`, what is kept there is not asked for again.

    Args:
        memories: by name; at most one of them is a `KNNMemory`.
        want: what the mixers need to know of the model.
    """
    with ExitStack() as stack:
        _, knn = retrieving(memories)
        place = None if resources.knn.cache is None else Path(resources.knn.cache)
        if place is None and knn is not None and knn.needs_tuning:
            place = folder_for_tuning(subject.run, subject.model, stack)
        return _hear(subject, split, memories, resources, want, place)


def _hear(
    subject: Subject,
    split: str,
    memories: Mapping[str, Memory],
    resources: MadeOnDemand,
    want: Want,
    place: Path | None,
) -> Heard:
    """What `hear` does.

    Args:
        place: folder for what is retrieved, if it is kept at all.
    """
    keeping = resources.knn.cache is not None
    name_of_knn, knn = retrieving(memories)
    folder, cache = None, None
    if knn is not None and place is not None:
        folder = cache_path(place, split)
        cache = fitting_cache(subject, split, resources, folder)
    kept = kept_opinions(subject, split, memories, resources) if keeping else {}
    missing = {name: memory for name, memory in memories.items() if name not in kept}
    if cache is not None:
        del missing[name_of_knn]
    pass_is_needed = bool(missing)
    if pass_is_needed:
        if folder is not None and cache is None:
            knn.cache = new_cache(subject, split, resources, knn, folder)
        hearing = Interpolation(missing, None, resources.tokens(split), keep_scores=True)
        made = score(subject, split, hearing.want.and_also(want), [hearing])
        asked, opinions = hearing.tally.heard(list(missing))
        if knn is not None and knn.cache is not None:
            cache = finished(knn, made)
        searches, seconds = hearing.tally.searches, hearing.seconds
    else:
        asked, opinions = cache.scored(), {}
        made = Pass(dict(cache.manifest["results"]), 0.0, subject.run.trainer())
        searches, seconds = Counter(), Counter()
    if cache is not None:
        knn.retrieved = cache.nearest(resources.knn.k)
        opinions[name_of_knn] = knn.tune() if knn.needs_tuning else knn.opinion_on(knn.retrieved)
    opinions |= {name: m.tune() for name, m in missing.items() if m is not knn and m.needs_tuning}
    if keeping:
        keep_opinions(subject, split, missing, opinions, resources)
    made.trainer.strategy.barrier()  # before the folder is removed
    opinions = {name: {**kept, **opinions}[name] for name in memories}
    cached_k = cache.manifest["k"] if keeping else None
    return Heard(asked, opinions, made, searches, seconds, cached_k)


def retrieving(memories: Mapping[str, Memory]) -> tuple[str | None, KNNMemory | None]:
    """The memory that keeps the neighbours it retrieves, if there is one, and its name."""
    for name, memory in memories.items():
        if isinstance(memory, KNNMemory):
            return name, memory
    return None, None


# -- neighbours ----------------------------------------------------------------------------------


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


def folder_for_tuning(run: Run, model: LanguageModel, stack: ExitStack) -> Path:
    """Where all ranks of this command, and nobody else, keep what is retrieved for tuning.

    Args:
        stack: at whose end it is removed.
    """
    folder = None
    if rank_zero_only.rank == 0:
        folder = stack.enter_context(own_folder(run.directory, "retrieved"))
    return run.from_first_rank(folder, model)


def sizes_of(subject: Subject, split: str) -> dict[str, int]:
    """Sizes of a cache."""
    data = subject.data
    return {"rows": len(data.stream(split).tokens), "vocab_size": data.vocab_size}


def fitting_cache(
    subject: Subject, split: str, resources: MadeOnDemand, path: Path
) -> RetrievalCache | None:
    """The complete cache that lies at a path, if there is one.

    Raises:
        InputError: it is of something else.
    """
    if not RetrievalCache.is_complete(path):
        return None
    cache, made_from = RetrievalCache.open(path), retrieved_from(subject, split, resources)
    made_from = comparable(made_from, cache.manifest["made_from"])
    cache.fits({**made_from, **sizes_of(subject, split), "k": resources.knn.k})
    return cache


def new_cache(
    subject: Subject, split: str, resources: MadeOnDemand, knn: KNNMemory, path: Path
) -> RetrievalCacheBuilder:
    """What writes a cache: with all that can be kept for `--knn.cache`, else with what tuning
    needs."""
    subject.give_neighbors(split)
    extent = Extent(weighted=knn.weights is not None)
    if resources.knn.cache is not None:
        rows, on_lm = knn.datastore.whole["rows"], subject.neighbors is not None
        extent = extent._replace(datastore_rows=rows, top=TOP, on_lm=on_lm)
    sizes, made_from = sizes_of(subject, split), retrieved_from(subject, split, resources)
    text = {name: str(of) for name, of in asdict(subject.data.settings).items() if of is not None}
    return RetrievalCacheBuilder(
        path, k=resources.knn.k, **sizes, made_from=made_from, extent=extent, text=text
    )


def finished(knn: KNNMemory, made: Pass) -> RetrievalCache:
    """The cache that a pass has written, as all ranks see it."""
    builder, knn.cache = knn.cache, None
    made.trainer.strategy.barrier()
    if made.trainer.is_global_zero:
        builder.finish(made.results)
    made.trainer.strategy.barrier()
    if not RetrievalCache.is_complete(builder.path):
        raise InputError(
            f"{builder.path}: rank 0 has finished it, but not as this host sees it; expected a "
            "folder that all hosts share, or no --knn.lmbda auto and no --knn.cache"
        )
    return RetrievalCache.open(builder.path)


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


# -- opinions ------------------------------------------------------------------------------------


def identities(subject: Subject, names: Sequence[str], settings: MemorySettings) -> dict[str, str]:
    """By memory, what identifies what it remembers and how it is set: weights that were fitted
    beside it fit no other."""
    knn = {name: value for name, value in asdict(settings.knn).items() if name not in PLACES}
    sections = {"knn": [knn], "automaton": [knn, asdict(settings.automaton)]}
    sections["recent"] = [asdict(settings.recent)]
    sections["adaptive"] = [knn, asdict(settings.adaptive)]
    remembered = subject.data.fingerprint("train")
    return {name: digest_of(json.dumps([remembered, sections.get(name)])) for name in names}


PLACES = ("datastore", "cache", "shards", "placement", "shard")
"""Settings of a datastore that change no vote."""


def opinion_from(
    subject: Subject, split: str, name: str, resources: MadeOnDemand
) -> dict[str, Any]:
    """What determines a memory's opinion on a split, the text that it was tuned on included."""
    data = subject.data
    return {
        "corpus": data.fingerprint(split),
        "model": subject.model.fingerprint,
        "neighbors": asdict(subject.neighbors.settings) if subject.neighbors else None,
        "tuned_on": data.fingerprint("valid"),
        "memory": identities(subject, [name], resources.given)[name],
        "part": subject.run.evaluates_part,
    }


def opinion_path(folder: Path, name: str, made_from: Mapping[str, Any]) -> Path:
    """The file of a memory's opinion on a split; one for each way of setting it."""
    return folder / f"{name}-{digest_of(json.dumps(made_from))}.npz"


def kept_opinions(
    subject: Subject, split: str, memories: Mapping[str, Memory], resources: MadeOnDemand
) -> dict[str, Opinion]:
    """The opinions that `--knn.cache` keeps beside the neighbours; their memories take over what
    was tuned."""
    folder, kept = cache_path(Path(resources.knn.cache), split), {}
    for name, memory in memories.items():
        made_from = opinion_from(subject, split, name, resources)
        path = opinion_path(folder, name, made_from)
        if not isinstance(memory, KNNMemory) and path.is_file():
            kept[name], state = load_opinion(path, made_from)
            memory.restore(state)
    return kept


def keep_opinions(
    subject: Subject,
    split: str,
    memories: Mapping[str, Memory],
    opinions: Mapping[str, Opinion],
    resources: MadeOnDemand,
) -> None:
    """Keeps what memories said in `--knn.cache`."""
    folder = cache_path(Path(resources.knn.cache), split)
    for name, memory in memories.items():
        if not isinstance(memory, KNNMemory) and rank_and_ranks()[0] == 0:
            made_from = opinion_from(subject, split, name, resources)
            path = opinion_path(folder, name, made_from)
            save_opinion(path, opinions[name], memory.state(), made_from)
