"""`Scorer`: any language model in a test or prediction run of Lightning."""

import pytorch_lightning as pl

from neighborlm.common.contracts import Batch, LanguageModel, Scored, Want
from neighborlm.models.metrics import TokenLoss


class Scorer(pl.LightningModule):
    """Scores batches with a model, which need be no module of torch, and adds up its loss.

    One pass has one Scorer; others of other wants may be made of the same model before and after.

    Args:
        model: a module of torch is put onto the trainer's device, and in evaluation mode.
        want: what each step is to tell of every token; see `Want.and_also`.

    Attributes:
        test_loss: of the tokens of the last test run, over all ranks.
        lm_loss: of the language model alone that the model stands on, if there is one.
    """

    def __init__(self, model: LanguageModel, want: Want) -> None:
        super().__init__()
        self.model = model
        self.want = want
        self.test_loss = TokenLoss()
        self.lm_loss = TokenLoss()
        if hasattr(model, "hparams"):  # for the loggers
            self.save_hyperparameters(dict(model.hparams))

    def on_test_epoch_start(self) -> None:
        """Starts new sums."""
        self.test_loss.reset()
        self.lm_loss.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> Scored:
        """What is wanted of the batch's tokens; their losses are added to those of the run."""
        scored = self.model.score(batch, self.want)
        if scored.log_probs is not None:
            self.test_loss.update(scored.log_probs)
        if scored.lm_log_probs is not None:
            self.lm_loss.update(scored.lm_log_probs)
        return scored

    def predict_step(self, batch: Batch, batch_idx: int) -> Scored:
        """What is wanted of the batch's tokens."""
        return self.model.score(batch, self.want)

    def _end_of_pass(self) -> None:
        self.eval()  # as it is, but a model forgets what it has kept for this pass

    on_test_epoch_end = on_predict_epoch_end = _end_of_pass
