"""A callback by which a training interrupts itself."""

import signal

from pytorch_lightning import Callback, LightningModule, Trainer


class Interrupt(Callback):
    """Sends this process a signal, also a SIGINT where that was ignored.

    Args:
        moment: a hook of callbacks, or `stepped`, when the optimizer has changed the parameters.
        call: at which call of it.
        number: of the signal.
    """

    def __init__(self, moment: str, call: int, number: int = signal.SIGINT) -> None:
        self.left = call
        self.number = number
        setattr(self, moment, self._called)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer is made."""
        if hasattr(self, "stepped"):
            trainer.optimizers[0].register_step_post_hook(self.stepped)

    def _called(self, *_) -> None:
        self.left -= 1
        if not self.left:
            signal.raise_signal(self.number)
