"""Perplexity of a trained model, plain or with a memory: `python evaluate.py --config ...`."""

from neighborlm.programs.exits import run_program

if __name__ == "__main__":
    run_program("programs.evaluate")
