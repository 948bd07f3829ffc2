"""Fits a model from a config: `python train.py --config configs/<corpus>/lm.yaml`."""

from neighborlm.programs.train import main

if __name__ == "__main__":
    main()
