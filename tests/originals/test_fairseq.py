"""fairseq checkpoints against the original's own numbers and against a forward pass in plain numpy;
export reverses import, and unsupported files are refused."""

import collections
import decimal
import json
import math
import re
import sys
import types
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from small_fairseq import HEADS, LAYERS, LONGEST, PLAIN, VOCAB, WIDTH, arguments, save, tensors
from torch.nn import functional as F

from neighborlm.common.errors import InputError
from neighborlm.datamodules.blocks import make_batches, make_rows
from neighborlm.datamodules.dictionary import EOS, PAD
from neighborlm.models.transformer_lm import TransformerLM
from neighborlm.originals.conversion import load_fairseq_checkpoint
from neighborlm.originals.databin import open_databin
from neighborlm.originals.fairseq import (
    DEFAULTS,
    export_args,
    export_state_dict,
)
from neighborlm.originals.fairseq_files import is_fairseq_checkpoint
from neighborlm.programs.checkpoints import load_model
from neighborlm.tools.convert import main

ORIGINAL = Path(__file__).parents[2] / ".." / "shared" / "parity" / "knnlm"
needs_original = pytest.mark.skipif(
    not ORIGINAL.is_dir(), reason="the original's outputs are not beside the checkout"
)

# -- the original's numbers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def original():
    return load_fairseq_checkpoint(ORIGINAL / "checkpoint.pt").eval()


@torch.inference_mode()
def score(model, split, break_mode, context_window, max_target_positions):
    """Log-probabilities `[N]` of the tokens of a split, and keys `[N, width]`."""
    stream = open_databin(ORIGINAL / "data-bin" / split)
    rows = make_rows(stream.line_starts, break_mode, 256, context_window, max_target_positions)
    tokens = torch.from_numpy(stream.tokens.astype(np.int64))
    inputs = torch.cat([torch.tensor([EOS]), tokens[:-1]])
    log_probs = torch.full(tokens.shape, torch.nan)
    keys = torch.full((len(tokens), model.hparams.width), torch.nan)
    for batch in make_batches(rows.lengths, np.arange(len(rows)), 8192):
        begin, end = rows.context_starts[batch, None], rows.ends[batch, None]
        positions = torch.from_numpy(begin + np.arange((end - begin).max()))
        inside = positions < torch.from_numpy(end)
        read = torch.where(inside, inputs[positions.clamp(max=len(tokens) - 1)], PAD)
        hidden, features = model.hidden(read, ["last_ffn_input"])
        scored = inside & (positions >= torch.from_numpy(rows.starts[batch, None]))
        at = positions[scored]
        log_probs[at] = model.softmax.target_log_prob(hidden[scored], tokens[at])
        keys[at] = features["last_ffn_input"][scored]
    return rows, log_probs.numpy(), keys.numpy()


def originals_scores(name):
    """Positions in the split, and the original's log-probabilities at them."""
    found = np.load(ORIGINAL / "npz" / f"{name}.npz")
    return np.cumsum(found["position"].astype(np.int64)), found["score"]


def flag(name, run):
    args = json.loads((ORIGINAL / "expected.json").read_text())[run]["args"]
    return args[args.index(name) + 1]


