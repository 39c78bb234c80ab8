"""Compares the metrics of two runs, step by step."""

import sys

from mcore_rl.report.compare import main
from mcore_rl.streams import printing

if __name__ == "__main__":
    sys.exit(printing(main))
