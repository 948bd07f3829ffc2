"""A whole evaluation of an original GNN-LM by the programs, from its checkpoint, data-bin,
datastore, neighbours and quantised features, against messages passed over every block's graph."""

import json
from argparse import Namespace

import faiss
import numpy as np
import pytest
import torch
from small_fairseq import PLAIN, VOCAB, WIDTH, save
from small_original import QUANTIZER, arguments, network, plain_words, transformer_layers
from torch import Tensor

from neighborlm.datamodules.binarize import TokenStream
from neighborlm.datamodules.dictionary import EOS, Dictionary
from neighborlm.datamodules.graphs import hetero_graph
from neighborlm.models.gnn_lm import GNNLM
from neighborlm.originals.databin import open_databin, write_databin
from neighborlm.programs.checkpoints import load_model

TRAIN_TOKENS, TEST_TOKENS, NEIGHBORS, K = 600, 130, 6, 4
ROW, CONTEXT = 24, 8
STORES = "datastores/data-bin"
DATA = (
    *("--data.corpus", "data-bin", "--data.tokens_per_sample", ROW),
    *("--data.context_window", CONTEXT, "--data.max_tokens", 100),
    *("--trainer.enable_progress_bar", "false"),
)
GNN = (
    *("--arch", "gnn_lm", "--ckpt_path", "gnn.pt", "--neighbors.k", K),
    *("--neighbors.index", "imported", "--neighbors.codec", "imported"),
)


def write_split(prefix, tokens: int, seed: int) -> None:
    """Lines of 1 to 30 random words."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, VOCAB, tokens)
    ends = rng.integers(1, 30, tokens).cumsum()
    ids[ends[ends < tokens - 1]] = ids[-1] = EOS
    starts = np.append(0, np.flatnonzero(ids == EOS) + 1)
    write_databin(TokenStream(ids, starts), prefix, VOCAB)


def write_datastore(folder, of) -> np.ndarray:
    """A datastore as the original writes it, of ours; returns its keys in fp32."""
    keys, values = np.load(of / "keys.npy"), np.load(of / "values.npy")
    folder.mkdir()
    keys.tofile(folder / "keys.npy")
    values.astype(np.int16).tofile(folder / "vals.npy")
    info = {"dstore_size": len(keys), "hidden_size": WIDTH, "vocab_size": VOCAB}
    (folder / "info.json").write_text(json.dumps({**info, "dstore_fp16": True, "val_size": 1}))
    return keys.astype(np.float32)


def neighbor_table() -> np.ndarray:
    """Rows of the training split: both ends of it, repeated ones, missing ones, for one token all
    of them."""
    table = np.random.default_rng(0).integers(0, TRAIN_TOKENS, (TEST_TOKENS, NEIGHBORS))
    table[3], table[4], table[5, 1:], table[6] = -1, [0, 1, 599, 598, 7, 7], -1, table[7]
    return table


def trained_codec(keys: np.ndarray) -> faiss.Index:
    """Quickly and badly: what is asked of it is that it loses something."""
    codec = faiss.index_factory(WIDTH, "OPQ8_32,PQ8")
    faiss.downcast_VectorTransform(codec.chain.at(0)).niter = 1
    faiss.downcast_index(codec.index).do_polysemous_training = False
    codec.train(keys)
    return codec


def tensors_of(codec: faiss.Index) -> dict[str, Tensor]:
    """What a checkpoint holds of its quantiser."""
    transform = faiss.downcast_VectorTransform(codec.chain.at(0))
    quantizer = faiss.downcast_index(codec.index).pq
    centroids = faiss.vector_to_array(quantizer.centroids)
    return {
        f"{QUANTIZER}.centroids_torch": torch.tensor(centroids).view(8, 256, WIDTH // 8),
        f"{QUANTIZER}.A": torch.tensor(faiss.vector_to_array(transform.A)).view(WIDTH, WIDTH),
        f"{QUANTIZER}.b": torch.empty(0),
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory, run_program):
    """A folder with what the original leaves, and the LM's datastore of the test split."""
    folder = tmp_path_factory.mktemp("original")
    for seed, (split, tokens) in enumerate({"train": TRAIN_TOKENS, "test": TEST_TOKENS}.items()):
        write_split(folder / "data-bin" / split, tokens, seed)
    words = [f"w{i}" for i in range(VOCAB - 4)]
    Dictionary(words, [1] * len(words)).save(folder / "data-bin/dict.txt")
    bias = {"decoder.xl_bias": torch.randn(VOCAB)}
    parts = (plain_words(), transformer_layers(), bias)
    args = arguments(**PLAIN, add_bias=True)
    save(folder / "lm.pt", Namespace(**vars(args) | {"graph_layer": 0}), *parts)

    store = ("--save_datastore", "--knn.key_type", "last_hidden", "--ckpt_path", "lm.pt")
    run_program(folder, "evaluate.py", *DATA, *store, "--split", "test")
    run_program(folder, "evaluate.py", *DATA, *store, "--knn.datastore", "ours")
    keys = write_datastore(folder / "data-bin/train_dstore", folder / "ours")

    codec = trained_codec(keys)
    faiss.write_index(codec, str(folder / "data-bin/quantizer"))
    np.save(folder / "data-bin/train_dstore/quantized-keys.npy", codec.sa_encode(keys))
    neighbor_table().tofile(folder / f"data-bin/neighbors.mmap.{NEIGHBORS}")
    save(folder / "gnn.pt", args, *parts, network(), tensors_of(codec))
    return folder


