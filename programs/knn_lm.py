"""kNN-LM: one weight for all tokens, given or tuned with the temperature, as `--knnlm` means it; or
a gate that decides before each search."""

from collections.abc import Sequence
from dataclasses import asdict, replace

from neighborlm.programs.hearing import Heard, hear
from neighborlm.programs.made_with import as_made
from neighborlm.programs.mixture import Mixing, evaluate_mixture
from neighborlm.programs.resources import MadeOnDemand
from neighborlm.programs.subject import Evaluated, Subject
from neighborlm.retrieval.memories import ConstantMixer, KNNMemory
from neighborlm.retrieval.memories.adaptive import ForetoldMixer, WhereSearchedMixer
from neighborlm.retrieval.search.index import resolve

REPORTED = {
    "nearest_distance": "nearest_distance",
    "kth_distance": "kth_distance",
    "has_target": "target_among_neighbors",
}
"""What results call the means of the memory knn."""


def is_knn_lm(memories: Sequence[str], mixer: str) -> bool:
    """Whether these are the memory and the mixer of kNN-LM."""
    return tuple(memories) == ("knn",) and mixer == "constant"


class TunedWithTemperature(Mixing):
    """The weight that the memory knn has found with its temperature, by a grid."""

    def fit(self, heard: Heard) -> None:
        """See `Mixing.fit`."""
        lmbda = self.memories["knn"].tuning.lmbda
        self.mixer = ConstantMixer((1 - lmbda, lmbda))


def evaluate_knn(
    subject: Subject, split: str, resources: MadeOnDemand, keep_scores: bool
) -> Evaluated:
    """kNN-LM, or a GNN-LM with the same memory; figures are under `knn`."""
    knn = resources.knn
    shares = None if knn.lmbda == "auto" else (1 - knn.lmbda, knn.lmbda)
    mixing = TunedWithTemperature.of(["knn"], ConstantMixer(shares), None, resources)
    evaluated = evaluate_mixture(subject, split, mixing, resources, keep_scores)
    results, memory = dict(evaluated.results), mixing.memories["knn"]
    found = results.pop("mixture")
    for name in ("memories", "mixer", "knn_temperature"):
        del found[name]
    for ours, reported in REPORTED.items():
        found[reported] = found.pop(f"knn.{ours}", float("nan"))
    datastore = resources.datastore()
    described = {
        **asdict(knn),
        **as_made(datastore.whole),
        "index": resolve(datastore, knn.index),
        "lmbda": mixing.mixer.shares[1].item(),
        "temperature": memory.temperature,
        "tuned": memory.tuning is not None,
        "datastore": str(datastore.path),
        "datastore_rows": datastore.whole["rows"],
    }
    if memory.retriever.communication:
        described["communication"] = dict(memory.retriever.communication)
    named = {"name": "GNN-LM + kNN" if "gnn" in results else "kNN-LM"}
    results["table"] = [*results["table"][:-1], results["table"][-1] | named]
    return replace(evaluated, results=results | {"knn": found | described})


class WithGate(Mixing):
    """The weights that the gate foretells, and beside them one weight wherever it has searched."""

    def fit(self, heard: Heard) -> None:
        """See `Mixing.fit`."""
        self.alone["adaptive"].fit(heard.sources())


def evaluate_adaptive(
    subject: Subject, split: str, resources: MadeOnDemand, keep_scores: bool
) -> Evaluated:
    """kNN-LM with a gate before the search: what skipping alone gives, by one weight wherever a
    search was made, and what the foretold weights give beyond that."""
    mixing = WithGate.of(["adaptive"], ForetoldMixer(), None, resources)
    mixing.alone["adaptive"] = constant = WhereSearchedMixer()
    evaluated = evaluate_mixture(subject, split, mixing, resources, keep_scores)
    found, table = dict(evaluated.results["mixture"]), list(evaluated.results["table"])
    found |= {"skip": resources.settings.adaptive.skip, "lmbda": constant.shares[1].item()}
    for place, what in ((-2, "one lmbda"), (-1, "its lmbda")):
        table[place] = table[place] | {"name": f"{table[place]['name']}, {what}"}
    return replace(evaluated, results=evaluated.results | {"mixture": found, "table": table})


def tuned_temperature(subject: Subject, resources: MadeOnDemand) -> float:
    """The temperature of the memory knn that suits the validation split, from a pass of its own,
    for memories that must know it before they are asked."""
    memory = KNNMemory.of(resources)
    hear(subject, "valid", {"knn": memory}, resources)
    return memory.temperature
