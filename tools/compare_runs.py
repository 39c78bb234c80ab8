"""Compares the metrics of two runs, step by step."""

import sys

from mcore_rl.report.compare import main

if __name__ == "__main__":
    sys.exit(main())
