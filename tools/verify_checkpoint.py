"""Checks a checkpoint directory: checksums, every parameter, equality with another model."""

import sys

from mcore_rl.convert.verify import main
from mcore_rl.streams import printing

if __name__ == "__main__":
    sys.exit(printing(main))