@needs_original
def test_every_log_probability_is_the_originals(original):
    window = int(flag("--context-window", "lm_valid1_nodrop"))
    mode = flag("--sample-break-mode", "lm_valid1_nodrop")
    _, ours, _ = score(original, "valid1", mode, window, 1024)
    positions, theirs = originals_scores("lm_valid1_nodrop")
    np.testing.assert_array_equal(positions, np.arange(len(ours)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@needs_original
def test_log_probabilities_and_queries_where_the_original_drops_lines(original):
    window = int(flag("--context-window", "lm_valid1"))
    rows, ours, keys = score(original, "valid1", "complete", window, 256)
    positions, theirs = originals_scores("lm_valid1")
    dropped = np.ones(len(ours), dtype=bool)
    dropped[positions] = False
    before = np.append(0, np.cumsum(dropped))
    same_row = np.zeros(len(ours), dtype=bool)
    for begin, start, end in zip(rows.context_starts, rows.starts, rows.ends, strict=True):
        same_row[start:end] = before[begin] == before[end]
    compared = same_row[positions]
    assert compared.mean() > 0.9
    np.testing.assert_allclose(ours[positions][compared], theirs[compared], rtol=0, atol=2e-5)
    queries = np.load(ORIGINAL / "npz" / "queries_mini_flat.npz")["queries"]
    first, compared = positions[: len(queries)], compared[: len(queries)]
    np.testing.assert_allclose(keys[first][compared], queries[compared], rtol=0, atol=2e-5)


@needs_original
def test_every_key_is_the_originals(original):
    """The original's datastore begins after the first block."""
    stored = np.memmap(ORIGINAL / "dstore_mini_keys.npy", np.float32, "r").reshape(-1, 128)
    _, _, keys = score(original, "test1", "none", 128, 256)
    np.testing.assert_allclose(keys[128:], stored, rtol=0, atol=2e-5)


@needs_original
def test_sampled_keys_of_the_whole_training_text_are_the_originals(original):
    stored = np.load(ORIGINAL / "dstore_full_keys_sample.npz")
    at = stored["idx"][::12] + 128
    stream = open_databin(ORIGINAL / "data-bin" / "train")
    tokens = np.append(EOS, stream.tokens.astype(np.int64))
    blocks, column = np.divmod(at, 128)
    blocks, row = np.unique(blocks, return_inverse=True)
    read = torch.from_numpy(np.stack([tokens[(b - 1) * 128 : (b + 1) * 128] for b in blocks]))
    with torch.inference_mode():
        keys = original.hidden(read, ["last_ffn_input"])[1]["last_ffn_input"].numpy()
    np.testing.assert_allclose(keys[row, 128 + column], stored["keys"][::12], rtol=0, atol=2e-5)


@needs_original
def test_hyper_parameters_are_the_originals(original):
    found = dict(original.hparams)
    assert found["vocab_size"] == 13784
    assert (found["width"], found["ffn_width"], found["layers"], found["heads"]) == (128, 512, 4, 4)
    assert found["adaptive_input_cutoffs"] == found["adaptive_softmax_cutoffs"] == [2000, 6000]
    assert found["tie_weights"]
    assert found["tie_projections"]
    assert not found["final_norm"]
    assert (found["optimizer"], found["schedule"]) == ("nag", "cosine")
    assert (found["lr"], found["min_lr"], found["warmup_updates"]) == (1.0, 1e-4, 50)
    assert (found["lr_period_updates"], found["t_mult"], found["lr_shrink"]) == (850, 2.0, 0.75)


@needs_original
def test_to_lightning_and_back_is_the_originals_file(tmp_path, original):
    main(["from_fairseq", str(ORIGINAL / "checkpoint.pt"), str(tmp_path / "new" / "lm.ckpt")])
    main(["to_fairseq", str(tmp_path / "new" / "lm.ckpt"), str(tmp_path / "out.pt")])
    theirs, ours = read(ORIGINAL / "checkpoint.pt"), read(tmp_path / "out.pt")
    assert ours["model"].keys() == theirs["model"].keys()
    for name, tensor in theirs["model"].items():
        if not name.endswith("_float_tensor"):
            assert torch.equal(ours["model"][name], tensor), name
    args, expected = vars(ours["args"]), vars(theirs["args"])
    assert {k for k in args if args[k] != expected.get(k, args[k])} == {"arch"}
    assert set(args) - set(expected) == set()
    assert set(ours) == set(theirs)
    assert dict(load_fairseq_checkpoint(tmp_path / "out.pt").hparams) == dict(original.hparams)


# -- the forward pass once more, on the tensors of fairseq's layout --------------------------------


def attend(x, state, name):
    length, head = x.shape[0], WIDTH // HEADS
    q, k, v = (
        F.linear(x, state[f"{name}.{p}_proj.weight"], state[f"{name}.{p}_proj.bias"])
        .view(length, HEADS, head)
        .transpose(0, 1)
        for p in "qkv"
    )
    scores = (q * head**-0.5) @ k.transpose(1, 2)
    ahead = torch.ones(length, length).triu(1).bool()
    mixed = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v
    mixed = mixed.transpose(0, 1).reshape(length, WIDTH)
    return F.linear(mixed, state[f"{name}.out_proj.weight"], state[f"{name}.out_proj.bias"])


def norm(x, state, name):
    return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def positions_of(args, state, length):
    if args.decoder_learned_pos:
        return state["decoder.embed_positions.weight"][2 : 2 + length]
    half = WIDTH // 2
    frequencies = [math.exp(-j * math.log(10000) / (half - 1)) for j in range(half)]
    angles = torch.tensor([[(2 + t) * f for f in frequencies] for t in range(length)])
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def embed(args, state, tokens):
    if not args.adaptive_input:
        return state["decoder.embed_tokens.weight"][tokens]
    edges = [0, *map(int, args.adaptive_input_cutoff.split(",")), VOCAB]
    rows = []
    for token in tokens.tolist():
        band = max(i for i, edge in enumerate(edges) if token >= edge)
        name = f"decoder.embed_tokens.embeddings.{band}"
        vector = state[f"{name}.0.weight"][token - edges[band]]
        rows.append(state[f"{name}.1.weight"] @ vector)
    return torch.stack(rows)


def log_softmax(args, state, x):
    name = "decoder.adaptive_softmax"
    if args.adaptive_softmax_cutoff is None:
        shared = args.share_decoder_input_output_embed
        weight = state["decoder.embed_tokens.weight" if shared else "decoder.embed_out"]
        return (x @ weight.t()).log_softmax(-1)
    if args.tie_adaptive_weights:
        words = state["decoder.embed_tokens.embeddings.0.0.weight"]
        head = torch.cat([x @ words.t(), x @ state[f"{name}.head.class_proj.weight"].t()], 1)
    else:
        head = x @ state[f"{name}.head.weight"].t()
    edges = [*map(int, args.adaptive_softmax_cutoff.split(",")), VOCAB]
    head = head.log_softmax(-1)
    parts = [head[:, : edges[0]]]
    for i in range(len(edges) - 1):
        down = state[f"{name}.tail.{i}.0.weight"]
        tied = args.tie_adaptive_weights and args.tie_adaptive_proj
        narrow = x @ (down if tied else down.t())
        tail = (narrow @ state[f"{name}.tail.{i}.2.weight"].t()).log_softmax(-1)
        parts.append(head[:, edges[0] + i, None] + tail)
    return torch.cat(parts, dim=1)


def forward(args, state, tokens):
    """From one row of tokens to log-probabilities `[T, VOCAB]` and keys `[T, WIDTH]`."""
    x = embed(args, state, tokens) * (1 if args.no_scale_embedding else math.sqrt(WIDTH))
    x = x + positions_of(args, state, len(tokens))
    activation = {"relu": F.relu, "gelu": F.gelu}[args.activation_fn]
    for i in range(LAYERS):
        name = f"decoder.layers.{i}"
        before = args.decoder_normalize_before
        inner = norm(x, state, f"{name}.self_attn_layer_norm") if before else x
        x = x + attend(inner, state, f"{name}.self_attn")
        x = x if before else norm(x, state, f"{name}.self_attn_layer_norm")
        key = norm(x, state, f"{name}.final_layer_norm") if before else x
        inner = activation(F.linear(key, state[f"{name}.fc1.weight"], state[f"{name}.fc1.bias"]))
        x = x + F.linear(inner, state[f"{name}.fc2.weight"], state[f"{name}.fc2.bias"])
        x = x if before else norm(x, state, f"{name}.final_layer_norm")
    if args.decoder_normalize_before and not args.no_decoder_final_norm:
        x = norm(x, state, "decoder.layer_norm")
    return log_softmax(args, state, x), key


# -- checkpoints of our own making -----------------------------------------------------------------


VARIANTS = {
    "tied": {},
    "tied words only": {"tie_adaptive_proj": False},
    "untied": {
        "tie_adaptive_weights": False,
        "tie_adaptive_proj": False,
        "adaptive_input_factor": 2.0,
        "adaptive_softmax_cutoff": "10,30,40",
    },
    "plain, tied": PLAIN | {"share_decoder_input_output_embed": True},
    "plain, untied": PLAIN,
    "adaptive input only": {"adaptive_softmax_cutoff": None, "tie_adaptive_weights": False},
    "adaptive softmax only": {"adaptive_input": False, "tie_adaptive_weights": False},
    "learned positions": {"decoder_learned_pos": True, "max_target_positions": 30},
    "post-norm": {"decoder_normalize_before": False},
    "final norm": {"no_decoder_final_norm": False},
    "gelu": {"activation_fn": "gelu", "no_scale_embedding": True},
}


def read(path):
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)


@torch.inference_mode()
def compare_with_forward(model, args, state, atol):
    tokens = torch.randint(0, VOCAB, (LONGEST,), generator=torch.Generator().manual_seed(1))
    expected, expected_key = forward(args, state, tokens)
    hidden, features = model.eval().hidden(tokens[None], ["last_ffn_input"])
    torch.testing.assert_close(model.softmax.log_prob(hidden[0]), expected, rtol=0, atol=atol)
    torch.testing.assert_close(features["last_ffn_input"][0], expected_key, rtol=0, atol=atol)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_model(variant, tmp_path):
    args = arguments(**VARIANTS[variant])
    state = tensors(args)
    model = load_fairseq_checkpoint(save(tmp_path / "checkpoint.pt", args, state))
    assert model.max_target_positions == (args.max_target_positions or LONGEST)
    found = model.hparams
    assert (found.dropout, found.attention_dropout) == (0.3, 0.1)
    assert (found.activation_dropout, found.softmax_dropout) == (0.05, 0.2)
    compare_with_forward(model, args, state, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_gives_the_tensors_back(variant, tmp_path):
    args = arguments(**VARIANTS[variant])
    state = tensors(args)
    model = load_fairseq_checkpoint(save(tmp_path / "checkpoint.pt", args, state))
    exported = export_state_dict(model)
    assert exported.keys() == state.keys()
    storages = collections.defaultdict(set)
    for name, tensor in state.items():
        if name.endswith("_float_tensor"):
            continue
        storages[tensor.data_ptr()].add(exported[name].data_ptr())
        assert exported[name].dtype == tensor.dtype
        if name == "decoder.embed_positions.weight":
            tensor[:2] = 0  # rows that no position has
        assert torch.equal(exported[name], tensor), name
    assert all(len(found) == 1 for found in storages.values())


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"post-norm"}))
def test_the_commands_there_and_back(variant, tmp_path):
    args = arguments(**VARIANTS[variant])
    first = load_fairseq_checkpoint(save(tmp_path / "a.pt", args, tensors(args)))
    main(["from_fairseq", str(tmp_path / "a.pt"), str(tmp_path / "lm.ckpt")])
    lightning = TransformerLM.load_from_checkpoint(tmp_path / "lm.ckpt", weights_only=True)
    main(["to_fairseq", str(tmp_path / "lm.ckpt"), str(tmp_path / "b.pt")])
    second = load_fairseq_checkpoint(tmp_path / "b.pt")
    for model in (lightning, second):
        assert model.state_dict().keys() == first.state_dict().keys()
        for name, tensor in first.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
    assert lightning.hparams == first.hparams
    unused = {"tie_projections"} | {k for k in first.hparams if k.startswith("adaptive_")}
    assert {k: v for k, v in second.hparams.items() if k not in unused} == {
        k: v for k, v in first.hparams.items() if k not in unused
    }


