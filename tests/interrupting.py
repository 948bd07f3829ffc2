"""A callback by which a training interrupts itself."""

import signal

from pytorch_lightning import Callback, LightningModule, Trainer


class Interrupt(Callback):
    """Sends this process a SIGINT, also where those that run in the background ignore it.

    Args:
        moment: a hook of callbacks, or `stepped`, when the optimizer has changed the parameters.
        call: the how manieth time.
    """

    def __init__(self, moment: str, call: int) -> None:
        self.left = call
        setattr(self, moment, self._called)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer is made."""
        if hasattr(self, "stepped"):
            trainer.optimizers[0].register_step_post_hook(self.stepped)

    def _called(self, *_) -> None:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGINT)
