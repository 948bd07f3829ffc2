"""The model `neighborlm` of lm-evaluation-harness: its `hf`, with the memories of a run.

Importing this module registers it. Likelihoods are searched for at the places of continuations
alone, and rolling perplexities at every place; generation goes through `with_memory`.
"""

from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from neighborlm.common.errors import InputError
from neighborlm.programs.with_memory import with_memory

__all__ = ["NeighborLM", "cli_evaluate"]


@register_model("neighborlm")
class NeighborLM(HFLM):
    """A causal language model of transformers with a memory.

    Args:
        pretrained: see `HFLM`.
        memory: directory of a run, in which evaluate.py has evaluated this model with memories.
        lmbda: see `with_memory`.
        settings: all others of `HFLM`.

    Raises:
        InputError: `memory` is missing, or not of this model.
    """

    def __init__(
        self,
        pretrained: Any,
        memory: Path | str | None = None,
        lmbda: float | None = None,
        **settings: Any,
    ) -> None:
        if memory is None:
            raise InputError(
                "--model_args: has no memory; expected memory=RUN, the directory of a run that "
                "evaluate.py has evaluated with --knnlm"
            )
        super().__init__(pretrained, **settings)
        self._model = with_memory(self._model, memory, lmbda)
        self.row = 0
        """Of the batch that was scored last, the next to be picked apart."""

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The model's own logits; what the memories need to know of the batch is kept."""
        self.row = 0
        with self._model.remembering.listening():
            return super()._model_call(inps, *args, **kwargs)

    def _select_cont_toks(
        self, logits: Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> Tensor:
        """The log-probabilities of the mixture at a continuation, `[contlen, V]`; rows of a batch
        come in their order."""
        own = super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)
        row, self.row = self.row, self.row + 1
        return self._model.remembering.mixed_in_row(row, inplen, own)