def test_half_precision_becomes_single(tmp_path):
    args = arguments()
    state = {name: tensor.half() for name, tensor in tensors(args).items()}
    model = load_fairseq_checkpoint(save(tmp_path / "checkpoint.pt", args, state))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    state = {name: tensor.float() for name, tensor in state.items()}
    compare_with_forward(model, args, state, atol=2e-5)


def test_arguments_that_are_not_stored(tmp_path):
    args = arguments(activation_dropout=0.0, adaptive_softmax_dropout=0.0)
    state = tensors(args)
    stored = {name: value for name, value in vars(args).items() if value != DEFAULTS.get(name, "")}
    assert not {"activation_fn", "decoder_learned_pos", "no_scale_embedding"} & stored.keys()
    path = save(tmp_path / "checkpoint.pt", Namespace(**stored), state)
    model = load_fairseq_checkpoint(path)
    assert (model.hparams.activation_dropout, model.hparams.softmax_dropout) == (0.0, 0.0)
    compare_with_forward(model, args, state, atol=2e-5)


def test_names_of_older_versions(tmp_path):
    args = arguments(relu_dropout=0.07, activation_dropout=0.0)
    args.no_tie_adaptive_proj = False
    del args.no_decoder_final_norm, args.tie_adaptive_proj
    full = arguments()
    state = tensors(full)
    old = dict(state)
    for i in range(LAYERS):
        layer = f"decoder.layers.{i}"
        for part in ("weight", "bias"):
            qkv = [old.pop(f"{layer}.self_attn.{p}_proj.{part}") for p in "qkv"]
            old[f"{layer}.self_attn.in_proj_{part}"] = torch.cat(qkv)
            for number, name in (("0", "self_attn_layer_norm"), ("2", "final_layer_norm")):
                old[f"{layer}.layer_norms.{number}.{part}"] = old.pop(f"{layer}.{name}.{part}")
    old["decoder.embed_positions.weights"] = torch.zeros(3)
    model = load_fairseq_checkpoint(save(tmp_path / "checkpoint.pt", args, old))
    assert model.hparams.activation_dropout == 0.07
    compare_with_forward(model, full, state, atol=2e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_output_projection_of_later_versions(tmp_path, shared):
    args = arguments(**PLAIN | {"share_decoder_input_output_embed": shared})
    state = tensors(args)
    later = dict(state)
    output = later.pop("decoder.embed_out", state["decoder.embed_tokens.weight"])
    later["decoder.output_projection.weight"] = output
    model = load_fairseq_checkpoint(save(tmp_path / "checkpoint.pt", args, later))
    compare_with_forward(model, args, state, atol=2e-5)


def test_no_final_norm_before_version_3(tmp_path):
    args = arguments()
    state = tensors(args) | {"decoder.version": torch.tensor([2.0])}
    args.no_decoder_final_norm = False
    model = load_fairseq_checkpoint(save(tmp_path / "checkpoint.pt", args, state))
    assert not model.hparams.final_norm


def test_a_cutoff_that_is_the_vocabulary(tmp_path):
    args = arguments(adaptive_input_cutoff="20,200", adaptive_softmax_cutoff="20,200")
    state = tensors(arguments(adaptive_input_cutoff="20", adaptive_softmax_cutoff="20"))
    model = load_fairseq_checkpoint(save(tmp_path / "checkpoint.pt", args, state))
    assert model.hparams.vocab_size == VOCAB
    assert model.hparams.adaptive_softmax_cutoffs == [20]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (
            {
                "optimizer": "adam",
                "adam_betas": "(0.9, 0.95)",
                "weight_decay": 0.01,
                "lr_scheduler": "inverse_sqrt",
                "lr": [0.0005],
                "warmup_updates": 4000,
                "warmup_init_lr": -1,
            },
            {
                "optimizer": "adam",
                "adam_betas": (0.9, 0.95),
                "weight_decay": 0.01,
                "schedule": "inverse_sqrt",
                "lr": 0.0005,
                "warmup_updates": 4000,
                "warmup_init_lr": 0.0,
            },
        ),
        (
            {
                "optimizer": "nag",
                "momentum": 0.9,
                "lr_scheduler": "cosine",
                "lr": [1e-4],
                "max_lr": 1.0,
                "lr_period_updates": -1,
                "max_update": 300,
                "warmup_updates": 100,
                "warmup_init_lr": -1,
            },
            {
                "optimizer": "nag",
                "momentum": 0.9,
                "schedule": "cosine",
                "lr": 1.0,
                "min_lr": 1e-4,
                "lr_period_updates": 200,
                "warmup_init_lr": 1e-4,
            },
        ),
        (
            {"optimizer": "adafactor", "lr_scheduler": "polynomial_decay", "lr": [0.1]},
            {"optimizer": "adam", "schedule": "cosine", "lr": 1e-3},  # TransformerLM's own
        ),
        ({"lr_scheduler": "fixed", "lr": [0.1]}, {"schedule": "constant", "lr": 0.1}),
    ],
)
def test_optimiser_and_schedule(tmp_path, stored, expected):
    args = arguments(**stored)
    model = load_fairseq_checkpoint(save(tmp_path / "checkpoint.pt", args, tensors(args)))
    assert {name: model.hparams[name] for name in expected} == expected


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture
def meters(monkeypatch):
    """Provides a module fairseq.meters while a checkpoint is being written."""
    module = types.ModuleType("fairseq.meters")
    for name in ("AverageMeter", "TimeMeter", "StopwatchMeter"):
        setattr(module, name, type(name, (), {"__module__": "fairseq.meters"}))
    monkeypatch.setitem(sys.modules, "fairseq", types.ModuleType("fairseq"))
    monkeypatch.setitem(sys.modules, "fairseq.meters", module)
    return module


