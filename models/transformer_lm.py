"""`TransformerLM`: the language model of kNN-LM as a LightningModule.

It knows nothing of retrieval. Its test step gives the log-probability of every scored target and,
where `key_type` is set, the vector of its context.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from errors import InputError
from models import schedules
from models.adaptive import AdaptiveInput, AdaptiveSoftmax, OutputSoftmax, PlainSoftmax
from models.decoder import (
    Decoder,
    DecoderLayer,
    LearnedPositions,
    SinusoidalPositions,
    key_layer,
)
from models.metrics import TokenLoss

MORE_THAN_ZERO = (
    *("width", "ffn_width", "layers", "heads", "max_target_positions", "lr", "lr_period_updates"),
    *("adaptive_input_factor", "adaptive_softmax_factor"),
)
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "softmax_dropout")


class TokenScores(NamedTuple):
    """What a model says of the scored tokens of a batch, `n` of them, in row order.

    Attributes:
        positions: int64 `[n]`, offset of each target in its split.
        targets: int64 `[n]`.
        log_probs: fp32 `[n]`, natural-log probability of each target; None when only keys were
            asked for.
        keys: `[n, width]`, the feature `key_type` of each target's context; None without one.
    """

    positions: Tensor
    targets: Tensor
    log_probs: Tensor | None
    keys: Tensor | None


class TransformerLM(pl.LightningModule):
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
        self.val_loss = TokenLoss()
        self.test_loss = TokenLoss()
        self.key_type: str | None = None
        """Which feature test and predict steps return as keys."""
        self.dictionary_fingerprint: str | None = None
        """Of the vocabulary that it was trained with; saved with checkpoints."""
        self.updates = 0
        """Optimiser steps it had when it was saved."""
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
            return PlainSoftmax(h.vocab_size, h.width, tied)
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
        """Longest row the model reads."""
        return self.hparams.max_target_positions

    def key_width(self, key_type: str) -> int:
        """Width of the vectors of a key type.

        Raises:
            InputError: the model has no such feature.
        """
        key_layer(key_type, self.hparams.layers)
        return self.hparams.width

    def forward(
        self, tokens: Tensor, key_types: Sequence[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden vectors and features; see `Decoder.forward`."""
        return self.decoder(tokens, key_types)

    def score(self, batch, with_log_probs: bool = True) -> TokenScores:
        """Log-probabilities and keys of the scored tokens of an `LMBatch`."""
        key_types = () if self.key_type is None else (self.key_type,)
        hidden, features = self(batch.tokens, key_types)
        targets = batch.targets[batch.scored]
        return TokenScores(
            batch.positions[batch.scored],
            targets,
            self.softmax.target_log_prob(hidden[batch.scored], targets) if with_log_probs else None,
            features[self.key_type][batch.scored] if self.key_type is not None else None,
        )

    def training_step(self, batch, batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the batch's targets."""
        loss = -self.score(batch).log_probs.mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx: int) -> None:
        """Adds to the validation loss."""
        self.val_loss.update(self.score(batch).log_probs)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss` and `val/ppl`."""
        loss = self.val_loss.compute()["loss"]
        self.val_loss.reset()
        self.log_dict({"val/loss": loss.float(), "val/ppl": loss.exp().float()}, prog_bar=True)

    def test_step(self, batch, batch_idx: int) -> TokenScores:
        """Scores of the batch; the loss over the split is in `test_loss` at the end."""
        scores = self.score(batch)
        self.test_loss.update(scores.log_probs)
        return scores

    def on_test_epoch_start(self) -> None:
        """Starts a new sum."""
        self.test_loss.reset()

    def predict_step(self, batch, batch_idx: int) -> TokenScores:
        """Keys of the batch, without the softmax."""
        return self.score(batch, with_log_probs=False)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Records which dictionary the ids belong to."""
        if self.trainer.datamodule is not None:
            checkpoint["dictionary"] = self.trainer.datamodule.dictionary.fingerprint

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the norm of the gradient before it is clipped."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.log("train/grad_norm", nn.utils.get_total_norm(gradients))

    def configure_optimizers(self):
        """The optimiser and, per update, its schedule."""
        h = self.hparams
        if h.optimizer == "nag":
            optimizer = torch.optim.SGD(
                self.parameters(),
                h.lr,
                momentum=h.momentum,
                nesterov=True,
                weight_decay=h.weight_decay,
            )
        else:
            optimizer = torch.optim.AdamW(
                self.parameters(), h.lr, betas=h.adam_betas, weight_decay=h.weight_decay
            )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda update: self.learning_rate(update) / h.lr
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def learning_rate(self, update: int) -> float:
        """The schedule's learning rate at an update, from 0."""
        h = self.hparams
        warm = {"peak": h.lr, "warmup_updates": h.warmup_updates, "warmup_init": h.warmup_init_lr}
        if h.schedule == "cosine":
            return schedules.cosine(
                update,
                floor=h.min_lr,
                period=h.lr_period_updates,
                t_mult=h.t_mult,
                shrink=h.lr_shrink,
                **warm,
            )
        if h.schedule == "inverse_sqrt":
            return schedules.inverse_sqrt(update, **warm)
        return h.lr if update >= h.warmup_updates else schedules.inverse_sqrt(update, **warm)
