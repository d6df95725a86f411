"""A file system whose reads do not come back until they are let go, as of a disk or a server that hangs."""

from __future__ import annotations

import os
import threading
from typing import Any


class HangingDisk:
    """Stands in for the module `os` of `jointkv.store.known`.

    Attributes:
        reading: set once a read hangs.
        answers: set while reads come back.
    """

    def __init__(self) -> None:
        self.reading, self.answers = threading.Event(), threading.Event()

    def pread(self, *where: int) -> bytes:
        if not self.answers.is_set():
            self.reading.set()
            assert self.answers.wait(120)
        return os.pread(*where)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)
