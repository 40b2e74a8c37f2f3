"""Runs a comparison of the tasks in a folder, for a test that kills it: `python -m ... FOLDER OUTPUT`."""

import sys
from pathlib import Path

from tests.comparison.helpers import compared
from tests.comparison.test_run import METHODS

if __name__ == "__main__":
    compared(Path(sys.argv[1]), Path(sys.argv[2]), METHODS)
