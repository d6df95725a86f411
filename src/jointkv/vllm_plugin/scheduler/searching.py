"""How many blocks are signed and searched for: fewer where nothing is found in a long time."""

from __future__ import annotations

from collections import Counter

QUIET = 256
"""Blocks of a layer group that keep their pages, one after the other, before the search is less eager."""

EVERY = 16
"""Of so many places one is signed then, and another one after each `QUIET` blocks more."""


class Searching:
    """Which blocks are worth a signature, by layer group.

    Two blocks can find each other only where both are signed, and they are compared at equal places alone, so it is
    places that are chosen. Whatever finds a page makes the search of its layer group eager again.
    """

    def __init__(self) -> None:
        self._since: Counter[int] = Counter()

    def wants(self, group: int, place: int) -> bool:
        """Whether a block of KV-cache group `group` that keeps its page, at block `place`, is to be signed; counted."""
        quiet = self._since[group] // QUIET
        self._since[group] += 1
        return not quiet or (place - quiet) % EVERY == 0

    def found(self, group: int) -> None:
        """A block of `group` reads a page that was found by its signature."""
        self._since[group] = 0
