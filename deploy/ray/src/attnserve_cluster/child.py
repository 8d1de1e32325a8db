"""Becomes a server that ends when the process that started it ends, however that does.

    python -m attnserve_cluster.child PARENT ARGUMENT...

PARENT is the process that starts this one. Ray kills an actor's process alone; what it gives to the
next actor, a GPU say, must be free then.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    """Ask the kernel for that signal, and run the server in the place of this program."""
    parent, *words = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        sys.exit(1)
    command = [sys.executable, "-m", "attnserve_server.cli", *words]
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
