"""The command `jointkv`: `run` is what the installed script calls."""

import sys


def run() -> None:
    """Run the command line. Ctrl-C ends it with exit code 130 and no traceback, also while it is still being loaded."""
    try:
        from jointkv.cli.main import app

        app()
    except KeyboardInterrupt:
        sys.exit(130)
