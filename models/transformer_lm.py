"""`TransformerLM`: the language model of kNN-LM as a LightningModule."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from neighborlm.common.contracts import Batch, Scored, Step, Want
from neighborlm.common.errors import InputError
from neighborlm.models.adaptive import AdaptiveInput, AdaptiveSoftmax, OutputSoftmax, PlainSoftmax
from neighborlm.models.attention_cache import AttentionCache
from neighborlm.models.decoder import (
    Decoder,
    DecoderLayer,
    LearnedPositions,
    SinusoidalPositions,
    key_layer,
)
from neighborlm.models.distributions import scored_by_hidden
from neighborlm.models.trainable_lm import TrainableLM

MORE_THAN_ZERO = (
    *("width", "ffn_width", "layers", "heads", "max_target_positions"),
    *("adaptive_input_factor", "adaptive_softmax_factor"),
)
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "softmax_dropout")


class TransformerLM(TrainableLM):
    """Decoder-only transformer with adaptive input and softmax (Baevski & Auli, ICLR 2019).

    Args:
        vocab_size: number of ids; the program takes it from the corpus.
        width: width of the hidden vectors, and so of the keys of a datastore.
        ffn_width: width of the feed-forward blocks; usually four times the width.
        layers: number of layers.
        heads: attention heads per layer; it must divide width.
        adaptive_input_cutoffs: first id of each band of rarer words in the input embedding; by
            default none, a plain embedding. Set them for vocabularies of tens of thousands of
            words; cutoffs beyond the vocabulary are ignored.
        adaptive_input_factor: ratio of the widths of one band of the input and the next.
        adaptive_softmax_cutoffs: first id of each band of rarer words in the output softmax; by
            default none, a plain softmax. See adaptive_input_cutoffs.
        adaptive_softmax_factor: ratio of the widths of one band of the softmax and the next.
        tie_weights: share word vectors between input and output, which must then have the same
            bands.
        tie_projections: share the projections of the bands between input and output too, where both
            are adaptive.
        output_bias: add a bias to the logits of a plain softmax.
        max_target_positions: longest row that the model reads, in tokens; raise it if
            --data.tokens_per_sample is larger.
        positions: position embeddings: sinusoidal, or learned.
        pre_norm: put layer norms in front of the blocks, not behind them.
        final_norm: add a layer norm after the last layer.
        scale_embedding: multiply embeddings by sqrt(width).
        activation: activation function of the feed-forward blocks.
        dropout: dropout on embeddings and on the output of each block; raise it if the model
            overfits, set it to 0 if the model is too small for its text.
        attention_dropout: dropout on attention weights.
        activation_dropout: dropout after the activation of the feed-forward blocks.
        softmax_dropout: dropout on the inputs of an adaptive softmax.
        activation_checkpointing: recompute each layer in the backward pass, which saves memory and
            takes longer.
        compile: compile the decoder by torch.compile; worth it on a GPU and for many updates.
    """

    COMPUTING = ("heads", "pre_norm", "scale_embedding", "activation", "positions")

    def __init__(
        self,
        vocab_size: int,
        width: int = 512,
        ffn_width: int = 2048,
        layers: int = 6,
        heads: int = 8,
        adaptive_input_cutoffs: Sequence[int] = (),
        adaptive_input_factor: float = 4,
        adaptive_softmax_cutoffs: Sequence[int] = (),
        adaptive_softmax_factor: float = 4,
        tie_weights: bool = True,
        tie_projections: bool = True,
        output_bias: bool = False,
        max_target_positions: int = 1024,
        positions: Literal["sinusoidal", "learned"] = "sinusoidal",
        pre_norm: bool = True,
        final_norm: bool = False,
        scale_embedding: bool = True,
        activation: Literal["relu", "gelu"] = "relu",
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        softmax_dropout: float = 0.0,
        activation_checkpointing: bool = False,
        compile: bool = False,
        **optimization,
    ) -> None:
        super().__init__(**optimization)
        adaptive_input_cutoffs = [c for c in adaptive_input_cutoffs if c < vocab_size]
        adaptive_softmax_cutoffs = [c for c in adaptive_softmax_cutoffs if c < vocab_size]
        self.save_hyperparameters()
        self._check(self.hparams)
        self.decoder = self._build_decoder()
        self.softmax = self._build_softmax()
        if compile:
            self.decoder.compile()

    @staticmethod
    def _check(hparams) -> None:
        for name in MORE_THAN_ZERO:
            if not hparams[name] > 0:
                raise InputError(f"--model.{name} is {hparams[name]}; expected more than 0")
        for name in DROPOUTS:
            if not 0 <= hparams[name] < 1:
                raise InputError(f"--model.{name} is {hparams[name]}; expected 0 <= {name} < 1")
        for side in ("input", "softmax"):
            name = f"--model.adaptive_{side}_cutoffs"
            cutoffs = list(hparams[f"adaptive_{side}_cutoffs"])
            if cutoffs != sorted({c for c in cutoffs if c > 0}):
                raise InputError(f"{name} are {cutoffs}; expected ascending ids above 0")
        if hparams.output_bias and hparams.adaptive_softmax_cutoffs:
            raise InputError(
                "--model.output_bias needs a plain softmax, but --model.adaptive_softmax_cutoffs "
                f"are {list(hparams.adaptive_softmax_cutoffs)}; expected no cutoffs"
            )
        cutoffs, factor = list(hparams.adaptive_input_cutoffs), hparams.adaptive_input_factor
        if hparams.width // factor ** len(cutoffs) < 1:
            raise InputError(
                f"--model.adaptive_input_cutoffs {cutoffs} with --model.adaptive_input_factor "
                f"{factor} leave the last band no width; expected fewer cutoffs or a smaller "
                f"factor, as --model.width is {hparams.width}"
            )
        if hparams.width % hparams.heads:
            raise InputError(
                f"--model.width {hparams.width} is not a multiple of --model.heads {hparams.heads}"
            )
        adaptive_in, adaptive_out = (
            list(hparams.adaptive_input_cutoffs),
            list(hparams.adaptive_softmax_cutoffs),
        )
        if hparams.tie_weights and (
            adaptive_in != adaptive_out
            or (adaptive_in and hparams.adaptive_input_factor != hparams.adaptive_softmax_factor)
        ):
            raise InputError(
                "--model.tie_weights needs the same bands in input and output, found "
                f"--model.adaptive_input_cutoffs {adaptive_in} (factor "
                f"{hparams.adaptive_input_factor}) and --model.adaptive_softmax_cutoffs "
                f"{adaptive_out} (factor {hparams.adaptive_softmax_factor})"
            )

    def _build_decoder(self) -> Decoder:
        h = self.hparams
        if h.adaptive_input_cutoffs:
            embedding = AdaptiveInput(
                h.vocab_size, h.width, h.adaptive_input_cutoffs, h.adaptive_input_factor
            )
        else:
            embedding = nn.Embedding(h.vocab_size, h.width)
            nn.init.normal_(embedding.weight, std=h.width**-0.5)
        if h.positions == "sinusoidal":
            positions = SinusoidalPositions(h.width)
        else:
            positions = LearnedPositions(h.width, h.max_target_positions)
        layers = [
            DecoderLayer(
                h.width,
                h.ffn_width,
                h.heads,
                h.pre_norm,
                h.activation,
                h.dropout,
                h.attention_dropout,
                h.activation_dropout,
            )
            for _ in range(h.layers)
        ]
        return Decoder(
            embedding,
            layers,
            positions,
            h.width,
            scale=h.width**0.5 if h.scale_embedding else 1.0,
            dropout=h.dropout,
            final_norm=h.final_norm,
            checkpoint_layers=h.activation_checkpointing,
        )

    def _build_softmax(self) -> OutputSoftmax:
        h = self.hparams
        embedding = self.decoder.embedding
        if not h.adaptive_softmax_cutoffs:
            tied = embedding.weight if h.tie_weights else None
            softmax = PlainSoftmax(h.vocab_size, h.width, tied)
            if h.output_bias:
                softmax.add_bias()
            return softmax
        return AdaptiveSoftmax(
            h.vocab_size,
            h.width,
            h.adaptive_softmax_cutoffs,
            h.adaptive_softmax_factor,
            h.softmax_dropout,
            tied=embedding if h.tie_weights else None,
            tie_projections=h.tie_projections,
        )

    @property
    def vocab_size(self) -> int:
        return self.hparams.vocab_size

    @property
    def max_target_positions(self) -> int:
        return self.hparams.max_target_positions

    @property
    def width(self) -> int:
        """Width of the hidden vectors and of the word vectors."""
        return self.hparams.width

    def key_width(self, key_type: str) -> int:
        key_layer(key_type, self.hparams.layers)
        return self.hparams.width

    # -- its parts: see `common.contracts.Backbone` ----------------------------------------------

    def hidden(
        self, tokens: Tensor, key_types: Sequence[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden vectors and features; see `Decoder.forward`."""
        return self.decoder(tokens, key_types)

    def target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Natural-log probability of targets; see `OutputSoftmax.target_log_prob`."""
        return self.softmax.target_log_prob(hidden, targets)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Natural-log probability of every token, `[n, width]` to fp32 `[n, vocab_size]`."""
        return self.softmax.log_prob(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        """Word vectors `[..., width]` of tokens, neither scaled nor with positions."""
        return self.decoder.embedding(tokens)

    # -- as a whole ------------------------------------------------------------------------------

    def score(self, batch: Batch, want: Want) -> Scored:
        """See `common.contracts.LanguageModel.score`."""
        return scored_by_hidden(self, batch, want)

    def step(self, tokens: Tensor, state: AttentionCache | None, want: Want) -> Step:
        """See `common.contracts.StepwiseModel.step`.

        Raises:
            ValueError: a row would be longer than `max_target_positions`.
        """
        state = AttentionCache() if state is None else state
        if state.width + tokens.shape[1] > self.max_target_positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens after {state.width}, where a row holds "
                f"{self.max_target_positions}"
            )
        hidden, features = self.decoder(tokens, want.keys, state)
        return Step(self.log_prob(hidden[:, -1]), features, state)
