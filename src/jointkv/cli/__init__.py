"""The command `jointkv`: `run` is what the installed script calls."""

import errno
import os
import sys

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def run() -> None:
    """Run the command line.

    Ctrl-C ends it with exit code 130 and no traceback, also while it is still being loaded. So does a full disk behind
    its output with 2: errors of files that a command writes itself are named there, see `system.files`.
    """
    try:
        from jointkv.cli.main import app

        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in NO_ROOM or error.filename is not None:
            raise
        # What is left in the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        sys.exit(2)
