"""`Scorer`: any language model in a test or prediction run of Lightning."""

import pytorch_lightning as pl

from neighborlm.common.contracts import Batch, LanguageModel, Scored, Want
from neighborlm.models.metrics import TokenLoss


class Scorer(pl.LightningModule):
    """Scores batches with a model and sums up its loss.

    Each pass has a Scorer of its own; one model may serve several, with different wants.

    Args:
        model: need not be a torch module; one that is goes to the trainer's device and into
            evaluation mode.
        want: what each step returns of every token.

    Attributes:
        test_loss: of the tokens of the last test run, over all ranks.
        lm_loss: the same for the language model on which the model stands, if there is one.
        first_position: offset of the first token that counts. Those before it, which each step
            returns too, bring memories up to this rank's part of the text.
    """

    def __init__(self, model: LanguageModel, want: Want) -> None:
        super().__init__()
        self.model = model
        self.want = want
        self.test_loss = TokenLoss()
        self.lm_loss = TokenLoss()
        self.first_position = 0
        if hasattr(model, "hparams"):  # for the loggers
            self.save_hyperparameters(dict(model.hparams))

    def on_test_epoch_start(self) -> None:
        """Resets the losses."""
        self.test_loss.reset()
        self.lm_loss.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> Scored:
        """What is wanted of the batch's tokens; adds their losses to those of the run."""
        scored = self.model.score(batch, self.want)
        counted = scored.positions >= self.first_position if self.first_position else slice(None)
        if scored.log_probs is not None:
            self.test_loss.update(scored.log_probs[counted])
        if scored.lm_log_probs is not None:
            self.lm_loss.update(scored.lm_log_probs[counted])
        return scored

    def predict_step(self, batch: Batch, batch_idx: int) -> Scored:
        """What is wanted of the batch's tokens."""
        return self.model.score(batch, self.want)

    def _end_of_pass(self) -> None:
        self.eval()  # it already is, but this makes a GNN-LM drop the states it has cached

    on_test_epoch_end = on_predict_epoch_end = _end_of_pass
