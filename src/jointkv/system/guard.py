"""Runs a command for as long as the process that started this one holds its end of the pipe, and leaves nothing behind.

    python -P guard.py GRACE_SECONDS COMMAND [ARGUMENTS]

The first line on stdout is the process id of the command, which leads a session of its own. However the starting
process ends, SIGKILL included, the pipe on stdin closes; the command then gets SIGTERM and, after the grace time, all
of its session SIGKILL. vLLM needs this: its engine may outlive an API server that was killed.

Run by path and without the rest of the package, so that it starts at once and takes little memory.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

POLL_SECONDS = 0.2
CHILDREN_SECONDS = 5.0
KILL_SECONDS = 10.0
KILL_POLL_SECONDS = 0.02


def main() -> int:
    """Run the command; returns its exit code, 128 and the number of the signal that ended it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    grace, command = float(sys.argv[1]), sys.argv[2:]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    leader = psutil.Process(process.pid)

    def ended() -> bool:
        return leader.status() == psutil.STATUS_ZOMBIE

    try:
        print(process.pid, flush=True)
        while not ended() and not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            pass
        leader.terminate()
        _wait(grace, ended)
        # What the command leaves behind may be about to end too, and to give back shared memory before.
        _wait(min(grace, CHILDREN_SECONDS), lambda: not living(process.pid))
    finally:
        # The leader was not waited for yet, so the session's number cannot have been given to anyone else.
        kill(process.pid)
        code = process.wait()
    return code if code >= 0 else 128 - code


def living(session: int) -> list[psutil.Process]:
    """The processes of the session that `session` leads and that still run."""
    found = []
    for pid in psutil.pids():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(pid) == session and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill(session: int) -> None:
    """SIGKILL to every process of the session that `session` leads. Returns when none of them runs any more.

    A killed process takes a moment to end, more on a busy machine; one that hangs in the kernel is left after a while.
    """
    deadline = time.monotonic() + KILL_SECONDS
    while (left := living(session)) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(KILL_POLL_SECONDS)


def _wait(seconds: float, over: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not over() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
