"""`HuggingFaceLM`: any causal language model of transformers as a `LanguageModel` and `Backbone`.

The network below the head runs once for a batch. The head, which is all that the model's own
`forward` does with hidden vectors (its scale and soft cap included), runs on scored tokens alone, a
few rows at a time. Keys are taken by hooks on the modules that `Layers` finds. A probe of a few
tokens checks all of this when the model is loaded.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from neighborlm.common.contracts import Batch, Scored, Step, Want
from neighborlm.common.errors import InputError
from neighborlm.models.adaptive import OutputSoftmax
from neighborlm.models.decoder import key_layer
from neighborlm.models.distributions import scored_by_hidden
from neighborlm.models.huggingface_state import HuggingFaceState
from neighborlm.models.weights import content_hash

FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "ff", "fc1")
"""Names of a layer's feed-forward block, or of its first half, in the order of preference."""
UNLIMITED = 1 << 20
"""Longest row of a model whose config names no limit, in tokens."""
VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""What a config says that changes no number; weights know their own type."""
CLOSE = {torch.float32: 1e-3}
"""How far apart the same log-probabilities may be, computed in two ways, by the type of the logits;
`ROUGHLY` in half precision."""
ROUGHLY = 0.25
ALIKE = {torch.float32: 1e-3}
"""How much vectors of equal contexts may differ, in parts of what those of different ones do, by
the type of the weights; `ROUGHLY_ALIKE` in half precision."""
ROUGHLY_ALIKE = 0.01


class HuggingFaceLM(nn.Module):
    """A causal language model of transformers, frozen and in evaluation mode.

    Args:
        model: on any device; stays the caller's, and nothing of it is replaced.
        name: for messages, such as its directory.

    Attributes:
        vocab_size: number of logits V, which may be more than the tokenizer has tokens.
        max_target_positions: longest row that it reads, in tokens.
        fingerprint: of its weights and its config as they were when it was wrapped.
        width: of the vectors that its head reads.
        reads_subwords: that ids are those of a tokenizer, which may have fewer than V.
        key_places: by key type asked for so far, what the key is, such as `input of
            transformer.h.11.mlp`.

    Raises:
        InputError: it is an encoder or has one, or its logits cannot be reproduced from its hidden
            vectors.
    """

    reads_subwords = True

    def __init__(self, model: PreTrainedModel, name: str = "the model") -> None:
        super().__init__()
        refuse_encoders(model.config, name)
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.softmax = Head(model, name)
        config = model.config.get_text_config()
        self.max_target_positions = getattr(config, "max_position_embeddings", None) or UNLIMITED
        self.layers = Layers(model, name)
        self.key_places: dict[str, str] = {}
        self._widths: dict[str, int] = {}
        self._probe()
        described = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE}
        self.fingerprint = content_hash(model, described)

    def _probe(self) -> None:
        """Two short rows that differ in their last token tell whether the model reads from left to
        right, and whether the head gives the model's own logits."""
        tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 0]], device=self.device)
        with torch.no_grad():
            hidden, _ = self.hidden(tokens)
            logits = self.model(input_ids=tokens, use_cache=False).logits.to(self.device)
        self.width, self.vocab_size = hidden.shape[-1], logits.shape[-1]
        self.softmax.columns = self.vocab_size
        own = logits.float().log_softmax(dim=-1)
        if not differ_at_the_end_alone(own, self.alike):
            raise InputError(
                f"{self.name}: what it says of a token depends on tokens behind it, as in an "
                "encoder; expected a causal language model"
            )
        with torch.no_grad():
            ours = self.log_prob(hidden.flatten(0, 1)).view_as(own)
        apart = (own - ours).abs().max()
        if not apart <= CLOSE.get(logits.dtype, ROUGHLY):
            raise InputError(
                f"{self.name}: the logits of its {type(self.model).__name__} do not follow from "
                f"its last hidden vectors alone (they differ by {apart:.2g} nats); expected a "
                "model whose head is the last that it computes"
            )

    @property
    def alike(self) -> float:
        """See `ALIKE`."""
        return ALIKE.get(self.model.dtype, ROUGHLY_ALIKE)

    @property
    def device(self) -> torch.device:
        """Where its word vectors are."""
        return self.model.get_input_embeddings().weight.device

    def _apply(self, *args: Any, **settings: Any) -> "HuggingFaceLM":
        """Moves the model, unless transformers has spread it over several devices."""
        spread = len(set(getattr(self.model, "hf_device_map", {}).values())) > 1
        return self if spread else super()._apply(*args, **settings)

    # -- keys ------------------------------------------------------------------------------------

    def key_width(self, key_type: str) -> int:
        """Width of the keys of a type, and a check of the module that they come from.

        Raises:
            InputError: the model has no keys of this type, or the module that should give them does
                not see each token once, from left to right.
        """
        if key_type not in self._widths:
            self._widths[key_type] = self._probe_keys(key_type)
        return self._widths[key_type]

    def _probe_keys(self, key_type: str) -> int:
        module, point = self.layers.place_of(key_type)
        tokens = torch.tensor([[1, 2], [1, 3]], device=self.device)
        with torch.no_grad():
            keys = self.hidden(tokens, (key_type,))[1][key_type].float()
        if keys.shape[:2] == tokens.shape and differ_at_the_end_alone(keys, self.alike):
            self.key_places[key_type] = f"{point} of {module}"
            return keys.shape[-1]
        raise InputError(
            f"--knn.key_type {key_type}: the {point} of {module} in {self.name} has the shape "
            f"{list(keys.shape)} for two rows of two tokens, or does not tell their contexts apart "
            "from left to right; expected last_hidden, or another layer"
        )

    # -- its parts: see `common.contracts.Backbone` ----------------------------------------------

    def hidden(
        self, tokens: Tensor, key_types: Sequence[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the head reads `[B, T, width]`, and keys `[B, T, d]` by key type.

        Args:
            tokens: int64 `[B, T]`, padded on the right if at all.
            key_types: only these are kept.
        """
        hidden, keys, _ = self._network(tokens, key_types, {"input_ids": tokens})
        return hidden, keys

    def _network(
        self, tokens: Tensor, key_types: Sequence[str], inputs: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Runs the network below the head: what the head reads, keys, and the network's cache."""
        with self.layers.kept(key_types) as keys:
            out = self.model.base_model(**{"use_cache": False, **inputs})
        hidden = out.last_hidden_state
        keys |= {key_type: hidden for key_type in key_types if key_type == "last_hidden"}
        # OPT flattens the rows of a batch.
        found = {name: keys[name].view(*tokens.shape, -1).to(tokens.device) for name in key_types}
        return hidden.to(tokens.device), found, out.get(self.name_of_cache)

    def target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Natural-log probability of targets; see `OutputSoftmax.target_log_prob`."""
        return self.softmax.target_log_prob(hidden, targets)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Natural-log probability of every token, `[n, width]` to fp32 `[n, vocab_size]`."""
        return self.softmax.log_prob(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        """Word vectors `[..., width]` of tokens, neither scaled nor with positions."""
        return F.embedding(tokens, self.model.get_input_embeddings().weight)

    # -- as a whole ------------------------------------------------------------------------------

    def score(self, batch: Batch, want: Want) -> Scored:
        """See `common.contracts.LanguageModel.score`."""
        return scored_by_hidden(self, batch, want)

    def step(self, tokens: Tensor, state: HuggingFaceState | None, want: Want) -> Step:
        """See `common.contracts.StepwiseModel.step`."""
        state = HuggingFaceState() if state is None else state
        inputs = state.inputs(tokens, self.name_of_cache)
        if "position_ids" not in self.parameters_of_network:  # it finds them by the mask
            del inputs["position_ids"]
        hidden, keys, state.cache = self._network(tokens, want.keys, inputs)
        return Step(self.log_prob(hidden[:, -1]), keys, state)

    @cached_property
    def parameters_of_network(self) -> frozenset[str]:
        """What the network below the head can be given."""
        return frozenset(signature(self.model.base_model.forward).parameters)

    @property
    def name_of_cache(self) -> str:
        """What this version of transformers calls the cache of what was read."""
        return "cache" if "cache" in self.parameters_of_network else "past_key_values"


def differ_at_the_end_alone(rows: Tensor, alike: float) -> bool:
    """Whether vectors `[2, T, d]` of two rows of tokens differ at the last token and not before,
    where they may by `alike` in parts of that."""
    apart = (rows[0] - rows[1]).abs().amax(dim=-1)
    return bool(rows.isfinite().all() and apart[-1] > 0 and apart[:-1].max() <= alike * apart[-1])


def refuse_encoders(config: Any, name: str) -> None:
    """Raises InputError where a config is not of a model that is a decoder alone."""
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{name}: is a {config.model_type}, an encoder with a decoder; expected a causal "
            "language model, a decoder alone"
        )


class Head(OutputSoftmax):
    """The head of a model of transformers: what its `forward` computes from hidden vectors.

    It is a shallow copy of the model, which shares all weights, with a module in place of the
    network below the head that gives the hidden vectors that it is told.

    Args:
        model: whose head it is; it is not changed, and where it goes the head goes.
        name: for messages.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        super().__init__()
        prefix = model.base_model_prefix
        if prefix not in model._modules:
            raise InputError(
                f"{name}: its {type(model).__name__} has no network apart from its head; expected "
                "a causal language model (AutoModelForCausalLM)"
            )
        headed = copy.copy(model)
        headed._modules = {**model._modules, prefix: GivenHidden()}
        # No submodule of this one: its weights are the model's.
        self.__dict__["headed"] = headed

    def logits(self, hidden: Tensor) -> Tensor:
        """From `[n, width]` to `[n, V]`, in the model's own type."""
        headed = self.__dict__["headed"]
        headed._modules[headed.base_model_prefix].hidden = hidden[None]
        no_tokens = hidden.new_zeros(1, len(hidden), dtype=torch.int64)
        return headed(input_ids=no_tokens, use_cache=False).logits[0].to(hidden.device)

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(self.logits(hidden).float(), targets, reduction="none")

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Natural-log probability of every token, `[n, width]` to fp32 `[n, V]`."""
        return self.logits(hidden).float().log_softmax(dim=-1)


class GivenHidden(nn.Module):
    """Stands in for the network below a head: its last hidden vectors are given."""

    hidden: Tensor

    @property
    def decoder(self) -> "GivenHidden":
        """Itself: OPT asks its network's decoder."""
        return self

    def forward(self, *args: Any, **settings: Any) -> "Outputs":
        """The vectors, whatever is asked for."""
        return Outputs(self.hidden)


class Outputs:
    """What a network of transformers returns, with hidden vectors and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


class Layers:
    """The layers of a model of transformers, and where in them keys are read.

    Args:
        model: whose layers they are.
        name: for messages.

    Attributes:
        path: name of their list within the model.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model = model
        self.name = name
        self.path, self.layers = layers_of(model)

    def place_of(self, key_type: str) -> tuple[str, Literal["input", "output"]]:
        """The name of the module whose input or output the key is, and which of the two.

        Raises:
            InputError: no such type, layer or module.
        """
        at = key_layer(key_type, len(self.layers))
        if at is None:
            return self.model.base_model_prefix, "output"
        layer, point = at
        path = f"{self.path}.{layer}"
        if point == "output":
            return path, "output"
        children = dict(self.layers[layer].named_children())
        found = next((name for name in FEED_FORWARD if name in children), None)
        if found is None:
            raise InputError(
                f"--knn.key_type {key_type}: {path} of {self.name} has {', '.join(children)}, none "
                f"of them a known feed-forward block ({', '.join(FEED_FORWARD)}); expected "
                f"last_hidden or layer:{layer}:output"
            )
        return f"{path}.{found}", "input"

    @contextmanager
    def kept(self, key_types: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Fills a dictionary with the keys of a forward pass within the body."""
        keys: dict[str, Tensor] = {}
        hooks: list[RemovableHandle] = []

        def keep(key_type: str, value: Any) -> None:
            keys[key_type] = value if isinstance(value, Tensor) else value[0]

        def hook(key_type: str) -> RemovableHandle:
            path, point = self.place_of(key_type)
            module = self.model.get_submodule(path)
            if point == "output":
                return module.register_forward_hook(lambda _, __, out: keep(key_type, out))
            return module.register_forward_pre_hook(
                lambda _, given, named: keep(key_type, (*given, *named.values())[0]),
                with_kwargs=True,
            )

        try:
            hooks += [hook(key_type) for key_type in key_types if key_type != "last_hidden"]
            yield keys
        finally:
            for handle in hooks:
                handle.remove()


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's layers: the last list of as many modules as its config has
    layers, or else its longest list."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = {
        path: modules
        for path, modules in lists.items()
        if not any(path.startswith(f"{other}.") for other in lists)
    }
    fitting = {path: modules for path, modules in outer.items() if len(modules) == count}
    found = list((fitting or outer).items())
    if not found:
        return "", nn.ModuleList()
    return found[-1] if fitting else max(found, key=lambda item: len(item[1]))