def test_progress_meters_are_passed_over(tmp_path, meters, monkeypatch):
    kept = collections.OrderedDict()
    for name in ("AverageMeter", "TimeMeter", "StopwatchMeter"):
        kept[name] = getattr(meters, name)()
        kept[name].sum = 2.5
    args = arguments()
    extra = {"extra_state": {"train_meters": kept}, "last_optimizer_state": {"state": {}}}
    save(tmp_path / "checkpoint.pt", args, tensors(args), **extra)
    monkeypatch.delitem(sys.modules, "fairseq.meters")
    load_fairseq_checkpoint(tmp_path / "checkpoint.pt")


class Harmful:
    """Writes a file when it is unpickled without restrictions."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_other_objects_are_refused_by_name(tmp_path, zipped):
    path = tmp_path / "checkpoint.pt"
    for thing, name in (
        (Harmful(tmp_path / "harm"), r"pathlib\S*\.Path\.touch|__builtin__\.getattr|getattr"),
        (decimal.Decimal(1), r"decimal\.Decimal"),
    ):
        contents = {"args": arguments(), "model": {}, "extra_state": thing}
        torch.save(contents, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=f"refused, it holds a ({name}); expected tensors"):
            load_fairseq_checkpoint(path)
        assert is_fairseq_checkpoint(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_formats_of_torch(tmp_path, zipped):
    args = arguments()
    state = tensors(args)
    path = tmp_path / "checkpoint.pt"
    torch.save({"args": args, "model": state}, path, _use_new_zipfile_serialization=zipped)
    assert is_fairseq_checkpoint(path)
    assert is_fairseq_checkpoint(str(path))
    compare_with_forward(load_fairseq_checkpoint(path), args, state, atol=2e-5)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"checkpoint\.pt: torch cannot read it; expected a"):
        load_fairseq_checkpoint(path)


def test_what_is_no_fairseq_checkpoint(tmp_path):
    (tmp_path / "text").write_text("args model\n" * 1000)
    (tmp_path / "empty").touch()
    torch.save({"state_dict": {}, "args": 1}, tmp_path / "torch")
    save(tmp_path / "fairseq.pt", arguments(), tensors(arguments()))
    main(["from_fairseq", str(tmp_path / "fairseq.pt"), str(tmp_path / "lightning")])
    lightning = {"args": 1, "model": 2, "pytorch-lightning_version": pl.__version__}
    torch.save(lightning, tmp_path / "lightning too")
    for path in sorted(tmp_path.iterdir()):
        assert is_fairseq_checkpoint(path) == (path.name == "fairseq.pt"), path.name
    assert not is_fairseq_checkpoint(tmp_path)
    assert not is_fairseq_checkpoint("best")
    with pytest.raises(InputError, match=r"best: no such file; expected a fairseq checkpoint"):
        load_fairseq_checkpoint("best")
    with pytest.raises(InputError, match=r"text: torch cannot read it; expected a fairseq"):
        load_fairseq_checkpoint(tmp_path / "text")
    with pytest.raises(InputError, match=r"torch: has the keys \['args', 'state_dict'\]; expected"):
        load_fairseq_checkpoint(tmp_path / "torch")


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"character_embeddings": True}, "--character-embeddings is True, word vectors made of"),
        ({"no_token_positional_embeddings": True}, "--no-token-positional-embeddings is True"),
        ({"layernorm_embedding": True}, "--layernorm-embedding is True, a layer norm on the"),
        ({"add_bos_token": True}, "--add-bos-token is True, rows that begin with <s>"),
        ({"decoder_layers_to_keep": "0,2"}, "--decoder-layers-to-keep is 0,2, a selection of"),
        ({"decoder_input_dim": 8}, "--decoder-input-dim is 8; expected --decoder-embed-dim, wh"),
        ({"decoder_output_dim": 8}, "--decoder-output-dim is 8; expected --decoder-embed-dim"),
        ({"activation_fn": "tanh"}, "--activation-fn is tanh; expected relu or gelu"),
        ({"adaptive_input_cutoff": "x"}, "--adaptive-input-cutoff is 'x'; expected integers"),
        ({"adaptive_softmax_cutoff": "300"}, r"--adaptive-softmax-cutoff is \[300\] for 200 wo"),
    ],
)
def test_models_that_ours_is_not(tmp_path, changes, message):
    args = arguments()
    save(tmp_path / "checkpoint.pt", Namespace(**vars(args) | changes), tensors(args))
    with pytest.raises(InputError, match=f"checkpoint\\.pt: {message}"):
        load_fairseq_checkpoint(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("tied", [False, True])
def test_a_bias_on_the_logits(tmp_path, tied):
    """Such a bias exists in the original GNN-LM's fairseq."""
    args = arguments(**PLAIN | {"add_bias": True, "share_decoder_input_output_embed": tied})
    bias = {"decoder.xl_bias": torch.randn(VOCAB)}
    model = load_fairseq_checkpoint(save(tmp_path / "lm.pt", args, tensors(args), bias))
    hidden, words = torch.randn(5, WIDTH), model.softmax.weight
    expected = (hidden @ words.T + bias["decoder.xl_bias"]).log_softmax(-1)
    torch.testing.assert_close(model.softmax.log_prob(hidden), expected)
    main(["from_fairseq", str(tmp_path / "lm.pt"), str(tmp_path / "lm.ckpt")])
    again = load_model(tmp_path / "lm.ckpt")
    torch.testing.assert_close(again.softmax.log_prob(hidden), expected)
    with pytest.raises(InputError, match=r"--model\.output_bias is true; expected false"):
        export_args(again)
    without = Namespace(**vars(args) | {"add_bias": False})
    with pytest.raises(InputError, match=r"found that decoder\.xl_bias is unexpected"):
        load_fairseq_checkpoint(save(tmp_path / "lm.pt", without, tensors(args), bias))
    with pytest.raises(InputError, match=r"found that decoder\.xl_bias is missing"):
        load_fairseq_checkpoint(save(tmp_path / "lm.pt", args, tensors(args)))


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    args = arguments()
    state = tensors(args)
    del state["decoder.layers.1.fc1.bias"], state["decoder.layers.0.self_attn.k_proj.weight"]
    state["decoder.layers.2.fc1.bias"] = torch.zeros(3)
    state["encoder.version"] = torch.zeros(1)
    state["decoder.layers.0.fc2.weight"] = torch.zeros(3, 4)
    save(tmp_path / "checkpoint.pt", args, state)
    expected = (
        "expected the tensors that its arguments describe; found that "
        "decoder.layers.0.self_attn.k_proj.weight is missing, "
        "decoder.layers.1.fc1.bias is missing, decoder.layers.2.fc1.bias is unexpected, "
        "decoder.layers.0.fc2.weight is [3, 4] instead of [32, 24]"
    )
    with pytest.raises(InputError, match=re.escape(expected)):
        load_fairseq_checkpoint(tmp_path / "checkpoint.pt")


