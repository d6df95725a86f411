"""Values by key of which only the most recently used are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(OrderedDict[Key, Value]):
    """A dictionary that makes what it lacks, and then forgets the key that was not looked up for the longest time.

    Only `recent[key]` counts as looking up; the order of the keys is that of their last time.

    Args:
        new: makes the value of a key.
        most: keys that are kept, 1 or more.
        forgotten: is told of a key when it is gone, before the next one is made.
    """

    def __init__(
        self, new: Callable[[Key], Value], most: int, forgotten: Callable[[Key], None] = lambda key: None
    ) -> None:
        super().__init__()
        self._new, self._most, self._forgotten = new, most, forgotten

    def __getitem__(self, key: Key) -> Value:
        found = super().__getitem__(key)
        self.move_to_end(key)
        return found

    def __missing__(self, key: Key) -> Value:
        if len(self) == self._most:
            self._forgotten(self.popitem(last=False)[0])
        self[key] = made = self._new(key)
        return made
