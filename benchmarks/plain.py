"""Every stage done plainly, the yardstick of benchmarks/stages.py.

What the original programs do, step by step (urvashik/knnlm on fairseq 0.9, and message passing for
GNN-LM): one thread, one batch of few tokens after the other, log-probabilities with a column for
every word, keys in a raw fp32 memory map, faiss as it comes, a `[Q, k, d]` array of gathered keys
to measure distances, -10000 for a target that no neighbour carries. Weights, the rows of a split,
the datastore and the index that is searched are those of our programs, and so must the perplexities
be.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import HeteroData  # noqa: F401  it is loaded before anything is timed

from neighborlm.datamodules.dictionary import PAD
from neighborlm.datamodules.graphs import hetero_graph
from neighborlm.datamodules.lm import LMBatch, LMDataModule
from neighborlm.models.adaptive import OutputSoftmax, PlainSoftmax
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.programs.checkpoints import load_model
from neighborlm.programs.settings import NeighborSettings
from neighborlm.retrieval.neighbors.tables import NeighborTable, compacted, outside_window
from neighborlm.retrieval.search.index import index_path, resolve
from neighborlm.retrieval.store.datastore import Datastore

KEY_TYPE = "last_ffn_input"
TRAINING_KEYS, ADDED_AT_ONCE = 1_000_000, 500_000
"""Of an index, as in the original."""
ABSENT = -10000.0
"""Log-probability of a target that no neighbour carries."""


@dataclass(frozen=True)
class Setup:
    """What the plain stages work on.

    Attributes:
        data: arguments of `LMDataModule`.
        split: to evaluate.
        lm, gnn: checkpoints.
        stores: folder of our datastores, with index and neighbour tables.
        scratch: where raw keys and values are kept.
        index: factory string `IVF<lists>,PQ<bytes>` of the index.
        nprobe, k, lmbda: of the search and the mixture.
        neighbors: what the graph network sees.
        tokens: a part's at most, of stages that could take more than the evaluated split has.
        parts: runs that share the work; together those of an evaluation see the whole split.
        max_tokens: in a batch; 256, one row, as the original ran best on a CPU.
    """

    data: dict
    split: str
    lm: Path
    gnn: Path
    stores: Path
    scratch: Path
    index: str
    nprobe: int
    k: int
    lmbda: float
    neighbors: dict
    tokens: int
    parts: int
    max_tokens: int = 256

    @cached_property
    def store(self) -> Datastore:
        """Our datastore of the training split."""
        return Datastore.open(self.stores / "train")

    def batches(self, split: str, part: int) -> list[LMBatch]:
        """Batches of one part of a split, spread over it."""
        loader = LMDataModule(**self.data, max_tokens=self.max_tokens).evaluation_dataloader(split)
        dealt = loader.sampler.batches[part :: self.parts]
        if split != self.split:
            tokens = sum(loader.sampler.lengths[batch].sum() for batch in dealt)
            dealt = dealt[:: max(int(tokens) // self.tokens, 1)]
        loader.sampler.batches = dealt
        return list(loader)

    def raw(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys fp32 `[n, d]` and values int64 `[n]` without a header, memory-mapped; taken from our
        datastore where they are missing, without its masked rows."""
        keys, values = self.scratch / "keys.raw", self.scratch / "values.raw"
        if not keys.is_file():
            np.delete(self.store.values, self.store.masked).astype(np.int64).tofile(values)
            np.delete(self.store.keys, self.store.masked, axis=0).astype(np.float32).tofile(keys)
        shape = (self.store.n_keys, self.store.dim)
        return np.memmap(keys, np.float32, "r", shape=shape), np.memmap(values, np.int64, "r")


@contextmanager
def timed(seconds: Counter, what: str) -> Iterator[None]:
    """Adds the time that the body takes."""
    start = time.perf_counter()
    yield
    seconds[what] += time.perf_counter() - start


def over(batches: list, step: Callable[..., Tensor]) -> dict[str, dict]:
    """Times `step` over batches, after one to warm up.

    Args:
        step: called with a batch and a counter of seconds; gives log-probabilities, one a token.

    Returns:
        under the empty name `tokens`, `seconds`, what they were spent on, and the mean `loss` in
        nats.
    """
    step(batches[0], Counter())
    seconds: Counter[str] = Counter()
    start = time.perf_counter()
    log_probs = torch.cat([step(batch, seconds) for batch in batches])
    passed = time.perf_counter() - start
    loss = -log_probs.double().mean().item()
    of = dict(seconds)
    return {"": {"tokens": len(log_probs), "seconds": passed, "seconds_of": of, "loss": loss}}


# -- LM ----------------------------------------------------------------------------------------