def test_embedding_version_and_ties_are_checked(tmp_path):
    args = arguments()
    state = tensors(args)
    path = tmp_path / "checkpoint.pt"
    without = {k: v for k, v in state.items() if k != "decoder.adaptive_softmax.version"}
    with pytest.raises(InputError, match=r"has no decoder\.adaptive_softmax\.version; expected"):
        load_fairseq_checkpoint(save(path, args, without))
    plain = arguments(**PLAIN)
    with pytest.raises(InputError, match=r"has no decoder\.embed_tokens\.weight; expected the emb"):
        load_fairseq_checkpoint(save(path, plain, state))
    name = "decoder.adaptive_softmax.tail.0.2.weight"
    with pytest.raises(InputError, match=r"its arguments tie input and output, but the tensors"):
        load_fairseq_checkpoint(save(path, args, state | {name: state[name] + 1}))


def test_the_commands_say_what_is_wrong_in_one_sentence(tmp_path, capsys):
    path = tmp_path / "model.ckpt"
    for command in ("from_fairseq", "to_fairseq"):
        with pytest.raises(SystemExit) as stopped:
            main([command, str(path), str(tmp_path / "out")])
        assert stopped.value.code == 2
        assert f"error: {path}: no such file; expected a" in capsys.readouterr().err
    args = arguments(**VARIANTS["post-norm"])
    save(tmp_path / "post.pt", args, tensors(args))
    main(["from_fairseq", str(tmp_path / "post.pt"), str(path)])
    for source, message in ((path, "--model.pre_norm is false"), (tmp_path / "post.pt", "Lightn")):
        with pytest.raises(SystemExit):
            main(["to_fairseq", str(source), str(tmp_path / "out")])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
