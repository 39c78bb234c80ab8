"""`mcore-rl convert hf-to-mcore`: see its --help."""

import sys

from mcore_rl.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-mcore", *sys.argv[1:]]))
