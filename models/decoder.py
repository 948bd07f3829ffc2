"""The transformer decoder: from token ids to hidden vectors, and to the features that become the
keys of a datastore.

Vaswani et al. (2017), with layer norms in front of the blocks (pre-norm) as in Baevski & Auli (ICLR
2019), or behind them (post-norm).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from neighborlm.common.errors import InputError
from neighborlm.models.attention_cache import AttentionCache, Extend

POSITION_OFFSET = 2  # as in fairseq, positions are numbered from the padding id + 1 on


def key_layer(key_type: str, layers: int) -> tuple[int, Literal["ffn_input", "output"]] | None:
    """The layer (from 0) and the point in it that a key type names; None for `last_hidden`.

    Key types: `last_ffn_input` (input of the last layer's feed-forward block, after its layer norm
    in a pre-norm model: the best in Khandelwal et al., 2020, table 5), `last_hidden` (output of the
    stack), `layer:<i>:ffn_input` and `layer:<i>:output`.

    Raises:
        InputError: another name, or a layer that the model does not have.

    >>> key_layer("last_ffn_input", 16)
    (15, 'ffn_input')
    """
    if key_type == "last_hidden":
        return None
    if key_type == "last_ffn_input":
        return layers - 1, "ffn_input"
    match key_type.split(":"):
        case ["layer", number, ("ffn_input" | "output") as point] if number.isdecimal():
            if int(number) < layers:
                return int(number), point
            raise InputError(
                f"--knn.key_type is {key_type}, but the model's layers are 0 to {layers - 1}"
            )
    raise InputError(
        f"--knn.key_type is {key_type!r}; expected last_ffn_input, last_hidden, "
        "layer:<i>:ffn_input or layer:<i>:output"
    )


class SinusoidalPositions(nn.Module):
    """Sines, then cosines, of the frequencies 10000^(-j / (width/2 - 1)), j = 0 .. width/2 - 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Integers, because they stay exact in a model of half precision: rounded frequencies would
        # shift the angles of later positions by whole radians.
        self.register_buffer("exponents", torch.arange(width // 2), persistent=False)
        self.width = width

    def forward(self, positions: Tensor) -> Tensor:
        """From positions in a row, int64 `[...]`, to fp32 `[..., width]`."""
        scale = -math.log(10000) / max(len(self.exponents) - 1, 1)
        frequencies = torch.exp(self.exponents.float() * scale)
        angles = (positions + POSITION_OFFSET)[..., None].float() * frequencies
        table = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return F.pad(table, (0, self.width - table.shape[-1]))


class LearnedPositions(nn.Module):
    """A learned vector for each position of a row."""

    def __init__(self, width: int, max_positions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, positions: Tensor) -> Tensor:
        """From positions in a row, int64 `[...]`, to `[..., width]`."""
        return self.weight[positions]


class DecoderLayer(nn.Module):
    """Causal self-attention and a feed-forward block, each with a residual connection and a layer
    norm."""

    def __init__(
        self,
        width: int,
        ffn_width: int,
        heads: int,
        pre_norm: bool,
        activation: Literal["relu", "gelu"],
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.pre_norm = pre_norm
        self.activation = {"relu": F.relu, "gelu": F.gelu}[activation]
        self.dropout = nn.Dropout(dropout)
        self.attention_dropout = attention_dropout
        self.activation_dropout = nn.Dropout(activation_dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn_width)
        self.fc2 = nn.Linear(ffn_width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights: Xavier, those of query, key and value each on its own; biases: zero."""
        for linear in (self.qkv, self.attention_out, self.fc1, self.fc2):
            nn.init.zeros_(linear.bias)
        for weight in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(weight, gain=2**-0.5)
        for linear in (self.attention_out, self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)

    def attend(self, x: Tensor, extend: Extend | None = None) -> Tensor:
        """Causal multi-head attention, `[B, T, width]` to the same; `extend` adds what was read
        before."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if extend is None:
            dropout = self.attention_dropout if self.training else 0.0
            messages = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            k, v, mask = extend(k, v)
            messages = F.scaled_dot_product_attention(q, k, v, mask)
        return self.attention_out(messages.transpose(1, 2).reshape(batch, length, width))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The two-layer perceptron, `[..., width]` to the same."""
        return self.fc2(self.activation_dropout(self.activation(self.fc1(x))))

    def forward(self, x: Tensor, extend: Extend | None = None) -> tuple[Tensor, Tensor]:
        """From `[B, T, width]` to the layer's output and the input of its feed-forward block."""
        if self.pre_norm:
            x = x + self.dropout(self.attend(self.attention_norm(x), extend))
            ffn_input = self.ffn_norm(x)
            return x + self.dropout(self.feed_forward(ffn_input)), ffn_input
        ffn_input = self.attention_norm(x + self.dropout(self.attend(x, extend)))
        return self.ffn_norm(ffn_input + self.dropout(self.feed_forward(ffn_input))), ffn_input


class Decoder(nn.Module):
    """Embedding, positions and a stack of layers.

    Args:
        embedding: module from ids `[B, T]` to `[B, T, width]`.
        layers: the stack.
        positions: module from positions `[...]` to `[..., width]`.
        width: of the hidden vectors.
        scale: factor of the embedding.
        dropout: on the sum of embedding and positions.
        final_norm: whether a layer norm follows the last layer.
        checkpoint_layers: recompute activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        embedding: nn.Module,
        layers: Sequence[DecoderLayer],
        positions: nn.Module,
        width: int,
        scale: float,
        dropout: float,
        final_norm: bool,
        checkpoint_layers: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.positions = positions
        self.layers = nn.ModuleList(layers)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.final_norm = nn.LayerNorm(width) if final_norm else nn.Identity()
        self.checkpoint_layers = checkpoint_layers

    def forward(
        self, tokens: Tensor, key_types: Sequence[str] = (), cache: AttentionCache | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Without a cache, padding must be on the right: only the causal attention hides it from
        the other tokens.

        Args:
            tokens: int64 `[B, T]`.
            key_types: of the features to return as well; see `key_layer`.
            cache: of the tokens read before, to which these are added; they may then be -1 in
                front of the first token of a row.

        Returns:
            The output of the stack `[B, T, width]`, and the features by key type, in that shape.
        """
        wanted = {key_type: key_layer(key_type, len(self.layers)) for key_type in key_types}
        if cache is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            positions, tokens = cache.extend(tokens), tokens.clamp(min=0)
        x = self.scale * self.embedding(tokens)
        x = self.dropout(x + self.positions(positions).to(x.dtype))
        features: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if self.checkpoint_layers and torch.is_grad_enabled():
                x, ffn_input = checkpoint(layer, x, use_reentrant=False)
            else:
                x, ffn_input = layer(x, None if cache is None else cache.of_layer(i))
            points = {(i, "ffn_input"): ffn_input, (i, "output"): x}
            features |= {name: points[at] for name, at in wanted.items() if at in points}
        x = self.final_norm(x)
        features |= {name: x for name, at in wanted.items() if at is None}
        return x, features
