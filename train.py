"""Fits a model from a config: `python train.py --config configs/<corpus>/lm.yaml`."""

from neighborlm.programs.exits import run_program

if __name__ == "__main__":
    run_program("programs.train")
