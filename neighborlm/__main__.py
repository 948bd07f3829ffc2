"""`python -m neighborlm TOOL ...` is `neighborlm TOOL ...`."""

from neighborlm.tools import main

if __name__ == "__main__":
    main()
