"""When fusion is tried again after an internal error."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Recovery:
    """Off with a fault, on again after a wait that doubles with every fault, off for good after the last one allowed.

    It decides and `JointConnector` carries out. Only the scheduler's side has one, so ranks cannot disagree.

    Args:
        retry_after: seconds from the first fault until fusion is tried again; None: never.
        max_faults: after so many it stays off.
        clock: the present time in seconds.

    Attributes:
        faults: how often fusion went off.
        cause: of the last time.
    """

    def __init__(self, retry_after: float | None, max_faults: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.faults = 0
        self.cause: str | None = None
        self._retry_after, self._max_faults, self._clock = retry_after, max_faults, clock
        self._wait = 0.0
        self._off_until: float | None = None

    @property
    def off(self) -> bool:
        """Whether nothing may be fused now."""
        return self._off_until is not None

    @property
    def for_good(self) -> bool:
        """Whether that stays so until the engine starts again."""
        return self._off_until == math.inf

    @property
    def outlook(self) -> str:
        """What comes next, for the log."""
        return "until the engine is restarted" if self.for_good else f"for {self._wait:g} s"

    def fault(self, cause: str, for_good: bool = False) -> bool:
        """Go off; whether this is a fault of its own.

        An error while fusion is off belongs to the fault before it, unless it is worse: `for_good` ends the waiting.
        """
        if self.for_good or (self.off and not for_good):
            return False
        self.faults += 1
        self.cause = cause
        if for_good or self._retry_after is None or self.faults >= self._max_faults:
            self._wait = math.inf
        else:
            self._wait = self._retry_after * 2 ** (self.faults - 1)
        self._off_until = self._clock() + self._wait
        return True

    def resume(self) -> bool:
        """Go on if the wait is over; whether that has just happened."""
        if self._off_until is None or self._clock() < self._off_until:
            return False
        self._off_until = None
        return True
