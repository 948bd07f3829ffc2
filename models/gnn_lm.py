"""`GNNLM`: a language model whose tokens attend to their retrieved neighbours and to what
surrounded them (Meng et al., ICLR 2022).

A graph network between a trained LM's features and its softmax. What the neighbours are, and their
features, comes with the batch.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from neighborlm.common.errors import InputError
from neighborlm.models.adaptive import PlainSoftmax
from neighborlm.models.hgt import HGT
from neighborlm.models.language_model import LanguageModel, TokenScores
from neighborlm.models.metrics import TokenLoss
from neighborlm.models.neighbor_states import NeighborStates
from neighborlm.models.transformer_lm import TransformerLM

Part = Literal["adaptive_softmax", "embedding", "layers"]
OF_NETWORK = {
    **{"layers": 3, "width": None, "heads": 8, "intra_context": None},
    **{"residual": False, "values": False, "lm_ratio": 0.0, "output_bias": False},
}
"""What a network is, besides its weights, and what a new one is by default: of `start_from` as its
checkpoint says."""


class GNNLM(LanguageModel):
    """A graph network on top of a language model, frozen unless told otherwise.

    A softmax that is trained, or gets a bias, scores the LM's features too where `lm_ratio` or
    `lm_path_probability` asks for them, as in the original; what is reported of the LM alone goes
    through the LM's own softmax, as it was.

    Args:
        vocab_size: number of ids; the program takes it from the corpus.
        lm_checkpoint: the trained LM, of train.py or of fairseq.
        start_from: checkpoint of a GNN-LM whose weights to start from, the LM's included; settings
            from layers to output_bias are then the checkpoint's, and need not be given.
        lm: settings of the LM, for checkpoints of this model, which hold its weights; leave it out.
        layers: of the graph network; by default 3.
        width: of its states; by default the LM's.
        heads: attention heads a layer; by default 8.
        intra_context: tokens of its own block that a token attends to, itself included; by default
            all before it; 0 for none, so that all it learns comes from neighbours.
        residual: add a projection of what the network gives to the LM's features, where the paper
            puts it in their place: training then begins at the LM itself.
        values: add to each neighbour's features a projection of its token's word vector, where in
            the paper the token shows only in the features of the row after it.
        lm_ratio: weight of the LM's own distribution in a mixture with the graph network's; by
            default 0.
        output_bias: train a bias on the logits of a plain softmax, from the LM's on if it has one.
        dropout: on the messages of each layer.
        attention_dropout: on its attention weights.
        lm_path_probability: share of training batches that take the LM's path past the graph
            network, for parts that are not frozen.
        unfreeze: parts of the LM that are trained too: adaptive_softmax (the output softmax, a
            copy where it shares weights with the input), embedding, layers.
        optimizer: `adam`, or Nesterov's accelerated gradient `nag`.
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

    Raises:
        InputError: the settings contradict one another, or the LM cannot be read.
    """

    def __init__(
        self,
        vocab_size: int,
        lm_checkpoint: str | None = None,
        start_from: str | None = None,
        lm: dict | None = None,
        layers: int | None = None,
        width: int | None = None,
        heads: int | None = None,
        intra_context: int | None = None,
        residual: bool | None = None,
        values: bool | None = None,
        lm_ratio: float | None = None,
        output_bias: bool | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        lm_path_probability: float = 0.0,
        unfreeze: Sequence[Part] = (),
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
    ) -> None:
        super().__init__()
        start = None if start_from is None else self._load(start_from, "start_from", GNNLM)
        if start is not None:
            lm = start.hparams.lm
        elif lm is None and lm_checkpoint is None:
            raise InputError(
                "--model.lm_checkpoint is missing; expected the checkpoint of a trained LM"
            )
        self.lm = self._make_lm(lm, lm_checkpoint)
        lm = {**self.lm.hparams, "compile": False}
        unfreeze = list(unfreeze)
        self.save_hyperparameters()
        self.save_hyperparameters(self._settled(start))
        self._check()
        h = self.hparams
        self.lm_fingerprint: str | None = None
        """Of the LM whose datastores it reads; saved with checkpoints."""
        self.neighbors: dict | None = None
        """What features its neighbours had in training; saved with checkpoints."""
        self.code_decoder: nn.Module | None = None
        """From codes uint8 `[n, M]` to features `[n, width]`, where neighbours come as codes."""
        self.known: NeighborStates | None = None
        """States of neighbours that are computed once in a pass without training."""
        self.lm_loss = TokenLoss()
        """Of the LM alone, beside `test_loss`."""
        self.network = HGT(
            self.lm.hparams.width,
            h.width,
            h.layers,
            h.heads,
            dropout,
            attention_dropout,
        )
        self.network.freeze_unused(h.intra_context)
        self.residual = None
        if h.residual:
            self.residual = nn.Linear(self.lm.hparams.width, self.lm.hparams.width, bias=False)
            nn.init.zeros_(self.residual.weight)
        self.of_values = None
        if h["values"]:  # `values` is a method of every dictionary
            self.of_values = nn.Linear(self.lm.hparams.width, self.lm.hparams.width, bias=False)
        self.softmax = self.lm.softmax
        self._unfreeze(unfreeze)
        if start is not None:
            self.load_state_dict(start.state_dict())
            self.lm_fingerprint, self.neighbors = start.lm_fingerprint, start.neighbors
        self.train()

    @classmethod
    def _make_lm(cls, lm: dict | None, lm_checkpoint: str | None) -> TransformerLM:
        # Called straight from __init__, Lightning would take its arguments for the LM's own.
        if lm is not None:
            return TransformerLM(**lm)
        return cls._load(lm_checkpoint, "lm_checkpoint", TransformerLM)

    @staticmethod
    def _load(path: str, name: str, kind: type[LanguageModel]) -> LanguageModel:
        from neighborlm.programs.checkpoints import load_model  # which knows this class

        model = load_model(Path(path))
        if not isinstance(model, kind):
            raise InputError(
                f"--model.{name} {path}: holds a {type(model).__name__}; expected a {kind.__name__}"
            )
        return model

    def _settled(self, start: "GNNLM | None") -> dict[str, Any]:
        """The settings of `OF_NETWORK`: those of the checkpoint to start from, else what is given
        or by default."""
        given = {name: self.hparams[name] for name in OF_NETWORK}
        if start is None:
            default = OF_NETWORK | {"width": self.lm.hparams.width}
            return {name: default[name] if given[name] is None else given[name] for name in given}
        for name, value in given.items():
            if value is not None and value != start.hparams[name]:
                raise InputError(
                    f"--model.{name} is {value}, but --model.start_from {self.hparams.start_from} "
                    f"has {start.hparams[name]}; expected the same, or no such flag"
                )
        own_softmax = start.softmax is not start.lm.softmax and not start.hparams.output_bias
        if own_softmax and "adaptive_softmax" not in self.hparams.unfreeze:
            raise InputError(
                f"--model.start_from {self.hparams.start_from}: has trained a softmax of its own; "
                "expected --model.unfreeze to name adaptive_softmax"
            )
        return {name: start.hparams[name] for name in OF_NETWORK}

    def _check(self) -> None:
        h, lm = self.hparams, self.lm.hparams
        if h.vocab_size != lm.vocab_size:
            raise InputError(
                f"--model.lm_checkpoint {h.lm_checkpoint}: has a vocabulary of {lm.vocab_size}, "
                f"but the corpus one of {h.vocab_size}; pass the LM's dict.txt as --data.dictionary"
            )
        for name in ("layers", "heads", "lr", "lr_period_updates"):
            if not h[name] > 0:
                raise InputError(f"--model.{name} is {h[name]}; expected more than 0")
        for name in ("dropout", "attention_dropout", "lm_ratio", "lm_path_probability"):
            if not 0 <= h[name] < 1:
                raise InputError(f"--model.{name} is {h[name]}; expected 0 <= {name} < 1")
        if h.intra_context is not None and h.intra_context < 0:
            raise InputError(f"--model.intra_context is {h.intra_context}; expected at least 0")
        if h.width < 1 or h.width % h.heads:
            raise InputError(
                f"--model.width {h.width} is not a multiple of --model.heads {h.heads}"
            )
        if h.lm_path_probability and not h.unfreeze:
            raise InputError(
                f"--model.lm_path_probability is {h.lm_path_probability}, but nothing on the LM's "
                "path is trained; expected --model.unfreeze to name a part"
            )
        if h.output_bias and not isinstance(self.lm.softmax, PlainSoftmax):
            raise InputError("--model.output_bias needs an LM with a plain softmax, not adaptive")

    def _unfreeze(self, parts: Sequence[Part]) -> None:
        self.lm.requires_grad_(False)
        if "adaptive_softmax" in parts or self.hparams.output_bias:
            self.softmax = copy.deepcopy(self.lm.softmax)
            self.softmax.requires_grad_("adaptive_softmax" in parts)
        if self.hparams.output_bias:
            self.softmax.add_bias()
        decoder = self.lm.decoder
        if "embedding" in parts:
            decoder.embedding.requires_grad_(True)
            decoder.positions.requires_grad_(True)
        if "layers" in parts:
            decoder.layers.requires_grad_(True)
            decoder.final_norm.requires_grad_(True)

    @property
    def trains_features(self) -> bool:
        """Whether training changes the LM's features."""
        return bool({"embedding", "layers"} & set(self.hparams.unfreeze))

    @property
    def leaves_out_parameters(self) -> bool:
        """A batch that takes the LM's path leaves out the graph network."""
        return self.hparams.lm_path_probability > 0

    def train(self, mode: bool = True) -> "GNNLM":
        """Dropout stays off in an LM that is not trained."""
        super().train(mode)
        self.lm.train(mode and self.trains_features)
        self.softmax.train(mode and "adaptive_softmax" in self.hparams.unfreeze)
        return self

    @property
    def max_target_positions(self) -> int:
        """Longest row the model reads."""
        return self.lm.max_target_positions

    def key_width(self, key_type: str) -> int:
        """Width of `gnn`, the output of the graph network, or of a feature of the LM."""
        return self.lm.hparams.width if key_type == "gnn" else self.lm.key_width(key_type)

    def neighbor_features(self, stored: Tensor, values: Tensor | None = None) -> Tensor:
        """Features of neighbours.

        Args:
            stored: what the feature store holds: codes uint8 `[n, M]`, keys `[n, width]` or tokens
                int64 `[n]`, whose word vectors are taken, neither scaled nor with positions.
            values: tokens int64 `[n]`, for a network that is shown them besides.

        Returns:
            fp32 `[n, width]`.
        """
        embedding = self.lm.decoder.embedding
        if stored.dtype == torch.int64:
            features = embedding(stored)
        else:
            features = self.code_decoder(stored) if stored.dtype == torch.uint8 else stored.float()
        if self.of_values is not None:
            features = features + self.of_values(embedding(values))
        return features

    def forward(self, batch, key_types: Sequence[str] = ()) -> tuple[Tensor, Tensor, dict]:
        """Features of the LM and of the graph network `[B, T, width]`, and features by key type."""
        features: dict[str, Tensor] = {}
        wanted = [key_type for key_type in key_types if key_type != "gnn"]
        hidden = batch.token_features
        if hidden is None or wanted:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_features):
                computed, features = self.lm(batch.tokens, wanted)
            hidden = computed if hidden is None else hidden
        neighborhood = batch.neighborhood
        stored, values = neighborhood.features, neighborhood.values

        def features_of(numbers: Tensor | slice) -> Tensor:
            return self.neighbor_features(
                stored[numbers], None if values is None else values[numbers]
            )

        out = self.network.fast(
            hidden, features_of, neighborhood, self.hparams.intra_context, self.known
        )
        if self.residual is not None:
            out = hidden + self.residual(out)
        return hidden, out, {**features, "gnn": out}

    def score(self, batch, with_log_probs: bool = True) -> TokenScores:
        """See `LanguageModel.score`."""
        wanted = self.wanted_features
        hidden, out, features = self(batch, wanted)
        features = {name: features[name][batch.scored] for name in wanted}
        hidden, out, targets = (x[batch.scored] for x in (hidden, out, batch.targets))
        log_probs = lm_log_probs = None
        if with_log_probs:
            log_probs = self.softmax.target_log_prob(out, targets)
            if self.hparams.lm_ratio:
                beside = self.softmax.target_log_prob(hidden, targets)
                log_probs = mix(beside, log_probs, self.hparams.lm_ratio)
            if not self.training:  # what the LM says itself, for comparison
                lm_log_probs = self.lm.softmax.target_log_prob(hidden, targets)
        return TokenScores(
            batch.positions[batch.scored],
            targets,
            log_probs,
            features.get(self.key_type),
            lm_log_probs,
            features.get(self.rescoring_key_type),
        )

    def training_log_probs(self, batch) -> Tensor:
        """By the graph network, or by the LM's path past it; through the trained softmax either
        way. All ranks take the same path."""
        if self.hparams.lm_path_probability:
            which = (torch.initial_seed(), self.trainer.fit_loop.total_batch_idx)
            if np.random.default_rng(which).random() < self.hparams.lm_path_probability:
                hidden, _ = self.lm(batch.tokens)
                targets = batch.targets[batch.scored]
                return self.softmax.target_log_prob(hidden[batch.scored], targets)
        return super().training_log_probs(batch)

    @torch.inference_mode()
    def begin_as_lm(self, batches: Iterable) -> None:
        """Lets training begin near the LM itself; see `HGT.begin_as_identity`.

        Args:
            batches: a few `LMBatch`es of any split.
        """
        if self.residual is not None:
            return
        self.lm.eval()
        hidden = [self.lm(batch.tokens)[0][batch.scored] for batch in batches]
        self.network.begin_as_identity(torch.cat(hidden))
        self.train()

    def _remember(self) -> None:
        """For a pass in which no weight changes."""
        self.known = NeighborStates(self.hparams.layers - 1) if self.hparams.layers > 1 else None

    def on_validation_epoch_start(self) -> None:
        """Neighbours' states are of the weights as they are now."""
        self._remember()

    def on_predict_epoch_start(self) -> None:
        """As for validation."""
        self._remember()

    def on_predict_epoch_end(self) -> None:
        """Frees them."""
        self.known = None

    def on_test_epoch_end(self) -> None:
        """Frees them."""
        self.known = None

    def validation_step(self, batch, batch_idx: int) -> None:
        """Adds to the validation losses."""
        scores = self.score(batch)
        self.val_loss.update(scores.log_probs)
        self.lm_loss.update(scores.lm_log_probs)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss` and `val/ppl`, and the LM's alone as `val/lm_ppl`."""
        self.known = None
        super().on_validation_epoch_end()
        self.log("val/lm_ppl", self.lm_loss.compute()["loss"].exp().float())
        self.lm_loss.reset()

    def test_step(self, batch, batch_idx: int) -> TokenScores:
        """Scores of the batch; the losses over the split are in `test_loss` and `lm_loss`."""
        scores = super().test_step(batch, batch_idx)
        self.lm_loss.update(scores.lm_log_probs)
        return scores

    def on_test_epoch_start(self) -> None:
        """Starts new sums."""
        self._remember()
        super().on_test_epoch_start()
        self.lm_loss.reset()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Records what the neighbours are features of."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lm_fingerprint"] = self.lm_fingerprint
        checkpoint["neighbors"] = self.neighbors


def mix(lm_log_prob: Tensor, gnn_log_prob: Tensor, lm_ratio: float) -> Tensor:
    """log(r p_LM + (1 - r) p_GNN), in log space."""
    return torch.logaddexp(lm_log_prob + math.log(lm_ratio), gnn_log_prob + math.log1p(-lm_ratio))
