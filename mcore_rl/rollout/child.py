"""`python child.py PARENT_PID COMMAND...`: becomes COMMAND, which the kernel ends together with its parent.

Standard library only, run as a file: COMMAND may belong to another interpreter. Linux ties a process to the
*thread* that started it, and keeps the tie over exec. Elsewhere only an orderly end of the parent ends it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Does not return."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it had died before prctl
        sys.exit(f"process {parent}, which started this server, has ended")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
