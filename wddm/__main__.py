"""The command line as `python -m wddm`; `accelerate launch -m wddm train` starts it this way."""

import sys

from wddm.cli import main

sys.exit(main())
