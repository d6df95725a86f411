"""Where progress goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Report = Callable[[str], None]
"""Takes one line before each step."""


class Progress(Protocol):
    """Steps, and how far the present one has come."""

    def start(self, description: str) -> None:
        """The next step begins."""

    def part(self, fraction: float) -> None:
        """Of the present step `fraction` is done."""


class Silent(Progress):
    """Shows nothing."""

    def start(self, description: str) -> None:
        return

    def part(self, fraction: float) -> None:
        return
