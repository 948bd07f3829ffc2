"""`TransformerLM`: the language model of kNN-LM as a LightningModule."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from neighborlm.common.errors import InputError
from neighborlm.models.adaptive import AdaptiveInput, AdaptiveSoftmax, OutputSoftmax, PlainSoftmax
from neighborlm.models.decoder import (
    Decoder,
    DecoderLayer,
    LearnedPositions,
    SinusoidalPositions,
    key_layer,
)
from neighborlm.models.language_model import LanguageModel, TokenScores

MORE_THAN_ZERO = (
    *("width", "ffn_width", "layers", "heads", "max_target_positions", "lr", "lr_period_updates"),
    *("adaptive_input_factor", "adaptive_softmax_factor"),
)
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "softmax_dropout")


class TransformerLM(LanguageModel):
    """Decoder-only transformer with adaptive input and softmax (Baevski & Auli, ICLR 2019).

    Args:
        vocab_size: number of ids; the program takes it from the corpus.
        width: of the hidden vectors.
        ffn_width: of the feed-forward blocks.
        layers: number of layers.
        heads: attention heads a layer.
        adaptive_input_cutoffs: first id of each band of rarer words in the input embedding; those
            beyond the vocabulary are left out; empty for a plain embedding.
        adaptive_input_factor: how much narrower each band is than the one before.
        adaptive_softmax_cutoffs: the same for the output.
        adaptive_softmax_factor: the same for the output.
        tie_weights: input and output share their word vectors.
        tie_projections: adaptive input and softmax share the projections of the bands too.
        output_bias: a bias on the logits of a plain softmax.
        max_target_positions: longest row of tokens the model reads.
        positions: sinusoidal or learned.
        pre_norm: layer norms in front of the blocks, not behind.
        final_norm: a layer norm after the last layer.
        scale_embedding: multiply embeddings with sqrt(width).
        activation: of the feed-forward blocks.
        dropout: on embeddings and on the output of each block.
        attention_dropout: on attention weights.
        activation_dropout: after the activation of the feed-forward blocks.
        softmax_dropout: on the inputs of the adaptive softmax.
        optimizer: Nesterov's accelerated gradient (`nag`) or `adam`.
        lr: peak learning rate.
        schedule: `cosine` with restarts, `inverse_sqrt`, or `constant`, each after a warm-up.
        warmup_updates: updates of linear warm-up.
        warmup_init_lr: learning rate of the first update.
        min_lr: where the cosine ends.
        lr_period_updates: length of the first cosine period.
        t_mult: how much longer each further period is.
        lr_shrink: what learning rates are multiplied with at each further period.
        momentum: of `nag`.
        adam_betas: of `adam`.
        weight_decay: of either.
        activation_checkpointing: recompute each layer in the backward pass: less memory, more time.
        compile: compile the decoder with torch.compile.
    """

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
        optimizer: Literal["nag", "adam"] = "adam",
        lr: float = 1e-3,
        schedule: Literal["cosine", "inverse_sqrt", "constant"] = "cosine",
        warmup_updates: int = 100,
        warmup_init_lr: float = 1e-7,
        min_lr: float = 1e-6,
        lr_period_updates: int = 10000,
        t_mult: float = 1.0,
        lr_shrink: float = 1.0,
        momentum: float = 0.99,
        adam_betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
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
        if hparams.t_mult < 1:
            raise InputError(f"--model.t_mult is {hparams.t_mult}; expected at least 1")
        for side in ("input", "softmax"):
            name = f"--model.adaptive_{side}_cutoffs"
            cutoffs = list(hparams[f"adaptive_{side}_cutoffs"])
            if cutoffs != sorted({c for c in cutoffs if c > 0}):
                raise InputError(f"{name} are {cutoffs}; expected ascending ids, the first over 0")
        if hparams.output_bias and hparams.adaptive_softmax_cutoffs:
            raise InputError(
                "--model.output_bias needs a plain softmax, but --model.adaptive_softmax_cutoffs "
                f"are {list(hparams.adaptive_softmax_cutoffs)}; expected none"
            )
        bands, factor = hparams.adaptive_input_cutoffs, hparams.adaptive_input_factor
        if hparams.width // factor ** len(bands) < 1:
            raise InputError(
                f"--model.adaptive_input_cutoffs {list(bands)} with --model.adaptive_input_factor "
                f"{factor} leave no width to the last band; expected fewer, as --model.width is "
                f"{hparams.width}"
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
    def max_target_positions(self) -> int:
        return self.hparams.max_target_positions

    def key_width(self, key_type: str) -> int:
        key_layer(key_type, self.hparams.layers)
        return self.hparams.width

    def forward(
        self, tokens: Tensor, key_types: Sequence[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden vectors and features; see `Decoder.forward`."""
        return self.decoder(tokens, key_types)

    def score(self, batch, with_log_probs: bool = True) -> TokenScores:
        hidden, features = self(batch.tokens, self.wanted_features)
        features = {name: feature[batch.scored] for name, feature in features.items()}
        targets = batch.targets[batch.scored]
        return TokenScores(
            batch.positions[batch.scored],
            targets,
            self.softmax.target_log_prob(hidden[batch.scored], targets) if with_log_probs else None,
            features.get(self.key_type),
            rescoring_keys=features.get(self.rescoring_key_type),
        )
