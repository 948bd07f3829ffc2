"""Which random numbers a training draws: each batch's follow from the run's seed and from where the
batch stands in the training, so that a training that goes on from a checkpoint draws what it would
have drawn, whatever else has drawn in between and wherever it was interrupted."""

import random

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from neighborlm.common.contracts import Batch


class RandomNumbers(Callback):
    """Seeds the generators of torch, on all devices, of numpy and of Python before every batch.

    As `fairseq` does; states of generators, in checkpoints, would have to be collected from all
    ranks, which cannot be done when one of them is lost.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Ranks draw numbers of their own, but for those that come of `batch_seed`."""
        number = batch_idx % trainer.accumulate_grad_batches
        pl_module.batch_seed = (self.seed, trainer.global_step, number)
        seeds = np.random.SeedSequence((*pl_module.batch_seed, trainer.global_rank))
        for_torch, for_numpy, for_python = seeds.generate_state(3).tolist()
        torch.manual_seed(for_torch)
        np.random.seed(for_numpy)  # noqa: NPY002 (for whoever draws from it)
        random.seed(for_python)
