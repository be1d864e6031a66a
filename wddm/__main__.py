"""`python -m wddm`, as `accelerate launch -m wddm train` starts it: the command line."""

import sys

from wddm.cli import main

if __name__ == "__main__":
    sys.exit(main())
