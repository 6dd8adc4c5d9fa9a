"""The tiny program that becomes a background process (`exec`); run by its path, standard library only.

It exists for two promises that the starter cannot keep alone, because it may be killed at any instant:
nothing runs that no record names (the launcher waits until the record is on disk, and gives up when the
starter dies first), and a temporary process dies with its starter, even on `kill -9`.
"""

import ctypes
import os
import signal
import sys

KEEP_SIGNAL = signal.SIGUSR1  # "outlive your starter": the rollout that started a challenger made it champion
PR_SET_PDEATHSIG = 1  # Linux, <sys/prctl.h>; survives exec


def die_with_parent(signal_number: int) -> None:
    """Ask the kernel for a signal when the parent ends; 0 takes the wish back. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)


def main(argv: list[str]) -> int:
    """`launch.py GO_FD PARENT COMMAND...`: PARENT is 0 for a process that outlives its starter."""
    go, parent, command = int(argv[1]), int(argv[2]), argv[3:]
    if parent:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it died before the wish was heard
            return 1
    if os.read(go, 1) != b"g":  # end of file: the starter died before it wrote the record
        return 1
    os.close(go)
    return os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
