"""`mcore-rl convert mcore-to-hf`: see its --help."""

import sys

from mcore_rl.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", "mcore-to-hf", *sys.argv[1:]]))
