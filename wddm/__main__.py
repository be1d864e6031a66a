"""`python -m wddm`, as `accelerate launch -m wddm train` starts it: the command line."""

import sys

from wddm.cli import main

sys.exit(main())
