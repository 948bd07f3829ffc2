"""Perplexity of a trained model, plain or with a memory: `python evaluate.py --config ...`."""

from neighborlm.programs.evaluate import main

if __name__ == "__main__":
    main()
