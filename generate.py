"""Text from a trained model, plain or with a memory: `python generate.py runs/NAME ...`."""

from neighborlm.programs.exits import run_program

if __name__ == "__main__":
    run_program("programs.generate")