def all_log_probs(softmax: OutputSoftmax, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities fp32 `[n, vocabulary]`; of the words of a tail only for those tokens whose
    target is among them, as fairseq does."""
    if isinstance(softmax, PlainSoftmax):
        return softmax.log_prob(hidden)
    edges = softmax.edges
    head = F.linear(hidden, torch.cat([softmax.words[0], softmax.classes])).log_softmax(dim=1)
    result = torch.zeros(len(hidden), edges[-1])
    result[:, : edges[1]] = head[:, : edges[1]]
    for i in range(1, len(edges) - 1):
        rows = ((targets >= edges[i]) & (targets < edges[i + 1])).nonzero().squeeze(1)
        tail = F.linear(hidden[rows] @ softmax.down[i - 1], softmax.words[i]).log_softmax(dim=1)
        result[rows, edges[i] : edges[i + 1]] = tail + head[rows, edges[1] + i - 1, None]
    return result


def forward(model: TransformerLM, batch: LMBatch) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[n]` and keys `[n, d]` of the scored tokens."""
    hidden, features = model.hidden(batch.tokens, [KEY_TYPE])
    targets = batch.targets.masked_fill(~batch.scored, PAD).flatten()
    every = all_log_probs(model.softmax, hidden.flatten(0, 1), targets)
    log_probs = every.gather(1, targets[:, None]).view(batch.targets.shape)
    return log_probs[batch.scored], features[KEY_TYPE][batch.scored]


@torch.no_grad()
def evaluate_lm(setup: Setup, part: int) -> dict:
    """The LM on its own."""
    model = load_model(setup.lm)
    return over(setup.batches(setup.split, part), lambda batch, _: forward(model, batch)[0])


@torch.no_grad()
def dump(setup: Setup, part: int) -> dict:
    """Keys and values to memory maps; also how far keys are from those of our datastore."""
    model = load_model(setup.lm)
    rows, width = setup.store.keys.shape
    keys = np.memmap(setup.scratch / "dump_keys.raw", np.float32, "w+", shape=(rows, width))
    values = np.memmap(setup.scratch / "dump_values.raw", np.int64, "w+", shape=(rows,))
    written = []

    def step(batch: LMBatch, seconds: Counter) -> Tensor:
        with timed(seconds, "model"):
            log_probs, features = forward(model, batch)
        written.append(batch.positions[batch.scored].numpy())
        keys[written[-1]] = features.numpy()
        values[written[-1]] = batch.targets[batch.scored].numpy()
        return log_probs

    found = over(setup.batches("train", part), step)
    rows = np.unique(np.concatenate(written))
    rows = rows[~np.isin(rows, setup.store.masked)]
    difference = np.abs(keys[rows] - setup.store.keys[rows].astype(np.float32)).max()
    found[""] |= {"loss": None, "largest_difference_of_keys": float(difference)}
    return found


# -- kNN-LM ------------------------------------------------------------------------------------


def build_index(setup: Setup, part: int) -> dict:
    """Trains on keys in random order, adds in file order."""
    keys, _ = setup.raw()
    width = keys.shape[1]
    lists, code_bytes = map(int, re.findall(r"\d+", setup.index))
    seconds: Counter[str] = Counter()
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(width), width, lists, code_bytes, 8)
    with timed(seconds, "training"):
        size = min(TRAINING_KEYS, len(keys))
        sample = np.random.default_rng(part).choice(np.arange(len(keys)), size, replace=False)
        index.train(keys[sample].astype(np.float32))
    with timed(seconds, "adding"):
        for first in range(0, len(keys), ADDED_AT_ONCE):
            block = np.array(keys[first : first + ADDED_AT_ONCE])
            index.add_with_ids(block, np.arange(first, first + len(block)))
        faiss.write_index(index, str(setup.scratch / "plain.index"))
    return {
        part: {"tokens": len(keys), "seconds": seconds[part], "seconds_of": {}}
        for part in ("training", "adding")
    }


@torch.no_grad()
def evaluate_knn(setup: Setup, part: int, exact: bool) -> dict:
    """LM and kNN, batch by batch.

    Args:
        exact: distances to the stored keys; else the index's own.
    """
    model = load_model(setup.lm)
    keys, values = setup.raw()
    index = faiss.read_index(str(index_path(setup.store, setup.index, "l2")))
    index.nprobe = setup.nprobe

    def step(batch: LMBatch, seconds: Counter) -> Tensor:
        with timed(seconds, "model"):
            lm, queries = forward(model, batch)
        with timed(seconds, "search"):
            distances, rows = index.search(queries.numpy(), setup.k)
        with timed(seconds, "rescore"):
            scores = -torch.from_numpy(distances)
            if exact:
                found = torch.from_numpy(keys[rows])
                repeated = queries[:, None].repeat(1, setup.k, 1)
                scores = -((repeated - found) ** 2).sum(dim=2)
        with timed(seconds, "mix"):
            targets = batch.targets[batch.scored]
            hit = torch.from_numpy(values[rows]) == targets[:, None]
            votes = scores.log_softmax(dim=1)
            knn = (votes + torch.where(hit, 0.0, ABSENT)).logsumexp(dim=1)
            shares = torch.tensor([[1 - setup.lmbda], [setup.lmbda]]).log()
            return (torch.stack([lm, knn]) + shares).logsumexp(dim=0)

    return over(setup.batches(setup.split, part), step)


