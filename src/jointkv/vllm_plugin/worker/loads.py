"""Loads that have not ended. Each ends once: its pages are filled, or lost in part, or a disk that hangs gives it up.

From then on its pages are its request's to compute, and nothing more may be written to them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

from jointkv.system.background import Background
from jointkv.vllm_plugin.messages import Load

logger = init_logger(f"vllm.{__name__}")

HANGS_S = 10.0
"""A disk that has not answered for so long hangs: what was to be read is computed, until it answers again."""


@dataclass
class Loading:
    """A load that has not ended.

    Attributes:
        after: what is to be waited for before its pages are written; None for nothing.
        good: pages that were filled.
    """

    load: Load
    after: Any = None
    good: int = 0


class Loads:
    """Does one load after another in a thread.

    Args:
        thread: that one.
        fill: fills the pages of a load, from the first on; asks `goes_on` again and again.
        count: adds to a counter.
    """

    def __init__(self, thread: Background, fill: Callable[[Loading], None], count: Callable[[str, int], None]) -> None:
        self._thread, self._fill, self._count = thread, fill, count
        self._lock = threading.Lock()
        self._loads: dict[str, Loading] = {}
        self._done: dict[str, list[int]] = {}
        self._answered, self._hangs, self._copies = 0.0, False, False
        """When the disk answered last, whether it was given up since, and whether what it said is being copied."""

    def begin(self, loading: Loading) -> None:
        """Fill the pages of a request, behind those of all before; not while the disk hangs."""
        with self._lock:
            if not self._loads and not self._hangs:
                self._answered = time.monotonic()
            self._loads[loading.load.request_id] = loading
            if self._hangs:
                self._conclude(loading)
            else:
                self._thread.submit(self._do, loading)

    def finished(self) -> dict[str, list[int]]:
        """Requests whose loads have ended since the last call, or were given up, and their pages that are lost."""
        given_up: list[Loading] = []
        with self._lock:
            if self._loads and not self._copies and time.monotonic() - self._answered > HANGS_S:
                self._hangs, given_up = True, list(self._loads.values())
                for loading in given_up:
                    self._conclude(loading)
            done, self._done = self._done, {}
        if given_up:
            logger.warning("the store was not read for %g s: %d loads are given up", HANGS_S, len(given_up))
        return done

    def goes_on(self, loading: Loading, copies: bool = False) -> bool:
        """The disk has answered; whether the load was not given up. It is not until the next answer if `copies`."""
        with self._lock:
            still = self._loads.get(loading.load.request_id) is loading
            self._answered, self._hangs, self._copies = time.monotonic(), False, still and copies
            return still

    def _do(self, loading: Loading) -> None:
        try:
            if self.goes_on(loading):
                self._fill(loading)
        finally:
            self.goes_on(loading)
            with self._lock:
                self._conclude(loading)

    def _conclude(self, loading: Loading) -> None:
        load, good = loading.load, loading.good
        if self._loads.get(load.request_id) is loading:
            del self._loads[load.request_id]
            self._done[load.request_id] = load.pages[good:].tolist()
            self._count("store_pages_read", good)
            self._count("store_pages_lost", len(load.pages) - good)
