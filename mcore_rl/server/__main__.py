"""`python -m mcore_rl.server MODEL_DIR [--port P ...]`"""

from __future__ import annotations

import logging
import sys

import tyro

from mcore_rl.errors import McoreRLError
from mcore_rl.server.server import serve
from mcore_rl.terminal import printable


def main() -> None:
    """Serves; a typed error ends the process with its message and exit code."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("mcore_rl").setLevel(logging.INFO)
    try:
        tyro.cli(serve)
    except McoreRLError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