@pytest.fixture(scope="module")
def imported(original, run_program):
    """The same, its training datastore, neighbours and features taken over."""
    memory, queries = f"{STORES}/train-last_hidden", f"{STORES}/test-last_hidden"
    source = ("--source", "data-bin/train_dstore", "--output", memory)
    run_program(original, "neighborlm", "datastore", "import", *source)
    table = ("--table", f"data-bin/neighbors.mmap.{NEIGHBORS}", "--k", NEIGHBORS)
    both = ("--queries", queries, "--memory", memory)
    done = run_program(original, "neighborlm", "neighbors", *table, *both)
    assert f"{TEST_TOKENS} tokens" in done.stdout
    files = ("--codes", "data-bin/train_dstore/quantized-keys.npy")
    files += ("--quantizer", "data-bin/quantizer")
    done = run_program(original, "neighborlm", "codec", "import", "--datastore", memory, *files)
    assert f"{TRAIN_TOKENS} rows" in done.stdout
    return original


def decoded_features(folder) -> np.ndarray:
    """The neighbours' features as faiss decodes them, fp32 `[N, WIDTH]`."""
    codec = faiss.read_index(str(folder / "data-bin/quantizer"))
    return codec.sa_decode(np.load(folder / "data-bin/train_dstore/quantized-keys.npy"))


def through_graph(model: GNNLM, hidden: Tensor, neighbors: np.ndarray, features: np.ndarray):
    """What messages over the graph of a block make of its tokens' features `[T, WIDTH]`."""
    graph = hetero_graph(neighbors, TRAIN_TOKENS, left_context=2, right_context=2)
    nodes = {"token": hidden, "neighbor": torch.from_numpy(features[graph["neighbor"].row])}
    return model.network(nodes, graph.edge_index_dict)[-1]["token"]


@torch.inference_mode()
def expected_log_probs(folder) -> np.ndarray:
    """Of every target of the test split, by the LM alone and by the mixture, `[2, N]`."""
    model, features = load_model(folder / "gnn.pt"), decoded_features(folder)
    weights = torch.load(folder / "gnn.pt", weights_only=False)["model"]
    words, bias = weights["decoder.embed_out"], weights["decoder.xl_bias"]
    targets = torch.tensor(open_databin(folder / "data-bin/test").tokens.astype(np.int64))
    tokens = torch.cat([torch.tensor([EOS]), targets[:-1]])
    table, found = neighbor_table()[:, :K], []
    for start in range(0, TEST_TOKENS, ROW - CONTEXT):
        begin = max(start - CONTEXT, 0)
        block = slice(begin, start + ROW - CONTEXT)
        hidden = model.lm.hidden(tokens[None, block])[0][0]
        out = through_graph(model, hidden, table[block], features)
        here = torch.arange(len(hidden)), targets[block]
        lm, gnn = (torch.softmax(states @ words.T + bias, dim=-1)[here] for states in (hidden, out))
        both = torch.stack([lm, 0.3 * lm + 0.7 * gnn]).log()
        found.append(both[:, start - begin :])
    return torch.cat(found, dim=1).numpy()


def test_scores_are_those_of_messages_over_the_graphs(imported, run_program):
    files = ("--output", "results.json", "--token_scores", "scores.npz")
    run_program(imported, "evaluate.py", *DATA, *GNN, *files)
    scores, by_lm_and_mixed = np.load(imported / "scores.npz"), expected_log_probs(imported)
    found = np.stack([scores["lm_log_prob"], scores["gnn_log_prob"]])
    np.testing.assert_allclose(found, by_lm_and_mixed, atol=1e-4)
    results = json.loads((imported / "results.json").read_text())
    assert results["stage_seconds"] == {}  # nothing was made
    ppl = np.exp(-by_lm_and_mixed.mean(axis=1))
    assert (results["ppl"], results["gnn"]["ppl"]) == pytest.approx(tuple(ppl), rel=1e-4)


def test_the_lm_alone_is_that_of_its_own_checkpoint(imported, run_program):
    files = ("--output", "lm.json", "--ckpt_path", "lm.pt")
    run_program(imported, "evaluate.py", *DATA, *files)
    loss = -expected_log_probs(imported)[0].mean()
    assert json.loads((imported / "lm.json").read_text())["loss"] == pytest.approx(loss, rel=1e-4)


def test_codes_of_another_quantiser_are_refused(imported, run_program):
    checkpoint = torch.load(imported / "gnn.pt", weights_only=False)
    checkpoint["model"][f"{QUANTIZER}.centroids_torch"] += 0.1
    torch.save(checkpoint, imported / "other.pt")
    flags = (*DATA, *GNN, "--ckpt_path", "other.pt")
    done = run_program(imported, "evaluate.py", *flags, status=2)
    assert "centroids of its quantiser are not those that other.pt holds" in done.stderr
