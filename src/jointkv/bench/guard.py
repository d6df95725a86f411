"""Runs a command for as long as the process that started this one holds its end of the pipe, and leaves nothing behind.

    python -I -S guard.py GRACE_SECONDS COMMAND [ARGUMENTS]

The first line on stdout is the process id of the command, which leads a session of its own. However the starting
process ends, SIGKILL included, the pipe on stdin closes; the command then gets SIGTERM and, after the grace time, its
whole process group SIGKILL. vLLM needs this: its engine may outlive an API server that was killed.

Run by path and with the standard library alone, so that it starts at once and takes little memory.
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
from pathlib import Path
from types import FrameType

POLL_SECONDS = 0.2
CHILDREN_SECONDS = 5.0


def main() -> int:
    """Run the command; returns its exit code, 128 and the number of the signal that ended it."""
    signal.signal(signal.SIGTERM, _leave)
    grace, command = float(sys.argv[1]), sys.argv[2:]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    try:
        print(process.pid, flush=True)
        while not _ended(process.pid) and not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            pass
        if not _ended(process.pid):
            os.kill(process.pid, signal.SIGTERM)
        _wait(grace, lambda: _ended(process.pid))
        # What the command leaves behind may be about to end too, and to give back shared memory before.
        _wait(min(grace, CHILDREN_SECONDS), lambda: not living(process.pid))
    finally:
        # The leader was not waited for yet, so the group's number cannot have been given to anyone else.
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    return code if code >= 0 else 128 - code


def processes(session: int) -> list[list[str]]:
    """The fields of /proc/PID/stat, the name left empty, of every process of the session that `session` leads."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, _, rest = file.read_text(errors="replace").partition(" ")
            fields = [pid, "", *rest.rpartition(")")[2].split()]
            if fields[5] == str(session):
                found.append(fields)
    return found


def living(session: int) -> list[int]:
    """Process ids of a session's processes that still run."""
    return [int(fields[0]) for fields in processes(session) if fields[2] != "Z"]


def _wait(seconds: float, over: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not over() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _ended(pid: int) -> bool:
    """Whether the child has ended; it stays a zombie, which keeps its number."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