# -- GNN-LM ------------------------------------------------------------------------------------


def find_neighbors(setup: Setup, part: int) -> dict:
    """A part of the training split's neighbour table, by the index that ours searches, those near
    the token itself left out of twice as many."""
    store, settings = setup.store, NeighborSettings(**setup.neighbors)
    name = resolve(store, settings.index)
    if name == "flat":
        index = faiss.IndexFlatL2(store.dim)
        index.add(setup.raw()[0])
    else:
        index = faiss.read_index(str(index_path(store, name, "l2")))
        index.nprobe = settings.nprobe
    count = min(setup.tokens, len(store) // setup.parts)
    first = part * (len(store) // setup.parts)
    table = np.memmap(setup.scratch / "table.raw", np.int64, "w+", shape=(len(store), settings.k))

    def step(tokens: np.ndarray, seconds: Counter) -> Tensor:
        with timed(seconds, "search"):
            _, found = index.search(store.keys[tokens].astype(np.float32), 2 * settings.k)
        rows = store.rows_of(found)
        far = outside_window(rows, tokens, settings.exclude_window)
        table[tokens] = compacted(rows, far, settings.k, -1)
        return torch.zeros(len(tokens))

    tokens = np.arange(first, first + count)
    found = over(np.split(tokens, range(setup.max_tokens, count, setup.max_tokens)), step)
    found[""]["loss"] = None
    return found


class MessagePassing(nn.Module):
    """The graph network by messages along every edge of every block's graph."""

    def __init__(self, setup: Setup, split: str) -> None:
        super().__init__()
        self.model: GNNLM = load_model(setup.gnn)
        self.settings = NeighborSettings(**setup.neighbors)
        path = setup.stores / split / f"neighbors-k{self.settings.k}.json"
        self.table = NeighborTable.open(path).nearest(self.settings.k)
        self.memory = setup.store.keys

    def forward(self, batch: LMBatch, seconds: Counter) -> list[Tensor]:
        """Log-probabilities of the scored tokens of each row."""
        return [self.of_row(batch, row, seconds) for row in range(len(batch.tokens))]

    def of_row(self, batch: LMBatch, row: int, seconds: Counter) -> Tensor:
        """Log-probabilities of the scored tokens of one row, which is one graph."""
        there = batch.positions[row] >= 0
        with torch.no_grad(), timed(seconds, "LM"):
            hidden = self.model.lm.hidden(batch.tokens[row : row + 1, there])[0][0]
        with timed(seconds, "graph"):
            neighbors = self.table[batch.positions[row, there].numpy()].astype(np.int64)
            graph = hetero_graph(
                neighbors,
                len(self.memory),
                self.settings.left_context,
                self.settings.right_context,
                self.model.hparams.intra_context,
            )
            features = torch.from_numpy(self.memory[graph["neighbor"].row.numpy()]).float()
        with timed(seconds, "network"):
            nodes = {"token": hidden, "neighbor": features}
            out = self.model.network(nodes, graph.edge_index_dict)[-1]["token"]
            if self.model.residual is not None:
                out = hidden + self.model.residual(out)
            scored = batch.scored[row, there]
            targets = batch.targets[row, there][scored]
            return self.model.softmax.target_log_prob(out[scored], targets)


def train_gnn(setup: Setup, part: int) -> dict:
    """Updates of the graph network."""
    network = MessagePassing(setup, "train")
    network.model.train()
    trained = [p for p in network.model.parameters() if p.requires_grad]
    optimizer = network.model.configure_optimizers()["optimizer"]
    loader = LMDataModule(**setup.data, max_tokens=4 * setup.max_tokens).train_dataloader()
    updates = max(setup.tokens // (16 * setup.max_tokens), 1)
    loader.sampler.batches = loader.sampler.batches[part :: setup.parts][:updates]

    def step(batch: LMBatch, seconds: Counter) -> Tensor:
        optimizer.zero_grad()
        log_probs = torch.cat(network(batch, seconds))
        (-log_probs.mean()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return log_probs.detach()

    found = over([loader.dataset[rows] for rows in loader.sampler.batches], step)
    found[""]["loss"] = None
    return found


@torch.no_grad()
def evaluate_gnn(setup: Setup, part: int) -> dict:
    """The graph network on top of the LM."""
    network = MessagePassing(setup, setup.split)
    return over(setup.batches(setup.split, part), lambda batch, s: torch.cat(network(batch, s)))


STAGES: dict[str, Callable[[Setup, int], dict[str, dict]]] = {
    "lm": evaluate_lm,
    "datastore": dump,
    "index": build_index,
    "knn": partial(evaluate_knn, exact=True),
    "knn-inexact": partial(evaluate_knn, exact=False),
    "tables": find_neighbors,
    "gnn-training": train_gnn,
    "gnn": evaluate_gnn,
}
"""What each gives: figures of `over` by name, the empty one where there is one thing to time."""
