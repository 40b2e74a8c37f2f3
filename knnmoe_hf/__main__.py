"""`python -m knnmoe_hf`: the `knnmoe` command."""

import sys

from knnmoe_hf.cli import main

sys.exit(main())
