"""`python -m grkan`, as `torchrun -m grkan` and `accelerate launch -m grkan` need it."""

import sys

from .cli import main

if __name__ == "__main__":  # not in the processes that `grkan compare --jobs` starts
    sys.exit(main())
