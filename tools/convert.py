"""`neighborlm convert ...`: checkpoints of fairseq to ours and back."""

from jsonargparse import auto_cli

from neighborlm.originals.conversion import convert, export
from neighborlm.programs.exits import exit_with_one_sentence


@exit_with_one_sentence
def main(args: list[str] | None = None) -> None:
    """Reads and writes checkpoints of fairseq.

    neighborlm convert from_fairseq checkpoint_best.pt lm.ckpt
    neighborlm convert to_fairseq lm.ckpt checkpoint_best.pt
    """
    auto_cli(
        {"from_fairseq": convert, "to_fairseq": export},
        args=args,
        prog="neighborlm convert",
        description="Checkpoints of fairseq to ours and back.",
    )
