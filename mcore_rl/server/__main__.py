"""`python -m mcore_rl.server MODEL_DIR [--port P ...]`"""

from __future__ import annotations

import logging
import sys

from mcore_rl.errors import McoreRLError
from mcore_rl.imports import large_pages
from mcore_rl.server.options import add_options, run_server
from mcore_rl.streams import guard
from mcore_rl.terminal import CommandParser, printable


def main() -> None:
    """Serves; a typed error ends the process with its message and exit code."""
    large_pages()
    guard(output=False)
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("mcore_rl").setLevel(logging.INFO)
    parser = CommandParser(prog="python -m mcore_rl.server", description="The embedded rollout server.")
    add_options(parser)
    try:
        run_server(parser.parse_args())
    except McoreRLError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
