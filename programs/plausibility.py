"""Whether a model makes sense of token ids and of keys that do not say what made them.

A checkpoint of fairseq does not name its dictionary, nor a raw datastore its model, and those of
the same sizes cannot be told apart by looking. But a model that reads ids of another dictionary is
sure of the wrong tokens, and keys of another model do not recognise their own contexts.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from neighborlm.common.contracts import LanguageModel, Scored, Want
from neighborlm.datamodules.dictionary import EOS
from neighborlm.datamodules.lm import LMBatch, LMDataModule
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.models.trainable_lm import TrainableLM
from neighborlm.programs.run import Run
from neighborlm.retrieval.store.datastore import Datastore

TOKENS, LENGTH = 512, 128
"""Of a text that are read in all, and in one part."""
SURE = 0.5
"""Nats by which the loss of a model is above its entropy where it is sure of the wrong tokens."""
OF_ANOTHER, FEWEST = 0.15, 64
"""The `confusion` above which keys seem to be another model's: it is up to 0.05 for those of the
same one in other rows, 0.2 to 0.3 for another key type, and 0.5 by chance; the smallest sample."""


def check_ids(model: LanguageModel, data: LMDataModule, run: Run) -> None:
    """Warns of a model that does not say which dictionary it was trained with, where the corpus
    seems to have another one of the same size."""
    lm = model.lm if isinstance(model, GNNLM) else model
    known = not isinstance(lm, TrainableLM) or lm.dictionary_fingerprint is not None
    if known or not run.is_first_time("ids", lm.checkpoint, data.dictionary.fingerprint):
        return
    split = "valid" if data.has("valid") else "train"
    loss, entropy = loss_and_entropy(lm, data.stream(split).tokens, data.tokens_per_sample)
    frequencies = loss_of_frequencies(data, split)
    if loss > frequencies and loss > entropy + SURE:
        run.remark(
            f"warning: {lm.checkpoint or 'the model'}: seems to know nothing of "
            f"{data.settings.corpus}, as where it was trained with another dictionary of as many "
            f"symbols, or hardly at all: on a sample of the {split} split it takes {loss:.2f} nats "
            f"a token, where the frequencies of tokens take {frequencies:.2f} and it expects "
            f"{entropy:.2f}; expected its own dict.txt as --data.dictionary"
        )


def check_keys(
    model: LanguageModel, key_type: str, datastore: Datastore, data: LMDataModule, run: Run
) -> None:
    """Warns of a raw datastore whose keys seem to be those of another model or another dictionary.

    Args:
        datastore: whose values follow one another as in a text.
    """
    if key_type == "gnn" or not run.is_first_time("keys", datastore.path):
        return
    share = confusion(model, key_type, datastore, data.tokens_per_sample)
    if share > OF_ANOTHER:
        run.remark(
            f"warning: {datastore.path}: its keys seem to be those of another model, dictionary or "
            f"key type than {key_type} of this one: of what it computes for other contexts, "
            f"{share:.0%} are nearer to a key than what it computes for the key's own; expected "
            "the model that made them, and --knn.key_type as then"
        )


@torch.no_grad()
def loss_and_entropy(model: LanguageModel, tokens: np.ndarray, longest: int) -> tuple[float, float]:
    """Mean loss of a model on a sample of a text, and the mean entropy of its distributions, in
    nats: alike where the model knows what it does not know.

    Args:
        longest: row that it is to read, in tokens.
    """
    losses, entropies = [], []
    for _, batch in _windows(tokens, longest):
        scored = _score(model, batch, Want(entropy=True))
        losses.append(-scored.log_probs)
        entropies.append(scored.entropy)
    return torch.cat(losses).mean().item(), torch.cat(entropies).mean().item()


def loss_of_frequencies(data: LMDataModule, split: str) -> float:
    """Mean loss in nats of a split by the frequencies of tokens in a sample of the training text,
    of which each is counted once more."""
    counts = np.ones(data.vocab_size)
    for part in _parts(data.stream("train" if data.has("train") else split).tokens, 64, 1 << 14):
        counts += np.bincount(part, minlength=len(counts))
    log_probs = np.log(counts / counts.sum())
    sample = np.concatenate(list(_parts(data.stream(split).tokens, 64, 1 << 10)))
    return -float(log_probs[sample].mean())


@torch.no_grad()
def confusion(model: LanguageModel, key_type: str, datastore: Datastore, longest: int) -> float:
    """How badly a sample of keys tells its contexts apart, as the values before them say these: of
    what the model computes for other contexts, the share that is nearer to a stored key than what
    it computes for its own; 0 where the sample is small.

    Args:
        longest: row that the model is to read, in tokens.
    """
    stored, computed = [], []
    for start, batch in _windows(datastore.values, longest):
        late = np.arange(batch.tokens.shape[1] // 2, batch.tokens.shape[1])
        late = late[~np.isin(start + late, datastore.masked)]
        keys = _score(model, batch, Want(keys=(key_type,), log_probs=False)).keys[key_type]
        computed.append(keys.float().cpu()[late])
        stored.append(torch.from_numpy(datastore.read(start + late)))
    own, found = torch.cat(computed), torch.cat(stored)
    if len(own) < FEWEST:
        return 0.0
    distances = torch.cdist(found, own)
    nearer = distances < distances.diagonal()[:, None]
    return nearer.double().mean().item()


def _score(model: LanguageModel, batch: LMBatch, want: Want) -> Scored:
    """As in evaluation, on the device that the model is on."""
    module = model if isinstance(model, nn.Module) else nn.Module()
    device = next((parameter.device for parameter in module.parameters()), "cpu")
    is_training = module.training
    module.eval()
    scored = model.score(LMBatch(*(x.to(device) for x in batch[:4])), want)
    module.train(is_training)
    return scored.on_cpu()


def _windows(tokens: np.ndarray, longest: int) -> Iterator[tuple[int, LMBatch]]:
    """Parts of a text as batches of one row, with where they begin.

    Args:
        longest: row, in tokens; a model may not know positions beyond it.
    """
    length = min(LENGTH, longest, len(tokens))
    starts = np.linspace(0, len(tokens) - length, max(TOKENS // length, 1)).astype(np.int64)
    for start in np.unique(starts).tolist():
        targets = torch.from_numpy(np.array(tokens[start : start + length], dtype=np.int64))[None]
        before = torch.tensor([[int(tokens[start - 1]) if start else EOS]])
        read = torch.cat([before, targets[:, :-1]], dim=1)
        positions = torch.arange(start, start + length)[None]
        yield start, LMBatch(read, targets, positions, torch.ones_like(targets, dtype=torch.bool))


def _parts(tokens: np.ndarray, count: int, length: int) -> Iterator[np.ndarray]:
    """Parts of a text that lie evenly in it; all of it where it is short."""
    if len(tokens) <= count * length:
        yield np.asarray(tokens)
        return
    for start in np.linspace(0, len(tokens) - length, count).astype(np.int64).tolist():
        yield np.asarray(tokens[start : start + length])
