"""`GNNLM`: a language model whose tokens attend to their retrieved neighbours and to the context of
these (Meng et al., ICLR 2022).

A graph network between the features of a trained LM and its softmax. The neighbours and their
features come with the batch.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from neighborlm.common.contracts import Backbone, Batch, Scored, Want
from neighborlm.common.errors import InputError
from neighborlm.models.adaptive import PlainSoftmax
from neighborlm.models.distributions import entropy_and_top
from neighborlm.models.hgt import HGT
from neighborlm.models.metrics import TokenLoss
from neighborlm.models.neighbor_states import NeighborStates
from neighborlm.models.trainable_lm import TrainableLM
from neighborlm.models.transformer_lm import TransformerLM

Part = Literal["adaptive_softmax", "embedding", "layers"]
OF_NETWORK = {
    **{"layers": 3, "width": None, "heads": 8, "intra_context": None},
    **{"residual": False, "values": False, "lm_ratio": 0.0, "output_bias": False},
}
"""The settings that describe a graph network besides its weights, with their defaults; the default
width is the LM's."""


class GNNLM(TrainableLM):
    """A graph network on top of a language model, which stays frozen by default.

    Where the softmax is trained or gets a bias, it also scores the LM's features for `lm_ratio` and
    `lm_path_probability`, as in the original; figures of the LM alone use the LM's own, unchanged
    softmax.

    Args:
        lm: the trained LM, which becomes part of this model. Only a `TransformerLM` can have parts
            trained or a bias added to its softmax.
        layers: number of layers of the graph network; by default 3.
        width: width of the network's states; by default the LM's, with which training begins near
            the LM itself; smaller is faster.
        heads: attention heads per layer; by default 8. It must divide width.
        intra_context: how many tokens of its own block a token attends to, itself included; by
            default itself and all before it. With 0 the network learns from neighbours alone.
        residual: add a projection of the network's output to the LM's features, where the paper
            replaces them; by default false. Training then begins at the LM itself: set it for
            short trainings.
        values: add a projection of the word vector of each neighbour's token to its features; by
            default false. In the paper the token shows only in the features of the next row.
        lm_ratio: weight of the LM's own distribution in a mixture with the graph network's; by
            default 0.
        output_bias: train a bias on the logits of a plain softmax, starting from the LM's if it has
            one; by default false.
        dropout: dropout on the messages of each layer; raise it if the network overfits.
        attention_dropout: dropout on the attention weights.
        lm_path_probability: share of training batches that bypass the graph network, to train the
            unfrozen parts of the LM on their own.
        unfreeze: parts of the LM that are trained too: adaptive_softmax (the output softmax, always
            as a copy of the LM's), embedding, layers.

    Raises:
        InputError: the settings contradict one another or do not fit the LM.
    """

    COMPUTING = ("heads", "intra_context", "lm_ratio")

    def __init__(
        self,
        lm: Backbone,
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
        **optimization,
    ) -> None:
        super().__init__(**optimization)
        self.lm = lm
        unfreeze = list(unfreeze)
        self.save_hyperparameters(ignore=["lm"])
        own = isinstance(lm, TransformerLM)
        described = {**lm.hparams, "compile": False} if own else None
        self.save_hyperparameters({"vocab_size": lm.vocab_size, "lm": described})
        default = OF_NETWORK | {"width": lm.width}
        unset = [name for name in OF_NETWORK if self.hparams[name] is None]
        self.save_hyperparameters({name: default[name] for name in unset})
        self._check()
        h = self.hparams
        self.lm_fingerprint: str | None = None
        """Fingerprint of the LM whose datastores it reads; saved with checkpoints."""
        self.neighbors: dict | None = None
        """Describes the neighbours that it saw in training; saved with checkpoints."""
        self.code_decoder: nn.Module | None = None
        """From codes uint8 `[n, M]` to features `[n, width]`, for neighbours that come as codes."""
        self.neighbor_states: NeighborStates | None = None
        """Those of earlier batches; see `_cached_states`."""
        self.val_lm_loss = TokenLoss()
        """Of the LM alone, beside `val_loss`."""
        self.network = HGT(lm.width, h.width, h.layers, h.heads, dropout, attention_dropout)
        self.network.freeze_unused(h.intra_context)
        self.residual = None
        if h.residual:
            self.residual = nn.Linear(lm.width, lm.width, bias=False)
            nn.init.zeros_(self.residual.weight)
        self.of_values = None
        if h["values"]:  # not `h.values`, a method of every dictionary
            self.of_values = nn.Linear(lm.width, lm.width, bias=False)
        self.softmax = lm.softmax if own else None
        """That of a `TransformerLM`, or the copy of it that is trained; None for any other LM."""
        self._unfreeze(unfreeze)
        self.register_load_state_dict_post_hook(GNNLM._forget)
        self.train()

    def _check(self) -> None:
        h = self.hparams
        for name in ("layers", "heads"):
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
        if h.unfreeze and not isinstance(self.lm, TransformerLM):
            raise InputError(
                f"--model.unfreeze is {h.unfreeze}, but the LM is a {type(self.lm).__name__}; "
                "expected a TransformerLM, or none of its parts"
            )
        if h.output_bias and not isinstance(getattr(self.lm, "softmax", None), PlainSoftmax):
            raise InputError(
                "--model.output_bias is true; expected false, as the LM has no plain softmax"
            )

    def _unfreeze(self, parts: Sequence[Part]) -> None:
        if isinstance(self.lm, nn.Module):
            self.lm.requires_grad_(False)
        if "adaptive_softmax" in parts or self.hparams.output_bias:
            self.softmax = copy.deepcopy(self.lm.softmax)
            self.softmax.requires_grad_("adaptive_softmax" in parts)
        if self.hparams.output_bias:
            self.softmax.add_bias()
        if "embedding" in parts:
            self.lm.decoder.embedding.requires_grad_(True)
            self.lm.decoder.positions.requires_grad_(True)
        if "layers" in parts:
            self.lm.decoder.layers.requires_grad_(True)
            self.lm.decoder.final_norm.requires_grad_(True)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the same as the LM's."""
        return self.lm.vocab_size

    @property
    def reads_subwords(self) -> bool:
        """Whether ids are those of a tokenizer, which may have fewer than the vocabulary."""
        return getattr(self.lm, "reads_subwords", False)

    @property
    def trains_features(self) -> bool:
        """Whether training changes the LM's features."""
        return bool({"embedding", "layers"} & set(self.hparams.unfreeze))

    @property
    def leaves_out_parameters(self) -> bool:
        """Whether some batches bypass the graph network."""
        return self.hparams.lm_path_probability > 0

    def _computing(self) -> Mapping[str, Any]:
        own = isinstance(self.lm, TransformerLM)
        return {**super()._computing(), **({} if own else {"lm": self.lm.fingerprint})}

    def train(self, mode: bool = True) -> "GNNLM":
        """Training or evaluation mode. Dropout stays off in an LM that is not trained."""
        self._forget()
        super().train(mode)
        if isinstance(self.lm, nn.Module):
            self.lm.train(mode and self.trains_features)
        if self.softmax is not None:
            self.softmax.train(mode and "adaptive_softmax" in self.hparams.unfreeze)
        return self

    def _forget(self, *_: Any) -> None:
        self.neighbor_states = None

    @property
    def max_target_positions(self) -> int:
        """Longest row that the model reads, in tokens."""
        return self.lm.max_target_positions

    def key_width(self, key_type: str) -> int:
        """Width of `gnn`, the output of the graph network, or of a feature of the LM."""
        return self.lm.width if key_type == "gnn" else self.lm.key_width(key_type)

    def neighbor_features(self, stored: Tensor, values: Tensor | None = None) -> Tensor:
        """Features of neighbours.

        Args:
            stored: rows of the feature store: codes uint8 `[n, M]`, keys `[n, width]`, or tokens
                int64 `[n]`, which give word vectors, neither scaled nor with positions.
            values: tokens int64 `[n]`, for a network with `values`.

        Returns:
            fp32 `[n, width]`.
        """
        if stored.dtype == torch.int64:
            features = self.lm.embed(stored)
        else:
            features = self.code_decoder(stored) if stored.dtype == torch.uint8 else stored.float()
        if self.of_values is not None:
            features = features + self.of_values(self.lm.embed(values))
        return features

    def _cached_states(self, store: int) -> NeighborStates | None:
        """The cache for neighbours of a feature store; None where their states may change.

        It is dropped by `eval()` and `train()`, which Lightning calls at the beginning of every
        validation, test or prediction, by `load_state_dict`, and by a forward pass with gradients,
        which precedes every update. After any other change of weights, call `eval()`.
        """
        if self.training or torch.is_grad_enabled() or self.hparams.layers == 1:
            self._forget()
        elif self.neighbor_states is None or self.neighbor_states.store != store:
            self.neighbor_states = NeighborStates(self.hparams.layers - 1, store)
        return self.neighbor_states

    def forward(
        self, batch: Batch, key_types: Sequence[str] = ()
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """From an `LMBatch` with neighbours to the features of the LM and of the graph network,
        `[B, T, width]` each, and the features by key type."""
        features: dict[str, Tensor] = {}
        lm_key_types = [key_type for key_type in key_types if key_type != "gnn"]
        hidden = batch.token_features
        if hidden is None or lm_key_types:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_features):
                computed, features = self.lm.hidden(batch.tokens, lm_key_types)
            hidden = computed if hidden is None else hidden
        neighborhood = batch.neighborhood
        stored, values = neighborhood.features, neighborhood.values

        def features_of(numbers: Tensor | slice) -> Tensor:
            return self.neighbor_features(
                stored[numbers], None if values is None else values[numbers]
            )

        out = self.network.fast(
            hidden,
            features_of,
            neighborhood,
            self.hparams.intra_context,
            self._cached_states(neighborhood.store),
        )
        if self.residual is not None:
            out = hidden + self.residual(out)
        return hidden, out, {**features, "gnn": out}

    @property
    def head(self) -> nn.Module | Backbone:
        """The module that turns the network's features into log-probabilities."""
        return self.lm if self.softmax is None else self.softmax

    def score(self, batch: Batch, want: Want) -> Scored:
        """See `common.contracts.LanguageModel.score`; the batch must have neighbours."""
        hidden, out, features = self(batch, want.keys)
        hidden, out, targets = (x[batch.scored] for x in (hidden, out, batch.targets))
        log_probs = lm_log_probs = None
        if want.log_probs:
            log_probs = self.head.target_log_prob(out, targets)
            if self.hparams.lm_ratio:
                of_lm = self.head.target_log_prob(hidden, targets)
                log_probs = mix(of_lm, log_probs, self.hparams.lm_ratio)
            if not self.training:  # those of the LM alone, for comparison
                lm_log_probs = self.lm.target_log_prob(hidden, targets)
        return Scored(
            batch.positions[batch.scored],
            targets,
            log_probs,
            {key_type: features[key_type][batch.scored] for key_type in want.keys},
            **entropy_and_top(self._log_prob, want, self.vocab_size, hidden, out),
            lm_log_probs=lm_log_probs,
        )

    def _log_prob(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Natural-log probability of every token, fp32 `[n, vocab_size]`, from features of the LM
        and of the network."""
        log_probs = self.head.log_prob(out)
        if not self.hparams.lm_ratio:
            return log_probs
        return mix(self.head.log_prob(hidden), log_probs, self.hparams.lm_ratio)

    def training_log_probs(self, batch: Batch) -> Tensor:
        """Those of the graph network, or of the LM's path around it, by the trained softmax either
        way. All ranks take the same path."""
        if self.hparams.lm_path_probability:
            draw = np.random.default_rng(self.batch_seed).random()
            if draw < self.hparams.lm_path_probability:
                hidden, _ = self.lm.hidden(batch.tokens)
                targets = batch.targets[batch.scored]
                return self.head.target_log_prob(hidden[batch.scored], targets)
        return super().training_log_probs(batch)

    @torch.inference_mode()
    def begin_as_lm(self, batches: Iterable[Batch]) -> None:
        """Initialises the network so that training begins near the LM itself; see
        `HGT.begin_as_identity`.

        Args:
            batches: a few, of any split.
        """
        if self.residual is not None:
            return
        self.eval()
        hidden = [self.lm.hidden(batch.tokens)[0][batch.scored] for batch in batches]
        self.network.begin_as_identity(torch.cat(hidden))
        self.train()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds to the validation losses."""
        scored = self.score(batch, Want())
        self.val_loss.update(scored.log_probs)
        self.val_lm_loss.update(scored.lm_log_probs)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`, `val/ppl` and, for the LM alone, `val/lm_ppl`."""
        self._forget()
        super().on_validation_epoch_end()
        self.log("val/lm_ppl", self.val_lm_loss.compute()["loss"].exp().float())
        self.val_lm_loss.reset()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Records the LM whose features the neighbours have, and what the neighbours were. The
        weights of an LM that is not ours are left where they are."""
        super().on_save_checkpoint(checkpoint)
        if not isinstance(self.lm, TransformerLM):
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {n: w for n, w in weights.items() if not n.startswith("lm.")}
        checkpoint["lm_fingerprint"] = self.lm_fingerprint
        checkpoint["lm_checkpoint"] = getattr(self.lm, "checkpoint", None)
        checkpoint["neighbors"] = self.neighbors

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Adds the weights that were left out.

        Raises:
            InputError: the LM is not the one of the training.
        """
        if isinstance(self.lm, TransformerLM) or not isinstance(self.lm, nn.Module):
            return
        expected = checkpoint["lm_fingerprint"]
        if expected not in (None, self.lm.fingerprint):
            raise InputError(
                f"--model.pretrained {self.hparams.get('pretrained')}: is another model "
                f"({self.lm.fingerprint}) than the graph network was trained on ({expected}); "
                "expected the model of then"
            )
        weights = {f"lm.{name}": weight for name, weight in self.lm.state_dict().items()}
        checkpoint["state_dict"] = weights | checkpoint["state_dict"]


def mix(lm_log_prob: Tensor, gnn_log_prob: Tensor, lm_ratio: float) -> Tensor:
    """log(r p_LM + (1 - r) p_GNN), computed in log space."""
    return torch.logaddexp(lm_log_prob + math.log(lm_ratio), gnn_log_prob + math.log1p(-lm_ratio))
